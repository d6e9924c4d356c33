"""A line in front of what is bounded: fair to keys, with an end to every wait.

``Line`` lets in whoever is next and fits; ``DrainRate`` foresees how long that will take.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MOST_SECONDS = 300
"""Nobody is sent away for longer, however slowly places become free."""

_UNFORESEEN_SECONDS = 0.1
"""A wait that is probably no longer is tried: places become free several at a time."""

_MEMORY_SECONDS = 30.0
"""After so long an end counts a third in the moving average."""


class Refused(Exception):
    """No place; ``text`` says it to the client, ``reason`` and ``limit`` are labels of the metric.

    ``limit`` is the profile's field that it is the bound of, empty where there is none.
    """

    def __init__(self, reason: str, text: str, limit: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.text = f"{text} ({limit})" if limit else text
        self.limit = limit


@dataclass(slots=True, eq=False)
class _Waiter:
    key: str
    size: int
    turn: asyncio.Future[None]


class Line:
    """Grants parts of ``capacity``, first to whoever comes, then to the keys that wait in turn.

    Of one key the oldest goes first. Whoever is next and does not fit yet holds up all others, so
    that small requests do not keep a large one waiting for ever; what is larger than the whole
    capacity passes alone. For one event loop.

    At most ``max_waiting`` wait. A newcomer to a full line takes the place of the newest of the
    key that has the most there, if its own has at least two fewer: a flood displaces itself.

    ``limit`` is the profile's field that sets the capacity, ``rate`` how fast it becomes free.
    """

    def __init__(
        self,
        capacity: int,
        max_waiting: float = math.inf,
        *,
        limit: str = "",
        rate: DrainRate | None = None,
    ) -> None:
        self.limit = limit
        self.rate = rate or DrainRate()
        self.capacity = capacity
        self.max_waiting = max_waiting
        self.held = 0
        self.waiting = 0
        self._lines: dict[str, deque[_Waiter]] = {}  # whose turn is next first; none empty

    def has_room(self, size: int) -> bool:
        """Whether ``enter`` would return at once."""
        return not self.waiting and self.held + min(size, self.capacity) <= self.capacity

    async def enter(self, key: str, size: int, seconds: float | None = None) -> int:
        """Wait until ``size`` fits; return what is to be given to ``leave``.

        Raises:
            Refused: too many wait, the wait took more than ``seconds`` (None: it may take any
                time), or others were fairer.
        """
        if self.has_room(size):
            size = min(size, self.capacity)
            self.held += size
            return size
        if self.waiting >= self.max_waiting:
            self._make_room(key)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(key, size, loop.create_future())
        self._lines.setdefault(key, deque()).append(waiter)
        self.waiting += 1
        late = None
        if seconds is not None:
            late = loop.call_later(seconds, self._expire, waiter, seconds)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                self._forget(waiter)
                self.admit()
            elif waiter.turn.exception() is None:
                # Let in and cancelled at once: what was taken for it goes back.
                self.leave(waiter.size)
            raise
        finally:
            if late is not None:
                late.cancel()
        return waiter.size

    def leave(self, size: int) -> None:
        """Give back what ``enter`` returned."""
        self.held -= size
        if self.waiting:
            self.admit()

    def admit(self) -> None:
        """Let in whoever fits; to be called when ``capacity`` was raised."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            waiter = line[0]
            # Who was cancelled while waiting leaves the line here, before its task has run.
            gone = waiter.turn.done()
            size = min(waiter.size, self.capacity)
            if not gone and self.held + size > self.capacity:
                return
            self._forget(waiter)
            if gone:
                continue
            if line:
                self._lines[key] = self._lines.pop(key)  # the other keys' turn
            waiter.size = size
            self.held += size
            waiter.turn.set_result(None)

    def _forget(self, waiter: _Waiter) -> None:
        line = self._lines.get(waiter.key)
        if line is None or waiter not in line:
            return
        line.remove(waiter)
        self.waiting -= 1
        if not line:
            del self._lines[waiter.key]

    def _expire(self, waiter: _Waiter, seconds: float) -> None:
        self._send_away(
            waiter,
            self._refused(
                "late", f"The request waited {seconds:.3g} s and it was not its turn yet"
            ),
        )
        self.admit()

    def refusal(self, key: str) -> Refused | None:
        """Return why a request of ``key`` may not wait; None if it may."""
        if self.waiting < self.max_waiting or self._longest(key) is not None:
            return None
        return self._full("full")

    def ahead(self, key: str) -> int:
        """Return how many of those that wait have their turn before a newcomer of ``key``."""
        own = len(self._lines.get(key, ()))
        ahead, turns = own, own + 1
        for other, line in self._lines.items():
            if other == key:
                turns = own  # so many have the keys behind it
            else:
                ahead += min(len(line), turns)
        return ahead

    def _make_room(self, key: str) -> None:
        line = self._longest(key)
        if line is None:
            raise self._full("full")
        self._send_away(line[-1], self._full("displaced"))

    def _longest(self, key: str) -> deque[_Waiter] | None:
        """Return the longest line, if it has at least two more than that of ``key``."""
        longest = max(self._lines.values(), key=len, default=None)
        fair = longest is not None and len(longest) >= len(self._lines.get(key, ())) + 2
        return longest if fair else None

    def _full(self, reason: str) -> Refused:
        text = f"The server is full, and {self.waiting} requests wait already"
        return self._refused(reason, text)

    def slow(self, key: str, most: float, bound: float) -> Refused | None:
        """Return why a request of ``key`` need not wait: not for ``most`` of ``bound`` seconds."""
        seconds = self.rate.seconds_until(self.ahead(key) + 1)
        if seconds <= max(most, _UNFORESEEN_SECONDS):
            return None
        return self._refused(
            "slow",
            f"The server is full; the request's turn would come in about {seconds:.2g} s, and "
            f"none waits longer than {bound:g} s",
        )

    def _refused(self, reason: str, text: str) -> Refused:
        return Refused(reason, text, self.limit)

    def _send_away(self, waiter: _Waiter, refusal: Refused) -> None:
        self._forget(waiter)
        if not waiter.turn.done():
            waiter.turn.set_exception(refusal)


class DrainRate:
    """How fast places become free: a moving average of the ends while requests wait or are refused.

    Quiet times do not count, as their ends tell only how many came.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends = 0.0  # each fades with the time since
        self._busy = 0.0  # seconds that have been measured
        self._since: float | None = None  # the last end, or when it became full

    def full(self) -> None:
        """Note that somebody found no place."""
        if self._since is None:
            self._since = self._clock()

    def free(self) -> None:
        """Note that somebody found one at once."""
        self._since = None

    def ended(self) -> None:
        """Note that a request ended."""
        if self._since is None:
            return
        now = self._clock()
        passed = now - self._since
        self._busy += passed
        self._ends = self._ends * math.exp(-passed / _MEMORY_SECONDS) + 1
        self._since = now

    def seconds_until(self, ends: int) -> float:
        """Return after how many seconds that many will probably have ended.

        The longer none has ended, the longer it is. Before the first has, all that is known is
        how long that takes already.
        """
        passed = 0.0 if self._since is None else self._clock() - self._since
        counted = self._ends * math.exp(-passed / _MEMORY_SECONDS)
        measured = -math.expm1(-(self._busy + passed) / _MEMORY_SECONDS) * _MEMORY_SECONDS
        return ends * measured / counted if counted else passed

    def retry_after(self, ends: int) -> int:
        """Return the same in whole seconds, at least 1 and at most ``MOST_SECONDS``."""
        return math.ceil(min(max(self.seconds_until(ends), 1), MOST_SECONDS))
