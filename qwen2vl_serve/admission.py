"""Who is worked on now, who waits and who is sent away: bounds over all requests, fair to keys.

A request takes a place before anything is fetched for it and keeps it to the end of its answer;
what its pictures and videos cost is added once their headers are known, before they are decoded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qwen2vl_serve.errors import Overloaded
from qwen2vl_serve.line import Line, Refused


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
