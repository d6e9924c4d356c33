"""Places: bounded, waited for in turn, given back however a request ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.admission import MOST_SECONDS, Admission, Bodies, DrainRate, Line, Refused
from qwen2vl_serve.errors import Overloaded, RateLimited

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


def test_refusals_are_counted_and_say_when_to_come_again() -> None:
    """The error carries its own Retry-After, and the metric its reason."""

    async def run() -> None:
        reasons: list[tuple[str, str]] = []
        waits: list[float] = []
        one = Admission(
            1, limit="most", refused=lambda *why: reasons.append(why), waited=waits.append
        )
        place = await one.place("a")
        assert waits == [], "who does not wait is not measured"
        with pytest.raises(Overloaded, match=r"wait already \(most\): try again in 1 s") as caught:
            await one.place("b")
        assert caught.value.retry_after == 1
        with pytest.raises(Overloaded):
            one.require_room("b")
        assert (reasons, len(waits)) == ([("full", "most")] * 2, 1)
        place.leave()
        place.leave()
        assert one.places.held == 0
        one.require_room("b")

    asyncio.run(run())


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


def test_who_would_wait_too_long_is_refused_at_once() -> None:
    """At two ends a second, with 1.2 s to wait, two of a key may; a third need not try."""

    async def run() -> None:
        reasons: list[str] = []
        one = Admission(1, 1, 100, 1.2, refused=lambda reason, _: reasons.append(reason))
        clock = Clock()
        one.places.rate = DrainRate(clock)
        place = await one.place("a")
        one.places.rate.full()
        for _ in range(200):
            clock.now += 0.52
            one.places.rate.ended()
        waiting = [asyncio.create_task(one.place("a")) for _ in range(2)]
        await turns()
        one.require_room("b")  # its turn comes after the first of "a"'s
        with pytest.raises(Overloaded, match=r"in about 1.5 s, .*longer than 1.2 s"):
            one.require_room("a")
        begun = asyncio.get_running_loop().time()
        with pytest.raises(Overloaded):
            await one.place("a")
        assert asyncio.get_running_loop().time() - begun < 0.5
        assert reasons == ["slow", "slow"]
        place.leave()
        for other in waiting:
            (await other).leave()
        assert (one.places.held, one.waiting) == (0, 0)
        # Whoever finds a place does not wait, however slow it was.
        clock.now += 1000
        (await one.place("a")).leave()

    asyncio.run(run())


def test_a_short_wait_is_tried() -> None:
    """At twenty ends a second who may wait 0.02 s does so: averages do not tell the next end."""

    async def run() -> None:
        reasons: list[str] = []
        one = Admission(1, 1, 100, 0.02, refused=lambda reason, _: reasons.append(reason))
        clock = Clock()
        one.places.rate = DrainRate(clock)
        place = await one.place("a")
        one.places.rate.full()
        for _ in range(200):
            clock.now += 0.05
            one.places.rate.ended()
        waiting = asyncio.create_task(one.place("a"))
        await turns()
        place.leave()
        place = await waiting
        with pytest.raises(Overloaded, match="waited"):
            await one.place("a")
        place.leave()
        assert reasons == ["late"]

    asyncio.run(run())


def test_before_anything_has_ended_requests_may_wait() -> None:
    """A server that has just become full knows no rate, and lets wait; a minute on it refuses."""

    async def run() -> None:
        reasons: list[str] = []
        one = Admission(1, 1, 100, 30.0, refused=lambda reason, _: reasons.append(reason))
        clock = Clock()
        one.places.rate = DrainRate(clock)
        await one.place("a")
        for _ in range(3):
            asyncio.create_task(one.place("a"))  # noqa: RUF006  (dropped with its loop)
            await turns()
        assert one.waiting == 3
        clock.now += 31
        with pytest.raises(Overloaded):
            one.require_room("a")
        assert reasons == ["slow"]

    asyncio.run(run())


def test_visual_tokens_are_a_second_bound() -> None:
    """Two requests that have places wait for each other's tokens; a client that leaves does not."""

    async def run() -> None:
        one = Admission(8, 100, 8, 60)
        first, second, third = [await one.place("a") for _ in range(3)]
        await first.weigh(80)
        waiting = asyncio.create_task(second.weigh(80))
        behind = asyncio.create_task(third.weigh(10))
        await turns()
        assert (one.tokens.held, one.waiting) == (80, 2)
        waiting.cancel()
        await turns()
        assert behind.done()
        assert (one.tokens.held, one.waiting) == (90, 0)
        for place in (first, second, third):
            place.leave()
        assert (one.tokens.held, one.places.held) == (0, 0)

    asyncio.run(run())


