"""The commands `serve` and `qwen2vl-serve`: what they print and how they end."""

from __future__ import annotations

import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qwen2vl_serve import __version__, cli, preflight
from qwen2vl_serve.errors import BootError, PreflightError
from qwen2vl_serve.launch.output import Report
from qwen2vl_serve.machine import hardware, installed
from qwen2vl_serve.machine.hardware import Card
from qwen2vl_serve.plan.answer import as_yaml
from qwen2vl_serve.profile import Profile, load_profile, profile_names

COMMAND = [sys.executable, "-m", "qwen2vl_serve.cli"]


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    hang_up = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, hang_up)  # which the command takes for its process


@pytest.fixture
def started(monkeypatch) -> list[tuple[Profile, bool]]:
    """Profiles that were handed to the launcher, in place of an engine."""
    calls: list[tuple[Profile, bool]] = []

    def serve(
        profile: Profile,
        *,
        verbose: bool,
        report: Report,
        read_again: Callable[[], Profile],
    ) -> int:
        # What SIGHUP will read is what was started, options and rehearsal included.
        assert read_again() == profile
        calls.append((profile, verbose))
        report("ready")
        return 0

    monkeypatch.setattr("qwen2vl_serve.launch.serve.serve", serve)
    monkeypatch.setattr(installed, "vllm_build", lambda: "cpu")
    return calls


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"serve: [^\n]+\n", output.err)
    return output.err


def test_serve_starts_the_profile_that_was_named(started, capfd):
    """``serve`` and ``qwen2vl-serve serve`` hand over the same profile, its options applied."""
    words = ["--profile", "demo", "--port", "0", "--set", "limits.max_n=2", "--verbose"]
    assert cli.serve_main(words) == 0
    assert cli.main(["serve", *words]) == 0
    assert started[0] == started[1]
    profile, verbose = started[0]
    assert (profile.name, profile.server.port, profile.limits.max_n) == ("demo", 0, 2)
    assert verbose is True
    assert capfd.readouterr().out == "ready\nready\n"


def test_options_win_over_set(started):
    """``--port 0`` beats a later ``--set server.port=1``; ``--host`` holds beside them."""
    words = ["--port", "0", "--host", "0.0.0.0", "--model", "demo", "--set", "server.port=1"]
    assert cli.serve_main(["--profile", "demo", *words]) == 0
    server = started[0][0].server
    assert (server.port, server.host) == (0, "0.0.0.0")


def test_serve_without_a_profile_takes_what_fits(started, monkeypatch, capfd):
    """``demo`` without a card, ``single-3090`` on one of 24 GiB; a line tells which and why."""
    monkeypatch.setattr(hardware, "cards", lambda: ())
    assert cli.serve_main(["--port", "0"]) == 0
    assert started[-1][0].name == "demo"
    assert "profile demo, for a machine with no NVIDIA card" in capfd.readouterr().out
    card = Card(0, "NVIDIA GeForce RTX 3090", 23.58, 23.0, (8, 6))
    monkeypatch.setattr(hardware, "cards", lambda: (card,))
    monkeypatch.setattr(installed, "vllm_build", lambda: "cuda")
    usage = shutil.disk_usage("/")._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli.serve_main(["--port", "0"]) == 0
    assert started[-1][0].name == "single-3090"
    assert "1 × NVIDIA GeForce RTX 3090 (24 GiB)" in capfd.readouterr().out


def test_rehearsal_keeps_the_profiles_topology(started):
    """``multi-gpu --rehearse`` has 8 workers of the demo model and keeps the keys that were set."""
    words = ["--profile", "multi-gpu", "--rehearse", "--port", "0"]
    assert cli.serve_main([*words, "--set", "server.api_keys=[k]"]) == 0
    profile = started[0][0]
    assert profile.workers == 8
    assert profile.model.model == "demo"
    assert profile.api_keys({}) == {"k"}


def test_check_starts_nothing(started, capfd):
    """``--check`` ends with 0 and one line once profile and machine have passed."""
    assert cli.serve_main(["--profile", "demo", "--port", "0", "--check"]) == 0
    assert started == []
    assert capfd.readouterr().out == "profile demo can start on this machine\n"


def test_engine_that_fails_to_boot_ends_with_1(monkeypatch, capfd):
    """Status 1, where a wrong command has 2; a reason of several lines becomes one line."""

    def fail(*_: object, **__: object) -> int:
        raise BootError("the engine did not start:\nout of memory")

    monkeypatch.setattr("qwen2vl_serve.launch.serve.serve", fail)
    monkeypatch.setattr(preflight, "check", lambda profile: None)
    assert cli.serve_main(["--profile", "demo"]) == 1
    assert capfd.readouterr().err == "serve: the engine did not start: out of memory\n"


