"""What a key may use in a minute: counted at the door, reserved before and settled after.

Minutes are the clock's: each minute has counters of its own, so that processes that share them
need nothing but an atomic addition, and a reservation is given back to the minute it was taken
from. Counting first and taking back what was too much never admits more than the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from limits.errors import ConfigurationError, StorageError
from limits.storage import Storage, storage_from_string

from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.auth.quota_sqlite import SQLiteStorage  # makes sqlite: an address of a storage
from qwen2vl_serve.engine import Usage
from qwen2vl_serve.errors import (
    APIError,
    EngineUnavailable,
    PreflightError,
    QuotaUnavailable,
    RateLimited,
)
from qwen2vl_serve.profile import shown_storage

logger = logging.getLogger("qwen2vl_serve.requests")

MINUTE = 60
KEPT_SECONDS = 2 * MINUTE
"""How long a minute's counter is kept: reservations of its last second are given back later."""

ANSWER_SECONDS = 5.0
"""How long a storage may keep a request waiting; longer than it waits for a held file."""

SOCKET_SECONDS = 2.0
"""How long a Redis may take to connect, and then to answer, unless its address says otherwise.

Both fit into ``ANSWER_SECONDS``; a thread that waits for ever would keep the process from its end.
"""

# OpenAI's names in x-ratelimit-… headers and the fields of KeyLimits, in the order of checks.
UNITS = {
    "requests": "requests_per_minute",
    "tokens": "tokens_per_minute",
    "visual-tokens": "visual_tokens_per_minute",
}

_T = TypeVar("_T")


class Visit:
    """One request of a caller; as it stands, that of one without limits."""

    metered = False
    """Whether tokens are counted, so that somebody must say how many there were."""

    async def reserve(self, tokens: int, visual_tokens: int) -> None:
        """Take what the request is going to use; raises ``RateLimited`` when it is not there."""

    def settle_by(self, usage: Usage) -> None:
        """Take what the engine will have told by the visit's end for what was really used."""

    def used(self, tokens: int, visual_tokens: int | None = None) -> None:
        """Say what it has really used; settled when the visit ends."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's ``x-ratelimit-…`` headers, as of the last count."""
        return []


UNLIMITED = Visit()


