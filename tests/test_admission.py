"""Places: bounded, waited for in turn, given back however a request ends."""

from __future__ import annotations

import asyncio

import pytest

from qwen2vl_serve.admission import Admission
from qwen2vl_serve.errors import Overloaded
from qwen2vl_serve.line import DrainRate
from tests.test_line import Clock, turns


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
        with pytest.raises(Overloaded):
            await one.place("a")
        assert reasons == ["slow", "slow"]  # who has waited is "late"
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
        loop = asyncio.get_running_loop()
        clock_of_loop, begun = loop.time, loop.time()
        loop.time = lambda: begun  # type: ignore[method-assign]  # it cannot come too late
        waiting = asyncio.create_task(one.place("a"))
        await turns()
        place.leave()
        place = await waiting
        loop.time = clock_of_loop  # type: ignore[method-assign]
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