def test_port_that_is_lost_after_the_preflight_ends_with_2(monkeypatch, capfd):
    """Told in the one line and with the status that the preflight itself would have given."""

    def fail(*_: object, **__: object) -> int:
        raise PreflightError("server.port: 8000 is in use")

    monkeypatch.setattr("qwen2vl_serve.launch.serve.serve", fail)
    monkeypatch.setattr(preflight, "check", lambda profile: None)
    assert cli.serve_main(["--profile", "demo"]) == 2
    assert capfd.readouterr().err == "serve: server.port: 8000 is in use\n"


def test_output_of_the_engine_cannot_mix_with_ours(monkeypatch, capfd):
    """The launcher may point standard output elsewhere; its reports still arrive."""

    def serve(profile: Profile, *, report: Report, **_: object) -> int:
        saved = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(1, b"flood\n")
        report("ready 中文")
        os.dup2(saved, 1)
        return 0

    monkeypatch.setattr("qwen2vl_serve.launch.serve.serve", serve)
    monkeypatch.setattr(preflight, "check", lambda profile: None)
    assert cli.serve_main(["--profile", "demo"]) == 0
    assert capfd.readouterr().out == "ready 中文\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "mult-gpu"], "did you mean multi-gpu?"),
        (["--profile", "./missing.yaml"], "missing.yaml: cannot be read"),
        (["--profile", "demo", "--port", "x"], "--port: server.port must be a valid integer"),
        (["--profile", "demo", "--host", ""], "--host: server.host must have at least"),
        (["--profile", "demo", "--set", "a"], "section.field=value"),
        (["--profile", "demo", "--set", "engine.sed=1"], "did you mean seed?"),
        (["--profile", "demo", "--model", "/nonexistent"], "there is no folder /nonexistent"),
        (["--max-model-len", "4096"], "use --set engine.max_model_len=VALUE"),
        (["--tensor_parallel_size=2"], "use --set engine.tensor_parallel_size=2"),
        (["--nonsense"], "unknown argument --nonsense"),
        (["--prof", "demo"], "unknown argument --prof"),
        (["extra"], "a profile is named by --profile extra, a model by --model extra"),
        (
            [
                "--rehearse",
                "--set",
                "hardware={}",
                "--set",
                "engine={tensor_parallel_size: 3}",
                "--profile",
                "multi-gpu",
            ],
            "3 does not divide Qwen/Qwen2-VL-7B-Instruct",
        ),
        (["--profile"], "expected one argument"),
        (["--profile", "demo", "--port", "0", "--set", "server.log_file=/"], "is a folder"),
    ],
)
def test_what_cannot_start_is_one_line_and_status_2(words, message, capfd):
    """A slip is told with the name that was meant, an option of vLLM's with its ``--set``."""
    assert message in refusal(capfd, "serve", *words)


@pytest.mark.parametrize(
    "words", [[], ["nonsense"], ["profiles", "nonsense"], ["profiles", "show"]]
)
def test_command_that_does_not_exist_is_one_line(words, capfd):
    """One that is incomplete, too: status 2 and the way to ``--help``, no usage text."""
    assert "--help" in refusal(capfd, *words)


