"""Findings in words for a terminal or a pipe, and as JSON for programs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen2vl_serve.doctor.finding import Finding

LABEL = 9
NAME = 15
UNBROKEN = "\N{NO-BREAK SPACE}"


def as_json(
    profile: str, findings: Sequence[Finding], mended: Path | None, unmended: str | None = None
) -> dict[str, Any]:
    """Return one object: the profile, how many findings are bad, and all of them in order.

    ``mended`` is the copy that was asked for, ``unmended`` why there is none.
    """
    return {
        "profile": profile,
        "fatal": count(findings, "fatal"),
        "warnings": count(findings, "warning"),
        "checks": [
            {
                "check": finding.check,
                "level": finding.level,
                "found": finding.found,
                "why": finding.why,
                "mend": finding.mend,
            }
            for finding in findings
        ],
        "mended": None if mended is None else str(mended),
        "unmended": unmended,
    }


def lines(findings: Sequence[Finding], width: int) -> Iterator[str]:
    """Yield the lines of a report, each check's first one beginning with its level.

    Lines are broken between words at ``width`` columns; a longer path or command stays whole.
    """
    for finding in findings:
        label = f"{finding.level:<{LABEL}}{finding.check:<{NAME}}"
        yield from _wrapped(label, finding.found, width)
        for title, text in (("why:", finding.why), ("mend:", finding.mend)):
            if text:
                yield from _wrapped(f"{'':<{LABEL}}{title:<6}", text, width)


def summary(findings: Sequence[Finding], profile: str) -> str:
    """Return the verdict in one sentence."""
    stopping, warned = count(findings, "fatal"), count(findings, "warning")
    if stopping:
        also = f" and {warned} warn" if warned else ""
        return f"{stopping} of {len(findings)} checks stop profile {profile}{also}."
    if warned:
        return f"Profile {profile} can start; {warned} of {len(findings)} checks warn."
    return f"Profile {profile} can start; all {len(findings)} checks are passed."


def count(findings: Sequence[Finding], level: str) -> int:
    """Count the findings of one level."""
    return sum(finding.level == level for finding in findings)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Break a text between words, but not within a command in backticks."""
    whole = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", UNBROKEN), text)
    wrapped = textwrap.wrap(
        whole,
        width,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(UNBROKEN, " ") for line in wrapped]
