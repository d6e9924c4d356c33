"""The gate never holds more than its capacity, and gives everything back."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.media.gate import Gate

WORK = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), max_size=30)


@settings(deadline=None)
@given(WORK)
def test_the_capacity_is_never_exceeded_and_nothing_is_lost(work):
    """Whatever comes, waits or is cancelled: within the capacity, and empty at the end."""

    async def one(gate, size, turns, seen):
        async with gate.holding(size):
            seen.append(gate.held)
            for _ in range(turns):
                await asyncio.sleep(0)

    async def run():
        gate, seen = Gate(20), []
        tasks = [asyncio.create_task(one(gate, size, turns, seen)) for size, turns, _ in work]
        await asyncio.sleep(0)
        for task, (_, _, cancelled) in zip(tasks, work, strict=True):
            if cancelled:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.held == 0
        assert max(seen, default=0) <= 20
        assert all(task.cancelled() or task.exception() is None for task in tasks)
        async with asyncio.timeout(60):
            async with gate.holding(20):
                pass

    asyncio.run(run())


def test_small_work_does_not_overtake_large():
    """In order of arrival, so that a large picture is not put off for ever."""

    async def run():
        gate, order = Gate(10), []

        async def one(name, size):
            async with gate.holding(size):
                order.append(name)
                await asyncio.sleep(0.001)

        await asyncio.gather(one("first", 8), one("large", 50), one("small", 1))
        return order

    assert asyncio.run(run()) == ["first", "large", "small"]