def test_so_many_start_at_once() -> None:
    """Who would start waits for another's first token, or its end, and keeps nobody from a place.

    A bound that is taken away lets all start.
    """

    async def run() -> None:
        one = Admission(8, 100, 8, 60)
        one.resize(8, 100, 8, 60, most_starting=1)
        first, second, third, fourth = [await one.place("a") for _ in range(4)]
        await first.start()
        others = [asyncio.create_task(place.start()) for place in (second, third, fourth)]
        await turns()
        assert (one.starts.held, one.waiting) == (1, 3)
        (await one.place("a")).leave()
        first.begun()
        first.begun()
        await turns()
        assert [other.done() for other in others] == [True, False, False]
        second.leave()
        await turns()
        assert [other.done() for other in others] == [True, True, False]
        one.resize(8, 100, 8, 60)
        await turns()
        assert others[2].done()
        for place in (first, third, fourth):
            place.leave()
        assert (one.places.held, one.starts.held, one.waiting) == (0, 0, 0)

    asyncio.run(run())


def test_who_is_cancelled_as_it_may_start_starts_nothing() -> None:
    """Its turn goes to the next."""

    async def run() -> None:
        one = Admission(8, 100, 8, 60)
        one.resize(8, 100, 8, 60, most_starting=1)
        first, second, third = [await one.place("a") for _ in range(3)]
        await first.start()
        second_start, third_start = [asyncio.create_task(p.start()) for p in (second, third)]
        await turns()
        first.begun()
        second_start.cancel()
        await turns()
        assert (second_start.cancelled(), third_start.done()) == (True, True)
        for place in (first, second, third):
            place.leave()
        assert (one.starts.held, one.starts.waiting) == (0, 0)

    asyncio.run(run())


def test_waits_for_a_start_are_foreseen_by_first_tokens() -> None:
    """Answers that take long to end say nothing of how soon another may start."""
    now = 0.0

    async def run() -> None:
        nonlocal now
        one = Admission(100, 100, 100, 1)
        one.places.rate, one.starts.rate = DrainRate(lambda: now), DrainRate(lambda: now)
        one.resize(100, 100, 100, 1, most_starting=1)
        running = [await one.place("a")]
        await running[0].start()
        for _ in range(20):
            place = await one.place("a")
            waiting = asyncio.create_task(place.start())
            await turns()
            now += 0.5
            running[-1].begun()
            await waiting
            running.append(place)
        assert one.starts.rate.seconds_until(1) == pytest.approx(0.5, rel=0.1)
        now += 100
        assert len(running) == 21
        late = await one.place("a")
        running[-1].begun()
        await late.start()
        for place in (*running, late):
            place.leave()
        assert (one.places.held, one.starts.held) == (0, 0)

    asyncio.run(run())


def test_a_refusal_names_the_limit_that_was_reached() -> None:
    """Of places, visual tokens and starts, whichever it waited for."""

    async def run() -> None:
        limits: list[str] = []
        one = Admission(2, 10, 8, 0.01, limit="most", refused=lambda _, limit: limits.append(limit))
        one.resize(2, 10, 8, 0.01, most_starting=1)
        places = [await one.place("a") for _ in range(2)]
        await places[0].weigh(10)
        await places[0].start()
        for wait in (places[1].weigh(10), places[1].start(), one.place("a")):
            with pytest.raises(Overloaded) as caught:
                await wait
            assert f"({limits[-1]}): try again" in caught.value.message
        assert limits == ["limits.max_visual_tokens", "limits.max_starting", "most"]

    asyncio.run(run())


def test_new_bounds_hold_at_once() -> None:
    """More places let in who waits; fewer leave those that have one alone."""

    async def run() -> None:
        one = Admission(1, 10, 8, 60)
        first = await one.place("a")
        second = asyncio.create_task(one.place("a"))
        await turns()
        one.resize(2, 10, 8, 60)
        await turns()
        assert second.done()
        one.resize(1, 10, 0, 60)
        with pytest.raises(Overloaded):
            await one.place("a")
        first.leave()
        (await second).leave()
        assert one.places.held == 0

    asyncio.run(run())


def test_bodies_are_bounded_together() -> None:
    """What does not fit is refused, and counts nothing."""
    bodies = Bodies(10, 10)
    bodies.take("", 7)
    with pytest.raises(Refused):
        bodies.take("", 4)
    bodies.take("", 3)
    bodies.give_back("", 10)
    assert bodies.held == 0


def test_bodies_of_one_key_leave_room_for_others() -> None:
    """A named key holds its share; those that have no name are not told from each other."""
    bodies = Bodies(10, 5)
    bodies.take("greedy", 5)
    with pytest.raises(RateLimited, match="5 bytes already"):
        bodies.take("greedy", 1)
    bodies.take("modest", 2)
    bodies.take("", 3)
    bodies.give_back("greedy", 5)
    bodies.take("greedy", 4)
    for key, size in (("greedy", 4), ("modest", 2), ("", 3)):
        bodies.give_back(key, size)
    assert bodies.held == 0
    bodies.take("", 9)
