"""The ledger never holds more than its capacity, starves nobody and gets everything back."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.media.ledger import Ledger, TooManyBytes

CAPACITY, SHARE = 20, 8
# Per request: what it takes, piece by piece or all at once; for how long it is then held; whether
# it says when it has all; whether its client leaves.
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=6),
        st.booleans(),
        st.integers(0, 4),
        st.booleans(),
        st.booleans(),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=300)
@given(REQUESTS)
def test_everyone_ends_within_the_capacity(requests):
    """Requests that grow, wait, are cancelled or refused: no deadlock, no excess, no loss."""
    ledger = Ledger(CAPACITY, SHARE)

    async def one(pieces, at_once, turns, settles):
        async with ledger.account() as account:
            if at_once:
                await asyncio.gather(*(account.take(size) for size in pieces))
            else:
                for size in pieces:
                    await account.take(size)
                    assert ledger.held <= CAPACITY
                    await asyncio.sleep(0)
            if settles:
                account.settle()
            for _ in range(turns):
                assert ledger.held <= CAPACITY
                await asyncio.sleep(0)

    async def run():
        tasks = [asyncio.create_task(one(*request[:4])) for request in requests]
        for _ in range(3):
            await asyncio.sleep(0)
        for task, (*_, cancelled) in zip(tasks, requests, strict=True):
            if cancelled:
                task.cancel()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end, (pieces, *_, cancelled) in zip(ends, requests, strict=True):
            if sum(pieces) > SHARE:
                assert isinstance(end, TooManyBytes | asyncio.CancelledError)
            else:
                assert end is None or (cancelled and isinstance(end, asyncio.CancelledError))
        assert (ledger.held, ledger.waiting) == (0, 0)

    asyncio.run(run())


@settings(deadline=None, max_examples=300)
@given(REQUESTS, st.lists(st.integers(1, CAPACITY + 5), max_size=6))
def test_everyone_ends_however_the_share_changes(requests, shares):
    """A request keeps the share that it began with, and what is kept free for it suffices."""
    ledger = Ledger(CAPACITY, SHARE)

    async def one(start, pieces):
        for _ in range(start):
            await asyncio.sleep(0)
        share = ledger.share
        async with ledger.account() as account:
            for number, size in enumerate(pieces, 1):
                if sum(pieces[:number]) > share:
                    with pytest.raises(TooManyBytes):
                        await account.take(size)
                    break
                await account.take(size)
                assert ledger.held <= CAPACITY
                await asyncio.sleep(0)

    async def change():
        for share in shares:
            ledger.resize(share)
            assert ledger.share == min(share, CAPACITY)
            await asyncio.sleep(0)

    async def run():
        everyone = [one(turns, pieces * 2) for pieces, _, turns, _, _ in requests]
        async with asyncio.timeout(60):
            await asyncio.gather(change(), *everyone)
        assert (ledger.held, ledger.waiting) == (0, 0)

    asyncio.run(run())


def test_requests_that_wait_for_one_another_go_on():
    """Each holds a part and needs as much again: the oldest gets it, then the next."""

    async def run():
        ledger, order = Ledger(capacity=30, share=10), []

        async def one(number):
            async with ledger.account() as account:
                await account.take(5)
                await asyncio.sleep(0)
                await account.take(5)
                order.append(number)
                await asyncio.sleep(0.001)

        await asyncio.gather(*map(one, range(6)))
        return order

    assert asyncio.run(run()) == list(range(6))


def test_a_small_wish_does_not_overtake_an_older_large_one():
    """In order of age, so that whoever needs much is not put off for ever."""

    async def run():
        ledger, order = Ledger(capacity=20, share=10), []

        async def one(name, size):
            async with ledger.account() as account:
                await account.take(size)
                order.append(name)
                account.settle()
                await asyncio.sleep(0.001)

        await asyncio.gather(*(one(*each) for each in
                               [("a", 10), ("b", 10), ("large", 10), ("small", 1)]))  # fmt: skip
        return order

    assert asyncio.run(run()) == ["a", "b", "large", "small"]


def test_what_is_waited_for_is_counted():
    """``waiting`` tells how many requests stand in line, ``held`` what there is."""

    async def run():
        ledger = Ledger(capacity=10, share=10)
        first, second = ledger.account(), ledger.account()
        await first.take(10)
        task = asyncio.create_task(second.take(1))
        await asyncio.sleep(0)
        seen = ledger.waiting, ledger.held
        async with first:
            pass
        await task
        assert (ledger.waiting, ledger.held) == (0, 1)
        return seen

    assert asyncio.run(run()) == (1, 10)


def test_no_request_may_have_more_than_its_share():
    """It is refused at once; what it held stays until its end, and others are served."""

    async def run():
        ledger = Ledger(capacity=10, share=99)
        async with ledger.account() as account:
            await account.take(6)
            with pytest.raises(TooManyBytes) as caught:
                await account.take(5)
            assert (caught.value.limit, ledger.held) == (10, 6)
            account.give_back(2)
            await account.take(5)
        assert ledger.held == 0

    asyncio.run(run())
