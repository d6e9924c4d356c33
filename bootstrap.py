#!/usr/bin/env python3
"""Install this project into ``.venv``: what ``make serve`` and ``make test`` do first.

    python3 bootstrap.py [--extra auto|cpu|gpu] [--test]

Standard library only, and syntax that Python 3.6 reads, so that an interpreter that is too old
can still find a newer one, or say in one line what is missing. A second run with nothing
changed returns at once; a run that was cut short is repaired by the next one.
Exit status: 0 installed, 2 cannot (one line on stderr says why), 130 or 143 interrupted.
"""

import argparse
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent
FALLBACK_PYTHONS = ("python3", "python3.13", "python3.12", "python3.11", "python3.14")
# The oldest C library that every wheel of both extras accepts (llguidance's is the newest).
MIN_GLIBC = (2, 31)
# Free space in GiB for an installation from nothing: (beside .venv, in the temporary folder).
# cpu is measured; gpu is an estimate from the sizes of its CUDA packages.
DISK_GIB = {"cpu": (4.5, 1.0), "gpu": (14.0, 4.0)}
HEARTBEAT_S = 15.0
PIP_OPTIONS = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")

_PROBE = """
import importlib, json, struct, sys, sysconfig
def has(name):
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "name": sys.implementation.name,
    "bits": 8 * struct.calcsize("P"),
    "gil": not sysconfig.get_config_var("Py_GIL_DISABLED"),
    "venv": has("venv"),
    "ensurepip": has("ensurepip"),
    "pip": has("pip"),
}))
"""


class CannotInstall(Exception):
    """The installation cannot succeed; the message is the one line for the user."""


class CommandFailed(Exception):
    """A step's command ended with an error; ``output`` is what it said."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


class Project(NamedTuple):
    """What the installation needs to know of ``pyproject.toml``."""

    root: Path
    digest: str
    oldest: Tuple[int, int]
    too_new: Tuple[int, int]
    torch: str


class Interpreter(NamedTuple):
    """A Python that can make ``.venv``."""

    command: str
    version: Tuple[int, ...]
    ensurepip: bool


def read_project(root: Path) -> Project:
    """Read the Python range and the torch version by pattern: Python < 3.11 has no TOML."""
    raw = (root / "pyproject.toml").read_bytes()
    text = raw.decode("utf-8")
    span = re.search(r'^requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', text, re.MULTILINE)
    torch = re.search(r'"torch==([\w.]+)"', text)
    if span is None or torch is None:
        raise CannotInstall("pyproject.toml lacks requires-python or the cpu extra's torch pin")
    low, low_minor, high, high_minor = map(int, span.groups())
    digest = hashlib.sha256(raw).hexdigest()
    return Project(root, digest, (low, low_minor), (high, high_minor), torch.group(1))


# --- which Python, which extra, and whether this machine can do it ---------------------------


def probe(command: str) -> Dict[str, Any]:
    """Ask an interpreter about itself; empty when it does not run."""
    try:
        answer = subprocess.run(
            [command, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
        facts = json.loads(answer.stdout.decode("utf-8"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    return facts if isinstance(facts, dict) else {}


def unfit_because(facts: Dict[str, Any], project: Project) -> Optional[str]:
    """Say why an interpreter cannot make ``.venv``, or None when it can."""
    version = tuple(facts["version"])
    text = ".".join(map(str, version))
    if version < project.oldest:
        return "is {}, too old".format(text)
    if version >= project.too_new:
        return "is {}, too new".format(text)
    if facts["name"] != "cpython" or facts["bits"] != 64 or not facts["gil"]:
        return "is not a 64-bit CPython with the GIL, the only kind that vLLM has wheels for"
    if not facts["venv"] or not (facts["ensurepip"] or facts["pip"]):
        return (
            "({}) has no venv or no pip: install them (Debian: apt install python{}-venv)".format(
                text, ".".join(map(str, version[:2]))
            )
        )
    return None


def choose_python(commands: List[str], project: Project) -> Interpreter:
    """Return the first interpreter that fits; raise ``CannotInstall`` when none does."""
    refused = []
    for command in commands:
        facts = probe(command)
        if not facts:
            continue
        reason = unfit_because(facts, project)
        if reason is None:
            return Interpreter(command, tuple(facts["version"]), facts["ensurepip"])
        refused.append("{} {}".format(command, reason))
    wanted = "Python >= {}.{} and < {}.{} is needed".format(*project.oldest, *project.too_new)
    found = "; ".join(dict.fromkeys(refused)) or "none of {} runs".format(", ".join(commands))
    raise CannotInstall(
        "{}, but {}. Install one, or name it: make … PYTHON=/path/to/python3".format(wanted, found)
    )


def has_nvidia_gpu() -> bool:
    """Tell whether an NVIDIA GPU can be used here (in a container: whether one is passed in)."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        listed = subprocess.run([smi, "-L"], stdout=subprocess.PIPE, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and b"GPU " in listed.stdout


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> FrozenSet[str]:
    """Return the CPU's feature flags as Linux names them; empty where it tells none."""
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found.group(1).split()) if found else frozenset()


