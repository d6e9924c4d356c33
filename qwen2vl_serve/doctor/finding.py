"""What a check found: one type for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen2vl_serve.errors import SetupError

Level = Literal["ok", "warning", "fatal"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's answer.

    ``found`` is what is there. Unless ``level`` is ``ok``, ``why`` says what it leads to and
    ``mend`` names the command or the setting that ends it. ``check`` is the check's name.
    """

    level: Level
    found: str
    why: str = ""
    mend: str = ""
    check: str = ""

    @property
    def line(self) -> str:
        """Fault and remedy in one line, as ``serve`` prints it."""
        return f"{self.found}; {self.mend}" if self.mend else self.found


def ok(found: str) -> Finding:
    """Nothing stands in the way."""
    return Finding("ok", found)


def warning(found: str, why: str, mend: str) -> Finding:
    """The server starts; ``why`` says what may go wrong later."""
    return Finding("warning", found, why, mend)


def fatal(found: str, why: str, mend: str) -> Finding:
    """The server cannot start, or every answer would be wrong."""
    return Finding("fatal", found, why, mend)


def refused(error: SetupError, why: str) -> Finding:
    """A reader's refusal as a finding: these errors say after a semicolon what to do."""
    found, _, mend = str(error).rpartition("; ")
    if not found:
        found, mend = mend, "correct it"
    return fatal(found, why, mend)
