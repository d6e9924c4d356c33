"""What a flood did to a server, beside the same server without one, and the goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GOODPUT, FIRST_TOKEN, REFUSAL_SECONDS = 0.95, 3.0, 0.05
"""The goals: at least, at most, and at most at the 99th percentile."""


@dataclass(frozen=True)
class Calm:
    """Without flood: seconds to the first token of a single client, answers a second at most.

    ``clients`` is the number at once that got the most.
    """

    first_p50: float | None
    first_p99: float | None
    capacity: float
    clients: int


@dataclass(frozen=True)
class Flood:
    """In the flood; rates a second, times in seconds, memory in bytes; None where there was none.

    ``goodput`` counts the whole answers that ended while it lasted and the server was full.
    ``answered``, ``refused``, ``gave_up`` and ``failed`` sum up to what was sent.
    ``client_cpu`` and ``api_cpu`` are shares of a core, ``late_p99`` is by how much requests
    were sent after their time, ``after`` the time to the first token of the first request after
    it. ``paused`` is how long the machine stood still, which no rate counts, and ``set_aside``
    the number of times that a pause had met.
    """

    offered: float
    goodput: float
    answered: int
    refused: int
    gave_up: int
    failed: int
    first_p50: float | None
    first_p99: float | None
    refusal_p50: float | None
    refusal_p99: float | None
    rss_before: int
    rss_peak: int
    rss_after: int
    client_cpu: float
    api_cpu: float
    late_p99: float | None
    after: float | None
    paused: float = 0.0
    set_aside: int = 0


@dataclass(frozen=True)
class Result:
    """One kind of request on one server."""

    kind: str
    server: str
    calm: Calm
    flood: Flood

    @property
    def goodput(self) -> float:
        """Whole answers in the flood, as a share of the most without."""
        return self.flood.goodput / self.calm.capacity if self.calm.capacity else math.nan

    def times_single(self, seconds: float | None) -> float:
        """Return a time as a multiple of what a single client waits at the 99th percentile."""
        single = self.calm.first_p99
        return math.inf if seconds is None or single is None else seconds / single

    def missed(self) -> list[str]:
        """Return which goals are not reached."""
        told = self.flood.refusal_p99
        goals = {
            "goodput": self.goodput >= GOODPUT,
            "first token": self.times_single(self.flood.first_p99) <= FIRST_TOKEN,
            "refusal": told is None or told <= REFUSAL_SECONDS,
            "as before afterwards": self.times_single(self.flood.after) <= FIRST_TOKEN,
            "whole answers": self.flood.failed == 0,
        }
        return [name for name, reached in goals.items() if not reached]


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that is at least as large as ``share`` of all; None of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * share) - 1, 0)] if ordered else None


Cell = Callable[[Result], str]

_ROWS: Sequence[tuple[str, Cell, str]] = (
    ("capacity, answers/s (clients)", lambda r: f"{r.calm.capacity:.1f} ({r.calm.clients})", ""),
    ("sent, requests/s", lambda r: f"{r.flood.offered:.0f}", ""),
    ("goodput / capacity", lambda r: f"{r.goodput:.2f}", f"≥ {GOODPUT}"),
    (
        "first token of a single client p50, p99, ms",
        lambda r: _ms(r.calm.first_p50, r.calm.first_p99),
        "",
    ),
    (
        "first token in the flood p50, p99, ms",
        lambda r: _ms(r.flood.first_p50, r.flood.first_p99),
        "",
    ),
    (
        "first token p99, flood / single",
        lambda r: f"{r.times_single(r.flood.first_p99):.1f}",
        f"≤ {FIRST_TOKEN:g}",
    ),
    (
        "first token right after the flood, ms",
        lambda r: _ms(r.flood.after),
        f"≤ {FIRST_TOKEN:g} × single",
    ),
    ("answered, refused", lambda r: f"{r.flood.answered}, {r.flood.refused}", ""),
    ("gave up after 10 s, failed", lambda r: f"{r.flood.gave_up}, {r.flood.failed}", "failed 0"),
    (
        "refused within p50, p99, ms",
        lambda r: _ms(r.flood.refusal_p50, r.flood.refusal_p99),
        f"p99 ≤ {REFUSAL_SECONDS * 1000:g}",
    ),
    (
        "API process before, peak, after, MiB",
        lambda r: _mib(r.flood.rss_before, r.flood.rss_peak, r.flood.rss_after),
        "",
    ),
    ("API process, cores", lambda r: f"{r.flood.api_cpu:.2f}", ""),
    ("this client, cores", lambda r: f"{r.flood.client_cpu:.2f}", ""),
    ("sent too late by p99, ms", lambda r: _ms(r.flood.late_p99), ""),
    (
        "the machine stood still, s (times set aside)",
        lambda r: f"{r.flood.paused:.1f} ({r.flood.set_aside})",
        "",
    ),
)


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table: a column for each result, and the goals."""
    lines = [
        ["", *(f"{one.kind}, {one.server}" for one in results), "goal"],
        ["---"] * (len(results) + 2),
        *([name, *map(cell, results), goal] for name, cell, goal in _ROWS),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(*seconds: float | None) -> str:
    return ", ".join("none" if one is None else f"{one * 1000:.0f}" for one in seconds)


def _mib(*sizes: int) -> str:
    return ", ".join(f"{size / 2**20:.0f}" for size in sizes)