def test_profiles_are_listed_with_model_cards_and_purpose(capfd):
    """A row for each profile that ships; ``profiles`` and ``profiles list`` print the same."""
    assert cli.main(["profiles"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "CARDS", "PURPOSE"]
    assert [line.split()[0] for line in lines[1:]] == profile_names()
    (multi,) = [line for line in lines if line.startswith("multi-gpu ")]
    assert "Qwen/Qwen2-VL-7B-Instruct" in multi
    assert "8 × RTX 2080 12 GB" in multi
    assert load_profile("multi-gpu").description in multi
    assert cli.main(["profiles", "list"]) == 0
    assert capfd.readouterr().out.splitlines() == lines


def test_profiles_are_a_table_on_a_terminal():
    """Its head is bold, and at 200 columns every profile's name stands in it whole."""
    import pty

    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    with subprocess.Popen([*COMMAND, "profiles"], stdout=child, env=environment) as process:
        os.close(child)
        output = b""
        try:
            while chunk := os.read(parent, 65536):
                output += chunk
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(parent)
    assert process.returncode == 0
    assert b"\x1b[1m" in output
    for name in profile_names():
        assert name.encode() in output


@pytest.mark.parametrize("name", profile_names())
def test_profile_shown_is_itself_a_profile(name, capfd, tmp_path):
    """What `profiles show` prints can be saved, edited and served."""
    assert cli.main(["profiles", "show", name]) == 0
    output = capfd.readouterr().out
    path = tmp_path / "shown.yaml"
    path.write_text(output)
    profile = load_profile(name)
    assert load_profile(str(path)).engine_args() == profile.engine_args()
    assert load_profile(str(path)).model_dump() == profile.model_dump()
    (line,) = [line for line in output.splitlines() if "vllm serve" in line]
    assert shlex.split(line.removeprefix("# ")) == profile.vllm_command()


def test_profile_shown_is_resolved(capfd):
    """``--set``, ``--model`` and ``--port`` are in it, and defaults that the profile leaves out."""
    words = ["profiles", "show", "single-3090", "--set", "engine.max_model_len=4096"]
    assert cli.main([*words, "--model", "/m", "--port", "9000"]) == 0
    output = capfd.readouterr().out
    values = yaml.safe_load(output)
    assert values["engine"]["max_model_len"] == 4096
    assert values["server"]["port"] == 9000
    assert values["limits"]["max_body_bytes"] == 64 * 1024 * 1024
    assert "vllm serve /m " in output
    assert "--max-model-len 4096" in output


def test_rehearsal_shown_has_its_environment(capfd):
    """The ``vllm serve`` line begins with the variable that binds each worker to a processor."""
    assert cli.main(["profiles", "show", "multi-gpu", "--rehearse"]) == 0
    output = capfd.readouterr().out
    assert re.search(r"# VLLM_CPU_OMP_THREADS_BIND='[0-9|]+' vllm serve ", output)


def test_keys_are_counted_and_not_shown(capfd):
    """``profiles show`` tells how many there are; neither a key nor asterisks stand for them."""
    words = ["profiles", "show", "demo", "--set", "server.api_keys=[sesame, thistle]"]
    assert cli.main(words) == 0
    output = capfd.readouterr().out
    assert "server.api_keys: 2, not shown" in output
    assert "sesame" not in output
    assert "*" not in output


def test_a_proxy_is_shown_without_its_password(capfd):
    """It is left out, so that what is shown is a profile, as from the planner; both say so."""
    address = "http://user:sesame@proxy.test:3128"
    assert cli.main(["profiles", "show", "demo", "--set", f"media.proxy={address}"]) == 0
    output = capfd.readouterr().out
    assert "proxy" not in yaml.safe_load(output)["media"]
    assert "# media.proxy: …@proxy.test:3128, not shown whole" in output
    assert "sesa" not in output
    written = as_yaml(load_profile("demo", [f"media.proxy={address}"]))
    assert "sesame" not in written
    assert "media.proxy has a password" in written
    assert "proxy: environment" in as_yaml(load_profile("demo", ["media.proxy=environment"]))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://user:sesame@cache.test:6379/0", "…@cache.test:6379/0"),
        ("redis://cache.test:6379/0?password=sesame", "redis://cache.test:6379/0?…"),
        ("redis://user@cache.test/?password=sesame@1", "redis://…"),
        ("redis://user:sesa?me@cache.test/", "redis://…"),
    ],
)
def test_a_quota_storage_is_shown_without_its_password(address, shown, capfd):
    """As a proxy is; one without a user stands in the YAML as it is."""
    words = ["profiles", "show", "demo", "--set", f"server.quota_storage={address}"]
    assert cli.main(words) == 0
    output = capfd.readouterr().out
    assert "quota_storage" not in yaml.safe_load(output)["server"]
    assert f"# server.quota_storage: {shown}, not shown whole" in output
    assert "sesa" not in output
    written = as_yaml(load_profile("demo", [f"server.quota_storage={address}"]))
    assert "sesa" not in written
    assert "server.quota_storage has a password" in written
    for plain in ("redis://cache.test:6379/0", "sqlite:////home/a@b/used?.db"):
        written = as_yaml(load_profile("demo", [f"server.quota_storage={plain}"]))
        assert yaml.safe_load(written)["server"]["quota_storage"] == plain
        assert "password" not in written


def test_ask_is_the_clients_command(capfd):
    """``qwen2vl-serve ask --help`` prints the client's help under the server's name."""
    assert cli.main(["ask", "--help"]) == 0
    assert "qwen2vl-serve ask" in capfd.readouterr().out