class Quotas:
    """The counts of all limited keys, in the storage of an address of ``limits``.

    ``concurrent`` is counted by each process for itself: what a killed one had counted would
    never be freed. The storage is opened by the first limited visit, or by ``open``.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.inside: Counter[str] = Counter()
        self._address = address
        self._storage: Storage | None = None
        # A server, or a file that another process holds, makes it wait; the event loop must not.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quota")

    def open(self) -> Storage:
        """Open the storage; raises ``PreflightError`` when it cannot be used."""
        if self._storage is None:
            place = shown_storage(self._address)
            bounds = {"socket_timeout": SOCKET_SECONDS} if self._address.startswith("redis") else {}
            try:
                storage = storage_from_string(self._address, wrap_exceptions=True, **bounds)
                if not isinstance(storage, Storage) or not storage.check():
                    raise PreflightError(f"server.quota_storage: {place} does not answer")
            except ValueError as error:  # it repeats parts of the address
                told = str(error) if place == self._address else "it is no address"
                raise PreflightError(f"server.quota_storage: cannot use {place}: {told}") from None
            except (ConfigurationError, StorageError, OSError) as error:
                raise PreflightError(f"server.quota_storage: cannot use {place}: {error}") from None
            except Exception as error:
                raise PreflightError(
                    f"server.quota_storage: cannot use {place} ({type(error).__name__})"
                ) from None
            self._storage = storage
        return self._storage

    @contextlib.asynccontextmanager
    async def visit(self, caller: Caller, state: MutableMapping[str, Any]) -> AsyncIterator[Visit]:
        """Count a request from its head to its answer's end; its refusal costs no tokens.

        One that the server could not serve (503) costs nothing: another replica may be asked.

        The visit is put into ``state`` first, so that a refusal tells what is left as well.

        Raises:
            RateLimited: the key has used up its requests, or has as many under way as it may.
            QuotaUnavailable: nothing can be counted.
        """
        if caller.limits is None:
            yield UNLIMITED
            return
        state["visit"] = visit = LimitedVisit(self, caller)
        try:
            with self._inside(caller.quota, caller.limits.concurrent):
                await visit.enter()
                yield visit
        except APIError as error:
            visit.used(0, 0)
            if isinstance(error, EngineUnavailable):
                visit.unserved()
            raise
        finally:
            await visit.leave()

    @contextlib.contextmanager
    def _inside(self, key: str, most: int | None) -> Iterator[None]:
        """Count one of at most that many; without a limit nobody is in another's way."""
        if most is None:
            yield
            return
        if self.inside[key] >= most:
            raise RateLimited(
                f"This key may have {most} requests under way at a time, and has; wait for one.",
                retry_after=1,
            )
        self.inside[key] += 1
        try:
            yield
        finally:
            self.inside[key] -= 1
            if not self.inside[key]:
                del self.inside[key]

    async def counted(self, count: Callable[[Storage], _T], *, in_order: bool = False) -> _T:
        """Run ``count`` on the storage: at once where that takes microseconds, else in a thread.

        With ``in_order`` always in the thread, and so behind everything that is there already.
        """

        def run() -> _T:
            storage = self.open()
            if not isinstance(storage, SQLiteStorage):
                return count(storage)
            with storage.turn():
                return count(storage)

        try:
            # Not yet open, it is none; a server that must be reached is opened in the thread.
            if isinstance(self._storage, SQLiteStorage) and not in_order:
                with contextlib.suppress(TimeoutError), self._storage.turn(0):
                    return count(self._storage)
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except (RateLimited, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.error("quotas cannot be counted: %s: %s", type(error).__name__, error)
            raise QuotaUnavailable(
                "The use of this key cannot be counted at the moment; try again shortly."
            ) from None


class LimitedVisit(Visit):
    """One request of a key with limits."""

    def __init__(self, quotas: Quotas, caller: Caller) -> None:
        self._quotas = quotas
        self._key = caller.quota
        self._limits = {
            unit: limit
            for unit, field in UNITS.items()
            if (limit := getattr(caller.limits, field)) is not None
        }
        self._counts = dict.fromkeys(self._limits, 0)
        self._reserved: dict[str, dict[float, int]] = {unit: {} for unit in self._limits}
        self._used: dict[str, int] = {}
        self._usage = Usage()
        self._minute = self._now = 0.0
        self._asked = self._reserving = False
        self.metered = "tokens" in self._limits or "visual-tokens" in self._limits

    async def enter(self) -> None:
        """Count the request itself."""

        def count(storage: Storage) -> None:
            if "requests" in self._limits:
                self._take(storage, "requests", 1)
                self._reserved["requests"][self._minute] = 1
            for unit in self._limits:
                if unit != "requests":
                    self._counts[unit] = storage.get(self._counter(unit, self._minute))

        await self._counted(count)

    async def reserve(self, tokens: int, visual_tokens: int) -> None:
        """Take what the request is going to use; raises ``RateLimited`` when it is not there."""
        costs = {"tokens": tokens, "visual-tokens": visual_tokens}
        wanted = {unit: cost for unit, cost in costs.items() if unit in self._limits}
        if not wanted:
            return
        self._asked = self._reserving = True

        def count(storage: Storage) -> None:
            taken: dict[str, int] = {}
            for unit, cost in wanted.items():
                try:
                    self._take(storage, unit, cost)
                except RateLimited:
                    for other, back in taken.items():
                        self._add(storage, other, -back)
                    raise
                taken[unit] = cost
            for unit, cost in taken.items():
                minutes = self._reserved[unit]
                minutes[self._minute] = minutes.get(self._minute, 0) + cost

        await self._counted(count)
        self._reserving = False

    def settle_by(self, usage: Usage) -> None:
        """Take what the engine will have told by the visit's end for what was really used."""
        self._usage = usage

    def used(self, tokens: int, visual_tokens: int | None = None) -> None:
        """Say what it has really used; settled when the visit ends."""
        self._used["tokens"] = tokens
        if visual_tokens is not None:
            self._used["visual-tokens"] = visual_tokens

    def unserved(self) -> None:
        """Give the request itself back when the visit ends."""
        if self._reserved.get("requests"):
            self._asked = True
            self._used["requests"] = 0

    async def leave(self) -> None:
        """Settle what was reserved with what was used.

        What was too much goes back to the minute it came from, of several to the oldest first.
        What was too little is taken from the present one, even beyond the limit: it has been used.
        """
        if not self._asked:
            return

        prompt, completion = self._usage.prompt_tokens, self._usage.completion_tokens
        if prompt is not None and completion is not None:
            self._used.setdefault("tokens", prompt + completion + self._usage.summary_tokens)

        def settle(storage: Storage) -> None:
            for unit, minutes in self._reserved.items():
                reserved = sum(minutes.values())
                unused = reserved - self._used.get(unit, reserved)
                now = self._quotas.clock() // MINUTE
                for minute, most in ({now: unused} if unused < 0 else minutes).items():
                    back = min(unused, most)
                    if back:
                        self._add(storage, unit, -back, minute)
                    unused -= back

        with contextlib.suppress(QuotaUnavailable):  # it is in the log, and the answer is out
            # A client that left may have left a reservation to the thread that is not made yet.
            await self._quotas.counted(settle, in_order=self._reserving)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's ``x-ratelimit-…`` headers, as of the last count."""
        reset = b"%ds" % self._seconds_left()
        found = []
        for unit, limit in self._limits.items():
            name = unit.encode()
            left = max(limit - self._counts[unit], 0)
            found += [
                (b"x-ratelimit-limit-" + name, b"%d" % limit),
                (b"x-ratelimit-remaining-" + name, b"%d" % left),
                (b"x-ratelimit-reset-" + name, reset),
            ]
        return found

    async def _counted(self, count: Callable[[Storage], None]) -> None:
        self._now = self._quotas.clock()
        self._minute = self._now // MINUTE
        await self._quotas.counted(count)

    def _take(self, storage: Storage, unit: str, cost: int) -> None:
        """Add ``cost``, or take it back and raise ``RateLimited`` where that is too much."""
        limit = self._limits[unit]
        if self._add(storage, unit, cost) <= limit:
            return
        self._add(storage, unit, -cost)
        noun = unit.replace("-", " ")
        wait = self._seconds_left()
        if cost > limit:
            text = (
                f"This key may use {limit} {noun} a minute; this request alone takes {cost}, the "
                "answer it asks for included: make it smaller, or lower max_tokens."
            )
        else:
            left = max(limit - self._counts[unit], 0)
            text = (
                f"This key may use {limit} {noun} a minute; {left} are left and this request takes "
                f"{cost}. Try again in {wait} s."
            )
        error = RateLimited(text, retry_after=wait)
        error.hopeless = cost > limit
        raise error

    def _add(self, storage: Storage, unit: str, amount: int, minute: float | None = None) -> int:
        """Add to the present minute unless another is given; headers tell of the present one."""
        minute = self._minute if minute is None else minute
        count = storage.incr(self._counter(unit, minute), KEPT_SECONDS, amount)
        if minute == self._minute:
            self._counts[unit] = count
        return count

    def _counter(self, unit: str, minute: float) -> str:
        return f"qwen2vl/{self._key}/{unit}/{minute:.0f}"

    def _seconds_left(self) -> int:
        return math.ceil((self._minute + 1) * MINUTE - self._now) or 1
