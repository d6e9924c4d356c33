"""What ``.venv`` holds, and whether somebody is changing it."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from bootstrap.machine import PythonRange


class Installed(NamedTuple):
    """One state of ``.venv``: equal states need no installation."""

    extra: str
    test: bool
    python: str  # as 3.11
    pyproject: str  # SHA-256
    path: str  # scripts in .venv hold its path: a folder that was moved is another state


def read_installed(venv: Path) -> Optional[Installed]:
    """Return what the last complete installation left; None when there is none to rely on."""
    try:
        found = Installed(**json.loads((venv / "installed.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if (venv / "bin" / "python").exists() else None


def write_installed(venv: Path, state: Installed) -> None:
    """Note a complete installation."""
    (venv / "installed.json").write_text(json.dumps(state._asdict(), indent=1) + "\n")


def satisfies(found: Optional[Installed], wanted: Installed) -> bool:
    """Tell whether nothing is left to do; the test tools may be there unasked."""
    return found is not None and wanted in (found, found._replace(test=False))


def venv_python(venv: Path) -> str:
    """Return the Python version of a virtual environment as 3.11; empty when it is unusable."""
    try:
        config = (venv / "pyvenv.cfg").read_text()
    except OSError:
        return ""
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", config, re.MULTILINE)
    return found.group(1) if found and (venv / "bin" / "python").exists() else ""


def stale_because(
    venv: Path, wanted: Installed, accepted: PythonRange, cut_short: bool
) -> Optional[str]:
    """Say why ``.venv`` has to be made anew, or None when it can be brought up to date."""
    if not venv.exists():
        return "first installation: this takes some minutes, a second run takes none"
    if cut_short:
        return "the last installation was cut short: starting afresh"
    python = venv_python(venv)
    if not python or not accepted.holds(_numbers(python)):
        return ".venv holds no Python that fits: starting afresh"
    if python != wanted.python:
        return f".venv holds Python {python}: starting afresh with {wanted.python}"
    found = read_installed(venv) or wanted
    if (found.extra, found.path) != (wanted.extra, wanted.path):
        return f".venv was made for EXTRA={found.extra} in {found.path}: starting afresh"
    return None


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(map(int, version.split(".")))


class Lock:
    """One installation at a time, and a note when one was cut short.

    The file beside ``.venv`` is empty while ``.venv`` is sound and names the process that is
    changing it otherwise. pip inherits the descriptor, so that the lock outlives a killed
    parent until pip has ended too.
    """

    def __init__(self, venv: Path) -> None:
        self._stamp = venv / "installed.json"
        self._file = venv.with_name(venv.name + ".lock").open("a+")

    def acquire(self) -> bool:
        """Take the lock if it is free and tell whether it was."""
        import fcntl  # Windows has none, and is refused before

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def wait(self) -> None:
        """Take the lock as soon as it is free."""
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_EX)

    @property
    def cut_short(self) -> bool:
        """Whether the last holder ended while it was changing ``.venv``."""
        self._file.seek(0)
        return bool(self._file.read())

    def fileno(self) -> int:
        """Return the descriptor to hand to child processes."""
        return self._file.fileno()

    def mark(self, changing: bool) -> None:
        """Note on disk whether ``.venv`` may be half changed from now on."""
        self._file.seek(0)
        self._file.truncate()
        if changing:
            if self._stamp.exists():
                self._stamp.unlink()
            self._file.write(f"process {os.getpid()} is changing .venv\n")
        self._file.flush()