@pytest.mark.parametrize("words", [["--version"], ["serve", "--version"]])
def test_version(words, capfd):
    """``qwen2vl-serve`` and its ``serve`` print the package's version and end with 0."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    assert __version__ in capfd.readouterr().out


def run(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command; return it with the processor time it took.

    Processor seconds stay the same on a busy machine, where wall seconds do not.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.skipif(len(hardware.cards()) >= 8, reason="this machine has eight cards")
def test_multi_gpu_without_eight_cards_ends_within_3_seconds():
    """Status 2 and one line that names the 8 cards, for less than 3 s of processor time."""
    done, seconds = run("serve", "--profile", "multi-gpu")
    assert done.returncode == 2
    assert re.fullmatch(r"serve: [^\n]*8 NVIDIA cards[^\n]*\n", done.stderr)
    assert done.stdout == ""
    assert seconds < 3


def test_busy_port_ends_within_3_seconds():
    """Status 2 and one line that names the port, for less than 3 s of processor time."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done, seconds = run("serve", "--profile", "demo", "--port", port)
    assert done.returncode == 2
    assert re.fullmatch(rf"serve: server.port: {port} is in use[^\n]*\n", done.stderr)
    assert seconds < 3


def test_listing_takes_less_than_a_second():
    """Of processor time, Python's own start included: to look at the profiles costs no wait."""
    done, seconds = run("profiles")
    assert done.returncode == 0
    assert seconds < 1


def test_listing_loads_no_more_than_profiles():
    """Neither the checks, the plans and the request's models nor the client: the time is theirs."""
    program = """
import sys
from qwen2vl_serve.cli import main
main(["profiles"])
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = done.stderr.split()
    assert "qwen2vl_serve.profile" in loaded
    heavy = ("qwen2vl_serve.doctor", "qwen2vl_serve.plan", "qwen2vl_serve.protocol")
    assert not {*heavy, "qwen2vl_serve.machine", "qwen2vl_client", "requests"} & {*loaded}


@pytest.mark.parametrize("words", [["profiles", "show", "multi-gpu"], ["--help"], ["--version"]])
def test_reader_that_leaves_early_is_no_traceback(words, monkeypatch):
    """``profiles show … | true`` ends with 1 and without a word, as nobody read what it printed."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it each line is written at once
    line = f"{shlex.join([*COMMAND, *words])} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 1


def test_refusal_is_told_where_nobody_reads_the_output():
    """Its line and status 2 come all the same, also where standard output is closed."""
    for end in ("| true; exit ${PIPESTATUS[0]}", ">&-"):
        line = f"{shlex.join(COMMAND)} profiles show nonsense {end}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 2
        assert re.fullmatch(r"serve: no profile is named 'nonsense'[^\n]*\n", done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_in_one_line():
    """Of standard output, with status 1: a profile that was cut off must not pass for whole."""
    line = f"{shlex.join(COMMAND)} profiles show multi-gpu > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == "serve: standard output cannot be written: its disk is full\n"
    assert done.returncode == 1


SIGNALLED = """
import os, signal, sys
from qwen2vl_serve import cli, preflight
signal.signal(signal.SIGHUP, signal.SIG_DFL)
preflight.check = lambda _: os.kill(os.getpid(), signal.SIGHUP) or []
sys.exit(cli.{0})
"""
"""A start that gets SIGHUP while it looks at the machine, as `systemctl reload` may send it."""


@pytest.mark.parametrize(
    "command",
    [
        "serve_main(['--profile', 'demo', '--check'])",
        "main(['serve', '--profile', 'demo', '--check'])",
    ],
)
def test_a_reload_during_the_start_changes_nothing(command):
    """Before there is anything to reload it is let pass, unless it means that the terminal went."""
    program = [sys.executable, "-c", SIGNALLED.format(command)]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    mine, theirs = pty.openpty()
    done = subprocess.run(program, stdin=theirs, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGHUP
    os.close(mine)
    os.close(theirs)


def test_interrupt_is_clean(tmp_path):
    """Ctrl-C before the launcher took over ends with 130 and no traceback."""
    program = (
        "import sys, time\n"
        "from qwen2vl_serve import cli, preflight\n"
        "def wait(profile):\n    print('waiting', flush=True)\n    time.sleep(600)\n"
        "preflight.check = wait\n"
        "sys.exit(cli.serve_main(['--profile', 'demo']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # else it would go on to serve, at the port that other tests need
    assert process.returncode == 130
    assert errors == ""
