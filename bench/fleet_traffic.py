"""What users do: conversations about pictures, as requests at times that nobody's answers shift."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Habits:
    """How users behave; times in seconds.

    ``conversations`` begin in a second, at random (Poisson) times. Each has ``turns`` on average
    (geometric), ``pause`` apart on average (exponential, at least a second), and shows one picture:
    with the chance ``popular`` one of ``catalogue`` that many show, by Zipf's law, else its own.
    """

    conversations: float
    turns: float = 3.0
    pause: float = 20.0
    popular: float = 0.2
    catalogue: int = 1000

    @classmethod
    def of_users(cls, users_a_day: float, peak: float, **others: float | int) -> Habits:
        """Return habits at the busiest time of users who come once a day each.

        ``peak`` is that time's rate over the mean.
        """
        return cls(users_a_day / DAY_SECONDS * peak, **others)  # type: ignore[arg-type]  # fields of both types

    @property
    def requests(self) -> float:
        """Requests a second."""
        return self.conversations * self.turns


@dataclass(frozen=True, slots=True)
class Request:
    """At ``at`` seconds somebody asks about the picture ``key``."""

    at: float
    key: str


def trace(habits: Habits, seconds: float, seed: int = 1) -> Sequence[Request]:
    """Return the requests of so many seconds, in their order.

    The first ones belong to conversations that began before, so that it is busy from the start.
    """
    rng = random.Random(seed)  # noqa: S311  (not for secrets)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, habits.catalogue + 1)))
    # A conversation that began earlier than this has ended but for one in a thousand.
    before = habits.pause * habits.turns * math.log(1000)
    found: list[Request] = []
    start, number = -before, 0
    while (start := start + rng.expovariate(habits.conversations)) < seconds:
        number += 1
        key = f"own-{number}"
        if rng.random() < habits.popular:
            key = f"shared-{bisect.bisect(weights, rng.random() * weights[-1])}"
        found += (Request(at, key) for at in _turns(habits, start, rng) if 0 <= at < seconds)
    return sorted(found, key=lambda request: request.at)


def _turns(habits: Habits, start: float, rng: random.Random) -> Iterator[float]:
    at = start
    while True:
        yield at
        if rng.random() >= 1 - 1 / habits.turns:
            return
        at += 1.0 + rng.expovariate(1 / max(habits.pause - 1.0, 1e-9))
