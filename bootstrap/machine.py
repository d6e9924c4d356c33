"""What this machine offers: a Python that fits, a GPU, wheels, disk space."""

import glob
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Tuple

# The oldest C library that every wheel of both extras accepts (llguidance's is the newest).
MIN_GLIBC = (2, 31)

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
    "kind": sys.implementation.name,
    "bits": 8 * struct.calcsize("P"),
    "gil": not sysconfig.get_config_var("Py_GIL_DISABLED"),
    "venv": has("venv"),
    "ensurepip": has("ensurepip"),
    "pip": has("pip"),
}))
"""


class InstallError(Exception):
    """The installation cannot succeed; the message is the one line for the user."""


class PythonRange(NamedTuple):
    """The Python versions that the project accepts: ``oldest <= version < too_new``."""

    oldest: Tuple[int, int]
    too_new: Tuple[int, int]

    def holds(self, version: Tuple[int, ...]) -> bool:
        """Tell whether a version, of two numbers or more, is accepted."""
        return self.oldest <= version[:2] < self.too_new

    def __str__(self) -> str:
        return "Python >= {}.{} and < {}.{}".format(*self.oldest, *self.too_new)


class Interpreter(NamedTuple):
    """A Python that can make ``.venv``."""

    command: str
    version: Tuple[int, ...]
    ensurepip: bool


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


def unfit_because(facts: Dict[str, Any], accepted: PythonRange) -> Optional[str]:
    """Say why an interpreter cannot make ``.venv``, or None when it can."""
    version = tuple(facts["version"])
    text = ".".join(map(str, version))
    if not accepted.holds(version):
        return f"is {text}, too {'old' if version < accepted.oldest else 'new'}"
    if facts["kind"] != "cpython" or facts["bits"] != 64 or not facts["gil"]:
        return "is not a 64-bit CPython with the GIL, the only kind that vLLM has wheels for"
    if not facts["venv"] or not (facts["ensurepip"] or facts["pip"]):
        package = "python{}.{}-venv".format(*version)
        return f"is {text} without pip or venv (Debian: apt install {package})"
    return None


def choose_python(commands: List[str], accepted: PythonRange) -> Interpreter:
    """Return the first interpreter that fits; raise ``InstallError`` when none does."""
    refused = []
    for command in commands:
        facts = probe(command)
        if not facts:
            continue
        reason = unfit_because(facts, accepted)
        if reason is None:
            return Interpreter(command, tuple(facts["version"]), facts["ensurepip"])
        refused.append(f"{command} {reason}")
    found = "; ".join(refused) or f"none of {', '.join(commands)} runs here"
    raise InstallError(
        f"{accepted} is needed, but {found}. Install one, or name it: make … PYTHON=/path/to/python"
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
    extra: str, system: str, cpu: str, libc: Tuple[str, str], flags: FrozenSet[str]
) -> Optional[str]:
    """Say why vLLM has no wheel for such a machine, or None when it has one.

    ``system`` and ``cpu`` as ``platform.system()`` and ``.machine()`` name them, ``libc`` as
    ``platform.libc_ver()`` does, ``flags`` from ``read_cpu_flags``.
    """
    if system != "Linux":
        return f"vLLM has wheels for Linux only, this is {system}: use a container or WSL 2"
    if cpu not in {"x86_64", "aarch64"}:
        return f"vLLM has wheels for x86_64 and aarch64 only, this CPU is {cpu}"
    name, version = libc
    if name != "glibc":
        return f"vLLM has wheels for glibc only, this is {name or 'musl?'}: use a Debian container"
    if tuple(map(int, version.split(".")[:2])) < MIN_GLIBC:
        return "vLLM's wheels need glibc >= {}.{}, this system has {}".format(*MIN_GLIBC, version)
    if extra == "cpu" and cpu == "x86_64" and flags and "avx2" not in flags:
        return "vLLM's CPU wheel needs a CPU with AVX2, this one has none"
    return None


def check_disk(folder: Path, gib: float, temporary_gib: float) -> None:
    """Raise ``InstallError`` unless the folder, and pip's temporary one, have that much space."""
    temporary = Path(tempfile.gettempdir())
    demands = {folder: gib, temporary: temporary_gib}
    if folder.stat().st_dev == temporary.stat().st_dev:
        demands = {folder: gib + temporary_gib}
    for place, needed in demands.items():
        free = shutil.disk_usage(str(place)).free / 2**30
        if free < needed:
            raise InstallError(
                f"disk too full: {place} has {free:.1f} GiB free, the installation needs "
                f"{needed:g} GiB{' (TMPDIR names another place)' if place == temporary else ''}"
            )
