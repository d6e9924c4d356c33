"""Examples of a hypothesis strategy, outside of a test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy

_Example = TypeVar("_Example", bound=Hashable)


def drawn(strategy: SearchStrategy[_Example], count: int, number: int) -> Sequence[_Example]:
    """Return about ``count`` examples, none twice; equal numbers give equal ones.

    Raises ``Unsatisfiable`` where the strategy gives none at all.
    """
    made: list[_Example] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: _Example) -> None:
        made.append(example)

    try:
        draw()
    except Unsatisfiable:  # few of many attempts passed its filters
        if not made:
            raise
    return list(dict.fromkeys(made))
