"""Which engine a request goes to: one that knows it, unless that one has too much to do."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qwen2vl_serve.engines.content import Content

OVERHANG = 1.5
"""How much more than its even share of the answers an engine may be given for what it knows.

The bound of consistent hashing with bounded loads: a picture that everybody asks about spreads
over as many engines as it keeps busy.
"""

LEAST_TOKENS = 16
"""A block of the KV cache; of a shorter beginning nothing is kept."""

REMEMBERED = 16_384
"""Turns and media of each engine that are remembered, those last asked about."""


class Router:
    """Counts what each engine has under way and remembers what it was asked."""

    def __init__(self, engines: int, remembered: int = REMEMBERED) -> None:
        self._most = remembered
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(engines)]
        self._answers = [0] * engines
        self._last = [0] * engines
        self._chosen = 0

    def choose(self, content: Content, answers: int, among: Sequence[int]) -> int:
        """Return one ``among`` the engines for a request of so many ``answers``.

        The one that knows most of it, of equal ones that with the fewest answers under way, of
        equal ones again that which was chosen longest ago.
        """
        bound = math.ceil(
            OVERHANG * (sum(self._answers[one] for one in among) + answers) / len(among)
        )
        free = [one for one in among if self._answers[one] < bound]
        chosen = min(
            free, key=lambda one: (-self.known(one, content), self._answers[one], self._last[one])
        )
        self._chosen += 1
        self._last[chosen] = self._chosen
        self._remember(chosen, content)
        return chosen

    def known(self, engine: int, content: Content) -> int:
        """Return about how many tokens of it an engine need not compute again."""
        known = self._known[engine]
        turns = next((tokens for key, tokens in reversed(content.turns) if key in known), 0)
        media = sum(tokens for key, tokens in content.media if key in known)
        return turns + media if turns + media >= LEAST_TOKENS else 0

    @contextmanager
    def under_way(self, engine: int, answers: int) -> Iterator[None]:
        """Count answers while they are under way."""
        self._answers[engine] += answers
        try:
            yield
        finally:
            self._answers[engine] -= answers

    def forget(self, engine: int) -> None:
        """Take note that a new engine stands in the place of one, with empty caches."""
        self._known[engine].clear()

    def _remember(self, engine: int, content: Content) -> None:
        known = self._known[engine]
        for key in content.keys:
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._most:
            known.popitem(last=False)