def missing_wheel(
    extra: str, system: str, machine: str, libc: Tuple[str, str], flags: FrozenSet[str]
) -> Optional[str]:
    """Say why vLLM has no wheel for such a machine, or None when it has one.

    ``system`` and ``machine`` as ``platform`` names them, ``libc`` as ``platform.libc_ver()``.
    """
    if system != "Linux":
        return "vLLM has wheels for Linux only, this is {}: use a Linux container or WSL 2".format(
            system
        )
    if machine not in {"x86_64", "aarch64"}:
        return "vLLM has wheels for x86_64 and aarch64 only, this CPU is {}".format(machine)
    name, version = libc
    if name != "glibc":
        return "vLLM has wheels for glibc only, this system has {}: use a Debian container".format(
            name or "another C library (musl?)"
        )
    if tuple(map(int, version.split(".")[:2])) < MIN_GLIBC:
        return "vLLM's wheels need glibc >= {}.{}, this system has {}".format(*MIN_GLIBC, version)
    if extra == "cpu" and machine == "x86_64" and flags and "avx2" not in flags:
        return "vLLM's CPU wheel needs a CPU with AVX2, this one has none"
    return None


def check_disk(venv: Path, needed: Tuple[float, float]) -> None:
    """Raise ``CannotInstall`` unless both folders have the free space, in GiB."""
    temporary = Path(tempfile.gettempdir())
    demands = {venv.parent: needed[0], temporary: needed[1]}
    if venv.parent.stat().st_dev == temporary.stat().st_dev:
        demands = {venv.parent: sum(needed)}
    for folder, gib in demands.items():
        free = shutil.disk_usage(str(folder)).free / 2**30
        if free < gib:
            hint = "" if folder == venv.parent else ", or set TMPDIR"
            raise CannotInstall(
                "disk too full: {} has {:.1f} GiB free, the installation needs {:g} GiB; "
                "free some{}".format(folder, free, gib, hint)
            )


# --- the lock, and what was installed --------------------------------------------------------


