"""``deploy/systemd``: systemd's own checkers, and what of the server the unit relies on."""

from __future__ import annotations

import configparser
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from qwen2vl_serve.launch.http_server import Signals
from qwen2vl_serve.launch.serve import _LAST_BYTES_SECONDS
from qwen2vl_serve.profile import Profile
from tests.markdown import ROOT

UNIT = ROOT / "deploy" / "systemd" / "qwen2vl-serve.service"
USERS = ROOT / "deploy" / "systemd" / "qwen2vl-serve.sysusers.conf"
MOST_EXPOSED = 2.0
"""Of 10, as ``systemd-analyze security`` counts; docs/deploy.md has the figure."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here (Debian: systemd)"
)


class _Repeated(dict):  # type: ignore[type-arg]  # configparser's own type is as loose
    """Joins the values of a key that stands more than once, as systemd does."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            value = self[key] + value
        super().__setitem__(key, value)


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(
        strict=False, delimiters=("=",), dict_type=_Repeated, interpolation=None
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys keep their case
    parser.read(UNIT)
    return parser


def with_a_program_that_is_here(folder: Path) -> Path:
    """The unit with another program in ExecStart; the one it names is not installed here."""
    path = folder / UNIT.name
    text = UNIT.read_text("utf-8")
    path.write_text(text.replace("/opt/qwen2vl-serve/bin/serve", "/bin/true"))
    return path


def seconds(text: str) -> float:
    number, name = re.fullmatch(r"(\d+)(s|min|h)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[name]


@needs_systemd
def test_verify_is_clean(tmp_path: Path) -> None:
    """``systemd-analyze verify`` finds no unknown key, bad value or missing program."""
    done = subprocess.run(
        ["systemd-analyze", "verify", with_a_program_that_is_here(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_verify_would_find_a_fault(tmp_path: Path) -> None:
    """A misspelt key is named on standard error, so that a clean result means something."""
    path = with_a_program_that_is_here(tmp_path)
    path.write_text(path.read_text().replace("KillMode=mixed", "KillMood=mixed"))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert "KillMood" in done.stderr


@needs_systemd
def test_little_is_exposed() -> None:
    """``systemd-analyze security`` counts at most what the documentation says."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", UNIT],
        capture_output=True,
        text=True,
    )
    figure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert figure is not None, done.stderr
    assert float(figure[1]) <= MOST_EXPOSED
    for page in ("deploy.md", "deploy.zh-CN.md"):
        assert f" {MOST_EXPOSED} " in (ROOT / "docs" / page).read_text("utf-8")


def test_a_stop_is_a_drain() -> None:
    """Only the server gets SIGTERM, and is given its drain and more before anything is killed."""
    service = unit()["Service"]
    assert service["KillMode"] == "mixed"
    drain = Profile.model_validate({"model": {"model": "demo"}}).server.shutdown_timeout
    assert seconds(service["TimeoutStopSec"]) >= drain + _LAST_BYTES_SECONDS + 15
    assert seconds(service["TimeoutStartSec"]) >= 3600


def test_bad_configuration_is_not_tried_again() -> None:
    """2 is the status of what cannot start; 1, of an engine that failed, is worth another start."""
    service = unit()["Service"]
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"
    assert "1" not in service["RestartPreventExitStatus"].split()


def test_reload_is_a_signal_that_the_server_takes() -> None:
    """ExecReload sends SIGHUP, for which the server has a handler from its first line on.

    One that comes while Python itself starts ends it; systemd would take that for a good end.
    """
    assert unit()["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit()["Service"]["RestartForceExitStatus"] == "SIGHUP"
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        signals = Signals()
        assert signal.getsignal(signal.SIGHUP) == signals._hang_up
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_user_and_the_folders_are_the_units_own() -> None:
    """sysusers makes the user that the unit names; what is written is in folders it is given."""
    service = unit()["Service"]
    words = USERS.read_text("utf-8").splitlines()[-1].split()
    assert words[:2] == ["u", service["User"]]
    assert words[-1] == f"/var/lib/{service['StateDirectory']}"
    assert service["ProtectSystem"] == "strict"
    environment = dict(
        pair.split("=", 1) for value in service["Environment"].split("\n") for pair in value.split()
    )
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert environment[name].startswith(("%S/qwen2vl-serve", "%C/qwen2vl-serve")), name


def test_the_drivers_devices_are_made_before_the_server_that_may_not_make_them() -> None:
    """CUDA would load nvidia_uvm and make its nodes by a program that gains rights, which nothing
    here may; systemd knows ``char-nvidia-uvm`` only once the module is loaded."""
    parts = unit()
    for key in ("After", "Wants"):
        assert "modprobe@nvidia_uvm.service" in parts["Unit"][key].split()
    service = parts["Service"]
    # With all rights (+), and on a machine without it (-) without a failure.
    assert service["ExecStartPre"].split("\n") == [
        "+-/usr/bin/nvidia-smi -L",
        "+-/usr/bin/nvidia-modprobe -c0 -u",
    ]
    allowed = dict(line.split() for line in service["DeviceAllow"].split("\n"))
    assert {allowed[f"char-nvidia{end}"] for end in ("", "-frontend", "-uvm")} == {"rwm"}
    assert service["CapabilityBoundingSet"] == ""


@needs_systemd
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers here")
def test_sysusers_takes_the_file(tmp_path: Path) -> None:
    """In a root of its own, it makes the user with its home."""
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", USERS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "qwen2vl-serve" in (tmp_path / "etc" / "passwd").read_text()
