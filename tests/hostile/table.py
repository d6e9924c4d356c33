"""What a run has found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.hostile.case import Outcome


@dataclass(frozen=True)
class Result:
    """A case's outcome at one server; ``compared`` is False where each may decide otherwise."""

    group: str
    name: str
    outcome: Outcome
    compared: bool


@dataclass
class Run:
    """All results at one server, and the cases that were left out with the reason."""

    server: str
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def of(self, group: str, compared: bool = False) -> list[Result]:
        """Return a class's results, of all classes for an empty letter."""
        return [
            one
            for one in self.results
            if group in ("", one.group) and (one.compared or not compared)
        ]

    @property
    def failures(self) -> list[Result]:
        return [one for one in self.results if one.outcome.wrong]


def safe(results: Sequence[Result]) -> int:
    """Return how many are safe."""
    return sum(one.outcome.unsafe is None for one in results)


def exact(results: Sequence[Result]) -> int:
    """Return how many are as this project promises, to the code of the error."""
    return sum(one.outcome.wrong is None for one in results)


def rows(titles: dict[str, str], runs: Sequence[Run]) -> list[list[str]]:
    """Return the table's head and a row a class, the last one of all.

    Per server: cases that are as promised (of the first one alone), and safe ones among those that
    are compared.
    """
    first = runs[0]
    head = ["", "class", "cases", f"{first.server}: as promised", "compared"]
    found = [[*head, *(f"{run.server}: safe" for run in runs)]]
    for letter, title in [*titles.items(), ("", "all")]:
        every = first.of(letter)
        if not every:
            continue
        compared = {(one.group, one.name) for run in runs for one in run.of(letter, compared=True)}
        row = [letter, title, str(len(every)), str(exact(every)), str(len(compared))]
        for run in runs:
            mine = run.of(letter, compared=True)
            row.append(str(safe(mine)) if mine else "–")
        found.append(row)
    return found


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return the table for the README."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|" + " --- |" * len(table[0]))
    return "\n".join(lines)
