"""A line: bounded, fair to keys, left by whoever is cancelled; and how fast it moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.line import MOST_SECONDS, DrainRate, Line, Refused

KEYS = st.sampled_from("abc")


async def turns(count: int = 5) -> None:
    """Let everybody run who can."""
    for _ in range(count):
        await asyncio.sleep(0)


class Crowd:
    """Requests that enter a line, stay until told to go, and can be cancelled."""

    def __init__(self, line: Line, seconds: float = 60) -> None:
        self.line = line
        self.seconds = seconds
        self.inside: list[tuple[str, int]] = []
        self.granted: list[str] = []
        self.refused: list[str] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.leave: dict[int, asyncio.Event] = {}

    def come(self, key: str, size: int = 1) -> int:
        number = len(self.tasks)
        self.leave[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._stay(number, key, size))
        return number

    async def _stay(self, number: int, key: str, size: int) -> None:
        try:
            held = await self.line.enter(key, size, self.seconds)
        except Refused as refusal:
            self.refused.append(refusal.reason)
            return
        self.granted.append(key)
        self.inside.append((key, number))
        try:
            await self.leave[number].wait()
        finally:
            self.inside.remove((key, number))
            self.line.leave(held)

    async def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        for task in self.tasks.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task


STEPS = st.one_of(
    st.tuples(st.just("come"), KEYS, st.integers(1, 5)),
    st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("resize"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("turn"), st.just(0), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(capacity=st.integers(1, 4), most=st.integers(0, 6), steps=st.lists(STEPS, max_size=40))
def test_any_interleaving_keeps_the_bounds_and_gives_everything_back(
    capacity: int, most: int, steps: list[Any]
) -> None:
    """Arrivals, ends, cancellations and new bounds in any order: nothing is lost or exceeded."""

    async def run() -> None:
        line, largest = Line(capacity, most), capacity
        crowd = Crowd(line)
        for what, first, second in steps:
            before = line.held
            match what:
                case "come":
                    crowd.come(first, second)
                case "leave" if first in crowd.leave:
                    crowd.leave[first].set()
                case "cancel" if first in crowd.tasks:
                    crowd.tasks[first].cancel()
                case "resize":
                    line.capacity, largest = first, max(largest, first)
                    line.admit()
                case "turn":
                    await turns()
            assert 0 <= line.held <= max(line.capacity, before)
            assert line.held <= largest
            assert 0 <= line.waiting <= most
        await turns()
        for event in crowd.leave.values():
            event.set()
        await turns(300)
        # All who stayed have had their turn, without anybody's help.
        assert all(task.done() for task in crowd.tasks.values())
        assert (line.held, line.waiting, crowd.inside, line._lines) == (0, 0, [], {})

    asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(1, 3),
    arrivals=st.lists(st.one_of(KEYS, st.none()), min_size=1, max_size=60),
)
def test_while_a_key_waits_no_other_is_served_twice(
    capacity: int, arrivals: list[str | None]
) -> None:
    """Between two turns of one key every other that waits all the while has one of its own."""

    async def run() -> None:
        line = Line(capacity)
        crowd = Crowd(line)
        since: dict[str, Counter[str]] = {}  # of each waiting key, what others were given

        async def settle() -> None:
            seen = len(crowd.granted)
            await turns()
            for key in crowd.granted[seen:]:
                since.pop(key, None)
                for counts in since.values():
                    counts[key] += 1
                    assert counts[key] <= 1, "served twice while another key waited"
            for key in line._lines:
                since.setdefault(key, Counter())

        for arrival in arrivals:
            if arrival is not None:
                crowd.come(arrival)
            elif crowd.inside:
                crowd.leave[crowd.inside[0][1]].set()
            await settle()
        await crowd.end()

    asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(most=st.integers(1, 8), flood=st.integers(0, 40), calm=st.integers(1, 8))
def test_a_flood_leaves_the_others_their_share_of_the_queue(
    most: int, flood: int, calm: int
) -> None:
    """However much one key sends before: another's requests find room, up to an equal share."""

    async def run() -> None:
        line = Line(1, most)
        crowd = Crowd(line)
        crowd.come("holder")
        for _ in range(flood):
            crowd.come("flood")
        await turns()
        for _ in range(calm):
            crowd.come("calm")
            await turns()
        assert line.waiting == min(most, flood + calm)
        room = max(most - flood, most // 2)
        assert len(line._lines.get("calm", ())) == min(calm, room)
        assert crowd.refused.count("displaced") <= calm
        await crowd.end()
        assert (line.held, line.waiting) == (0, 0)

    asyncio.run(run())


def test_nobody_is_overtaken_by_smaller_ones() -> None:
    """A large request at the head holds up the small ones behind it; alone, any size passes."""

    async def run() -> None:
        line = Line(4)
        crowd = Crowd(line)
        small = crowd.come("a", 3)
        await turns()
        large = crowd.come("a", 100)
        crowd.come("b", 1)
        await turns()
        assert crowd.granted == ["a"], "one more would fit, but it is not its turn"
        crowd.leave[small].set()
        await turns()
        assert (crowd.granted, line.held) == (["a", "a"], 4)
        crowd.leave[large].set()
        await turns()
        assert crowd.granted == ["a", "a", "b"]
        await crowd.end()

    asyncio.run(run())


def test_a_wait_has_an_end() -> None:
    """Who waits too long is refused, and whoever is behind it goes on."""

    async def run() -> None:
        line = Line(4)
        crowd = Crowd(line, seconds=0.02)
        crowd.come("a", 3)
        await turns()
        crowd.come("a", 4)
        await turns()
        crowd.seconds = 3600
        crowd.come("b", 1)
        async with asyncio.timeout(60):
            while crowd.granted != ["a", "b"]:
                await asyncio.sleep(0.01)
        assert crowd.refused == ["late"]
        await crowd.end()
        assert (line.held, line.waiting) == (0, 0)

    asyncio.run(run())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=100, deadline=None)
