"""Whether memory grows: a straight line through what a process held, and how sure it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP_SHARE = 0.4
"""Of each life; caches fill and every thread's heap grows once."""

FEWEST = 10
"""Samples of a life after that, without which it says nothing."""

_CONFIDENCE = 1.96


@dataclass(frozen=True)
class Slope:
    """Growth of a process in bytes a second, one in all its lives; ``low`` to ``high`` at 95 %.

    ``noise`` is the standard deviation around the line in bytes, ``seconds`` the longest span that
    the line was drawn through.
    """

    per_second: float
    low: float
    high: float
    noise: float
    seconds: float
    samples: int

    @property
    def flat(self) -> bool:
        """Whether there is no rise, or none beyond the noise: unsure, or below twice that."""
        return self.low <= 0 or self.per_second * self.seconds <= 2 * self.noise


def slope(lives: Sequence[Sequence[tuple[float, float]]]) -> Slope | None:
    """Fit one slope to (seconds, bytes) of several lives; None where there are too few.

    Each life has a level of its own. Samples that follow each other are alike, so that they count
    as fewer: by their correlation with the one before.
    """
    later = [_after_warm_up(life) for life in lives]
    kept = [life for life in later if len(life) >= FEWEST]
    if not kept:
        return None
    centred = [_centred(life) for life in kept]
    squares = sum(t * t for life in centred for t, _ in life)
    if squares == 0:
        return None
    per_second = sum(t * y for life in centred for t, y in life) / squares
    residuals = [[y - per_second * t for t, y in life] for life in centred]
    count = sum(map(len, kept))
    total = sum(r * r for life in residuals for r in life)
    following = sum(a * b for life in residuals for a, b in itertools.pairwise(life))
    alike = min(max(following / total, 0.0), 0.99) if total else 0.0
    degrees = max(count * (1 - alike) / (1 + alike) - len(kept) - 1, 1.0)
    error = math.sqrt(total / degrees / squares)
    return Slope(
        per_second,
        per_second - _CONFIDENCE * error,
        per_second + _CONFIDENCE * error,
        math.sqrt(total / count),
        max(life[-1][0] - life[0][0] for life in kept),
        count,
    )


def _after_warm_up(life: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if not life:
        return life
    begin = life[0][0] + WARM_UP_SHARE * (life[-1][0] - life[0][0])
    return [one for one in life if one[0] >= begin]


def _centred(life: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    time = sum(t for t, _ in life) / len(life)
    size = sum(y for _, y in life) / len(life)
    return [(t - time, y - size) for t, y in life]