class Lock:
    """One installation at a time, and a note when one was cut short.

    The file beside ``.venv`` says who works on it and is emptied only while ``.venv`` is
    sound. pip inherits the descriptor, so that the lock outlives a killed parent until pip
    has ended too.
    """

    def __init__(self, venv: Path) -> None:
        import fcntl  # absent on Windows, which is refused before

        self._stamp = venv / "installed.json"
        self._file = venv.with_name(venv.name + ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another installation is running; waiting for it to end")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        self.cut_short = bool(self._file.read())

    def fileno(self) -> int:
        """Return the descriptor to hand to pip."""
        return self._file.fileno()

    def mark(self, unsound: bool) -> None:
        """Note on disk whether ``.venv`` may be half changed from now on."""
        self._file.seek(0)
        self._file.truncate()
        if unsound:
            if self._stamp.exists():
                self._stamp.unlink()
            self._file.write("process {} changes .venv\n".format(os.getpid()))
        self._file.flush()


def is_current(venv: Path, wanted: Dict[str, Any]) -> bool:
    """Tell whether ``.venv`` holds what is wanted, or that and the test tools besides."""
    try:
        found = json.loads((venv / "installed.json").read_text())
    except (OSError, ValueError):
        return False
    if wanted["test"] is False:
        found["test"] = False
    return bool(found == wanted and (venv / "bin" / "python").exists())


def installed_extra(venv: Path) -> Optional[str]:
    """Return the extra of the last complete installation."""
    try:
        return str(json.loads((venv / "installed.json").read_text())["extra"])
    except (OSError, ValueError, KeyError):
        return None


def stale_because(
    venv: Path, version: Tuple[int, ...], extra: str, project: Project, cut_short: bool
) -> Optional[str]:
    """Say why ``.venv`` has to be made anew, or None when it can be kept and brought up to date."""
    found = venv_version(venv)
    if not venv.exists():
        return "first installation: this takes some minutes, a second run takes none"
    if cut_short:
        return "the last installation was cut short: starting afresh"
    if not project.oldest <= found < project.too_new:
        return ".venv holds no Python that fits: starting afresh"
    if found != version:
        return ".venv holds another Python than the one named: starting afresh"
    if installed_extra(venv) not in {None, extra}:
        return ".venv was made for another EXTRA: starting afresh"
    return None


def venv_version(venv: Path) -> Tuple[int, ...]:
    """Return the Python version of a virtual environment; empty when it is not usable."""
    try:
        config = (venv / "pyvenv.cfg").read_text()
    except OSError:
        return ()
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", config, re.MULTILINE)
    if found is None or not (venv / "bin" / "python").exists():
        return ()
    return tuple(map(int, found.groups()))


# --- running pip -----------------------------------------------------------------------------


def say(text: str) -> None:
    """Show one line of progress."""
    print("==> " + text, flush=True)


class Steps:
    """Run the commands of one installation, each with its own line of progress.

    On a terminal the line below it tells what the command does at the moment; elsewhere a line
    every quarter of a minute does. ``log`` keeps all that pip says.
    """

    def __init__(self, venv: Path, lock: Lock) -> None:
        self.log = venv / "install.log"
        self._python = str(venv / "bin" / "python")
        self._root = str(venv.parent)
        self._lock = lock

    def run(self, title: str, command: List[str]) -> None:
        """Run a command that changes ``.venv``; raise ``CommandFailed`` when it fails."""
        say(title)
        self._lock.mark(unsound=True)
        status, output = self._watch(command)
        # Until pip gets this far it only downloads and builds, and leaves .venv as it was.
        changed = command[1:3] != ["-m", "pip"] or "Installing collected packages" in output
        if status == 0 or not changed:
            self._lock.mark(unsound=False)
        if status != 0:
            raise CommandFailed(output)

    def pip(self, title: str, arguments: List[str]) -> None:
        """Run ``pip install`` with these arguments in ``.venv``."""
        command = [self._python, "-m", "pip", "install", "--log", str(self.log), *PIP_OPTIONS]
        started = self.log.stat().st_size if self.log.exists() else 0
        try:
            self.run(title, command + arguments)
        except CommandFailed as failure:
            with self.log.open(errors="replace") as log:
                log.seek(started)
                raise CommandFailed(log.read()) from failure

    def ask(self, code: str) -> str:
        """Return what ``.venv``'s Python prints for this code; empty when it fails."""
        answer = subprocess.run(
            [self._python, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            check=False,
        )
        return answer.stdout.strip() if answer.returncode == 0 else ""

    def _watch(self, command: List[str]) -> Tuple[int, str]:
        """Return the status and the output of a command; end it when we are interrupted."""
        child = subprocess.Popen(
            command,
            cwd=self._root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            errors="replace",
            pass_fds=(self._lock.fileno(),),
        )
        lines = [""]
        reader = threading.Thread(target=lines.extend, args=(child.stdout or (),), daemon=True)
        reader.start()
        started = reported = time.monotonic()
        try:
            while reader.is_alive():
                reader.join(0.5)
                now = time.monotonic()
                text = "    {:3.0f} s  {}".format(now - started, lines[-1].strip())
                if sys.stdout.isatty():
                    width = shutil.get_terminal_size().columns
                    print("\r\033[K" + text[: width - 1], end="", flush=True)
                elif now - reported >= HEARTBEAT_S:
                    print(text[:100], flush=True)
                    reported = now
            return child.wait(), "".join(lines)
        finally:
            if sys.stdout.isatty():
                print("\r\033[K", end="", flush=True)
            if child.poll() is None:
                child.terminate()
                child.wait()


def explain(output: str, where: str) -> str:
    """Turn what pip or uv said into the cause in one line."""
    if "No space left on device" in output:
        return "disk too full: the installation stopped with 'No space left on device'"
    missing = re.search(r"satisfies the requirement (.+?) \(from versions: (.*?)\)", output)
    broken = unreachable_because(output)
    if broken and (missing is None or missing.group(2) == "none"):
        return (
            "the package index cannot be used ({}): check the network, the proxy and pip's "
            "index settings".format(broken)
        )
    if missing is not None:
        return "the configured package indexes have no {} for {}".format(missing.group(1), where)
    errors = re.findall(r"^(?:\S+ )?(?:error|ERROR): *(.+)$", output, re.MULTILINE)
    causes = re.findall(r"^ *(?:cause|Caused by): *(.+)$", output, re.MULTILINE)
    return " ".join((errors[-1:] or ["the installation failed"]) + causes[-1:])


def unreachable_because(output: str) -> Optional[str]:
    """Return what kept pip from an index; None when every index answered."""
    for reason in re.findall(r"Could not fetch URL \S+ (.*?)(?: - skipping)?$", output, re.M):
        if not reason.startswith("404 "):
            return str(re.sub(r".*: (?=.)", "", reason)).strip("')\"")[:120]
    found = re.search(r"(Read timed out|Connection broken|Connection reset by peer)", output)
    return found.group(1) if found else None


# --- the installation ------------------------------------------------------------------------


def make_venv(venv: Path, python: Interpreter, steps: Steps) -> None:
    """Make ``.venv`` anew, with pip from this Python or, on Debian, from beside it."""
    title = "making .venv with Python {}".format(".".join(map(str, python.version)))
    create = [python.command, "-m", "venv", "--clear", str(venv)]
    if python.ensurepip:
        steps.run(title, create)
    else:
        steps.run(title + ", without pip", [*create, "--without-pip"])
        target = ["--python", str(venv / "bin" / "python")]
        steps.run("copying pip", [python.command, "-m", "pip", *target, "install", "pip"])


def install_cpu_torch(version: str, steps: Steps) -> None:
    """Install a CPU build of torch from the configured indexes, else from PyTorch's own.

    uv knows the address of PyTorch's index. It reads none of pip's settings, so that only
    torch itself comes through it.
    """
    wanted = version + "+cpu"
    if steps.ask("import importlib.metadata as m; print(m.version('torch'))") == wanted:
        return
    impatient = ["--retries", "1", "--timeout", "15"]
    try:
        steps.pip("installing torch {}".format(wanted), [*impatient, "torch==" + wanted])
    except CommandFailed as failure:
        if not re.search(r"satisfies the requirement torch==", failure.output):
            raise
        if unreachable_because(failure.output) and "(from versions: none)" in failure.output:
            raise
        say("the configured indexes have no torch {}".format(wanted))
        steps.pip("installing uv, which knows PyTorch's own index", ["uv>=0.13,<1"])
        target = ["--python", str(steps.log.parent / "bin" / "python"), "--no-deps"]
        torch = ["--torch-backend", "cpu", "torch==" + version]
        uv = [str(steps.log.parent / "bin" / "uv"), "pip", "install", *target, *torch]
        steps.run("installing torch {} from PyTorch's CPU index".format(wanted), uv)


def install(project: Project, extra: str, test: bool, options: argparse.Namespace) -> None:
    """Bring ``.venv`` to what is wanted; return at once where it is that already."""
    venv = project.root / ".venv"
    commands = [options.python] if options.python else [sys.executable, *FALLBACK_PYTHONS]
    named = tuple(probe(options.python).get("version", ())[:2]) if options.python else ()
    version = named or venv_version(venv)
    wanted = {
        "extra": extra,
        "test": test,
        "python": list(version),
        "pyproject": project.digest,
        "path": str(venv),
    }  # type: Dict[str, Any]
    if is_current(venv, wanted):
        return
    problem = missing_wheel(
        extra, platform.system(), platform.machine(), platform.libc_ver(), read_cpu_flags()
    )
    if problem:
        raise CannotInstall(problem)

    lock = Lock(venv)
    if is_current(venv, wanted):
        return
    steps = Steps(venv, lock)
    started = time.monotonic()
    stale = stale_because(venv, version, extra, project, lock.cut_short)
    try:
        if stale:
            python = choose_python(commands, project)
            needed = DISK_GIB[extra] if options.disk_gib is None else (options.disk_gib, 0.0)
            check_disk(venv, needed)
            say(stale)
            make_venv(venv, python, steps)
            wanted["python"] = list(python.version[:2])
        if extra == "cpu":
            install_cpu_torch(project.torch, steps)
        pins = venv / "constraints.txt"
        pins.write_text("torch=={}+cpu\n".format(project.torch) if extra == "cpu" else "")
        title = "installing vLLM and the server ({} extra{})".format(extra, ", tests" * test)
        target = ".[{}]".format(",".join([extra, *(["test"] * test)]))
        steps.pip(title, ["--constraint", str(pins), "--editable", target])
    except CommandFailed as failure:
        where = "Python {}.{} on {}".format(*wanted["python"], platform.machine())
        raise CannotInstall(
            "{} (log: {})".format(explain(failure.output, where), steps.log)
        ) from failure
    (venv / "installed.json").write_text(json.dumps(wanted) + "\n")
    say("installed in {:.0f} s".format(time.monotonic() - started))


def main(arguments: Optional[List[str]] = None) -> int:
    """Install and return the exit status."""
    parser = argparse.ArgumentParser(description="Install this project into .venv.")
    parser.add_argument("--extra", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--test", action="store_true", help="the test tools too")
    parser.add_argument("--python", help="the interpreter to make .venv with")
    parser.add_argument("--root", type=Path, default=ROOT, help="where pyproject.toml is")
    parser.add_argument("--disk-gib", type=float, help="free space to ask for")
    options = parser.parse_args(arguments)
    extra = options.extra
    if extra == "auto":
        extra = "gpu" if has_nvidia_gpu() else "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install(read_project(options.root.resolve()), extra, options.test, options)
    except CannotInstall as error:
        print("error: {}".format(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next run continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
