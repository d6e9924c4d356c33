"""Who is worked on now, who waits and who is sent away: bounds over all requests, fair to keys.

A request takes a place before anything is fetched for it and keeps it to the end of its answer;
what its pictures and videos cost is added once their headers are known, before they are decoded.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from qwen2vl_serve.errors import Overloaded, RateLimited

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


class Bodies:
    """A bound on the bytes of all bodies together, which come whether they are wanted or not.

    Those of a key that has a name hold at most ``share``, so that others find room as well.
    """

    def __init__(self, capacity: int, share: int) -> None:
        self.capacity = capacity
        self.share = share
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """How many bytes are held."""
        return self._held.total()

    def take(self, key: str, size: int) -> None:
        """Hold ``size`` bytes more for ``key``.

        Raises:
            Refused: there is no room for them.
            RateLimited: the key would hold more than one may.
        """
        held = self.held
        if held + size > self.capacity:
            text = f"The server holds {held} bytes of requests already"
            raise Refused("bytes", text, "limits.max_held_body_bytes")
        if key and self._held[key] + size > self.share:
            raise RateLimited(
                f"The requests of this key hold {self._held[key]} bytes already, and those of one "
                f"key at most {self.share} (half of limits.max_held_body_bytes): wait for an "
                "answer.",
                retry_after=1,
            )
        self._held[key] += size

    def give_back(self, key: str, size: int) -> None:
        """Hold ``size`` less for ``key``."""
        self._held[key] -= size
        if not self._held[key]:
            del self._held[key]


class Admission:
    """The places of one kind of request.

    At most ``most`` answers are worked on at once, with at most ``most_tokens`` visual tokens,
    and ``most_starting`` of those that are streamed (None: any number) have no token yet;
    ``max_waiting`` requests wait for that, each at most ``seconds``: who would wait for longer, as
    fast as places become free at present, is refused at once. ``limit`` is the profile's field
    that says ``most``. ``refused`` is told the reason and the limit of every refusal, ``waited``
    the seconds of every wait.
    """

    def __init__(
        self,
        most: int,
        most_tokens: int = 1,
        max_waiting: int = 0,
        seconds: float = 0.0,
        *,
        limit: str = "",
        refused: Callable[[str, str], object] = lambda *_: None,
        waited: Callable[[float], object] = lambda _: None,
    ) -> None:
        self.places = Line(most, max_waiting, limit=limit)
        # Whoever waits for tokens has a place, so that there are never many. They become free as
        # places do.
        self.tokens = Line(most_tokens, limit="limits.max_visual_tokens", rate=self.places.rate)
        self.starts = Line(sys.maxsize, limit="limits.max_starting")
        self.seconds = seconds
        self._refused = refused
        self._waited = waited

    @property
    def waiting(self) -> int:
        """How many requests wait: for a place, for their visual tokens, or to start."""
        return self.places.waiting + self.tokens.waiting + self.starts.waiting

    def resize(
        self,
        most: int,
        most_tokens: int,
        max_waiting: int,
        seconds: float,
        most_starting: int | None = None,
    ) -> None:
        """Take other bounds from now on; what is worked on already goes on."""
        self.places.capacity, self.tokens.capacity = most, most_tokens
        self.starts.capacity = sys.maxsize if most_starting is None else most_starting
        self.places.max_waiting, self.seconds = max_waiting, seconds
        for line in (self.places, self.tokens, self.starts):
            line.admit()

    def require_room(self, key: str) -> None:
        """Return if a request of ``key`` would get a place or a turn, were it here already.

        Raises:
            Overloaded: it would be refused, so that its body need not be read.
        """
        if not self.places.has_room(1):
            refusal = self._refusal(self.places, key, self.seconds)
            if refusal is not None:
                raise self.overloaded(refusal)

    async def place(self, key: str, answers: int = 1) -> Place:
        """Wait for a place for that many answers to one request of ``key``.

        Raises:
            Overloaded: there is none, and too many wait or the wait was too long.
        """
        place = Place(self, key)
        if self.places.has_room(answers):
            if not self.tokens.waiting:
                self.places.rate.free()
            place.answers = await self.places.enter(key, answers, 0.0)
        else:
            place.answers = await self._wait(self.places, place, answers)
        return place

    async def weigh(self, place: Place, tokens: int) -> int:
        """Wait until that many visual tokens may be worked on; see ``Place.weigh``."""
        if self.tokens.has_room(tokens):
            return await self.tokens.enter(place.key, tokens, 0.0)
        return await self._wait(self.tokens, place, tokens)

    async def start(self, place: Place) -> None:
        """Wait until one more answer may be without a token; see ``Place.start``."""
        if self.starts.has_room(1):
            self.starts.rate.free()
            await self.starts.enter(place.key, 1, 0.0)
        else:
            await self._wait(self.starts, place, 1)

    async def _wait(self, line: Line, place: Place, size: int) -> int:
        line.rate.full()
        begun = time.monotonic()
        left = max(self.seconds - place.waited, 0.0)
        try:
            if (refusal := self._refusal(line, place.key, left)) is not None:
                raise refusal
            return await line.enter(place.key, size, left)
        except Refused as refusal:
            raise self.overloaded(refusal, line) from None
        finally:
            seconds = time.monotonic() - begun
            place.waited += seconds
            self._waited(seconds)

    def _refusal(self, line: Line, key: str, most: float) -> Refused | None:
        """Return why a request of ``key`` may not wait for ``most`` seconds; None if it may."""
        return line.refusal(key) or line.slow(key, most, self.seconds)

    def overloaded(self, refusal: Refused, line: Line | None = None) -> Overloaded:
        """Return the error that tells of a refusal, and count it.

        ``line`` is what it waited for, places unless given.
        """
        self._refused(refusal.reason, refusal.limit)
        line = line or self.places
        line.rate.full()
        seconds = line.rate.retry_after(line.waiting + 1)
        return Overloaded(
            f"{refusal.text}: try again in {seconds} s.",
            retry_after=seconds,
        )


class Place:
    """One request's place, to be left exactly once however the request ends."""

    __slots__ = ("_admission", "_left", "answers", "key", "starting", "tokens", "waited")

    def __init__(self, admission: Admission, key: str) -> None:
        self._admission = admission
        self._left = False
        self.key = key
        self.answers = 0
        self.tokens = 0
        self.starting = False
        self.waited = 0.0

    async def weigh(self, tokens: int) -> None:
        """Wait until that many visual tokens may be worked on as well; once a place.

        Raises:
            Overloaded: the wait was too long.
        """
        if tokens:
            self.tokens = await self._admission.weigh(self, tokens)

    async def start(self) -> None:
        """Wait until the answer may be begun with; once a place.

        Raises:
            Overloaded: the wait was too long.
        """
        await self._admission.start(self)
        self.starting = True

    def begun(self) -> None:
        """Let another answer start, as this one has a token; further calls do nothing."""
        if self.starting:
            self.starting = False
            self._admission.starts.rate.ended()
            self._admission.starts.leave(1)

    def leave(self) -> None:
        """Give everything back; further calls do nothing."""
        if self._left:
            return
        self._left = True
        self.begun()
        admission = self._admission
        admission.places.rate.ended()
        admission.places.leave(self.answers)
        if self.tokens:
            admission.tokens.leave(self.tokens)