@given(gap=st.floats(0.001, 3), ahead=st.integers(1, 80))
def test_the_time_to_stay_away_follows_the_ends(gap: float, ahead: int) -> None:
    """With an end every ``gap`` seconds it is the time for all that are ahead, in whole seconds."""
    clock = Clock()
    rate = DrainRate(clock)
    rate.full()
    for _ in range(50):
        clock.now += gap
        rate.ended()
    wanted = min(max(ahead * gap, 1), MOST_SECONDS)
    assert wanted * 0.94 <= rate.retry_after(ahead) <= min(wanted + 1.01, MOST_SECONDS)


def test_answers_that_end_together_count_as_what_they_are() -> None:
    """Twenty at once every ten seconds are two a second, before such an end as after it."""
    clock = Clock()
    rate = DrainRate(clock)
    rate.full()
    for _ in range(20):
        clock.now += 10
        for _ in range(20):
            rate.ended()
    assert 14 <= rate.retry_after(40) <= 24
    clock.now += 9
    assert 14 <= rate.retry_after(40) <= 27


def test_quiet_times_say_nothing_of_the_rate() -> None:
    """A minute in which nobody came is no minute that a place takes to become free."""
    clock = Clock()
    rate = DrainRate(clock)
    rate.full()
    for _ in range(20):
        clock.now += 0.5
        rate.ended()
    rate.free()
    clock.now += 60
    rate.ended()
    rate.full()
    assert rate.retry_after(4) == 2


def test_an_engine_that_stops_is_not_taken_for_a_fast_one() -> None:
    """Without an end the time to stay away grows with the time that has gone by, to its bound."""
    clock = Clock()
    rate = DrainRate(clock)
    rate.full()
    assert rate.retry_after(3) == 1
    clock.now += 7
    assert rate.retry_after(3) == 7, "nothing has ended yet"
    for _ in range(100):
        clock.now += 0.1
        rate.ended()
    told = []
    for _ in range(12):
        told.append(rate.retry_after(30))
        clock.now += 30
    assert told == sorted(told)
    assert told[0] < 10 < told[3] < told[-1] == MOST_SECONDS


@settings(max_examples=200, deadline=None)
@given(crowd_keys=st.lists(KEYS, max_size=25), newcomer=KEYS)
def test_who_is_ahead_is_who_goes_first(crowd_keys: list[str], newcomer: str) -> None:
    """If nobody else comes, as many go before a newcomer as were said to be ahead of it."""

    async def run() -> None:
        line = Line(1)
        crowd = Crowd(line)
        crowd.come("holder")
        for key in crowd_keys:
            crowd.come(key)
            await turns(2)
        ahead = line.ahead(newcomer)
        number = crowd.come(newcomer)
        await turns()
        before = len(crowd.granted)
        while number not in [one for _, one in crowd.inside]:
            crowd.leave[crowd.inside[0][1]].set()
            await turns()
        # The holder's leaving lets in the first.
        assert len(crowd.granted) - before - 1 == ahead
        await crowd.end()

    asyncio.run(run())
