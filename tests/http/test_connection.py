"""A block that runs while its client stays, and no longer."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from qwen2vl_serve.http.connection import EventStream, WhileConnected


class Line:
    """A connection whose client leaves when told."""

    def __init__(self):
        self.gone = asyncio.Event()
        self.sent = []

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)


def test_a_block_that_ends_first_is_left_alone():
    """Nothing is cancelled, and no task stays behind."""

    async def run():
        line = Line()
        async with WhileConnected(line.receive):
            await asyncio.sleep(0)
        line.gone.set()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return "done"

    assert asyncio.run(run()) == "done"


def test_a_client_that_leaves_ends_the_block():
    """The block is cancelled where it waits; its clean-up has run when the error arrives."""

    async def run():
        line, cleaned = Line(), []
        asyncio.get_running_loop().call_later(0.01, line.gone.set)

        async def block():
            async with WhileConnected(line.receive):
                try:
                    await asyncio.sleep(3600)
                finally:
                    cleaned.append(True)

        with pytest.raises(ClientDisconnect):
            await block()
        assert cleaned == [True]
        # Nothing of the cancellation is left over for what comes next.
        await asyncio.sleep(0)
        assert asyncio.current_task().cancelling() == 0

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_cancellation_of_another_is_not_mistaken():
    """A shutdown that cancels the request is seen as that, also when the client left as well."""

    async def block(line):
        async with WhileConnected(line.receive):
            await asyncio.sleep(3600)

    async def run(leaves):
        line = Line()
        task = asyncio.create_task(block(line))
        await asyncio.sleep(0)
        if leaves:
            line.gone.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run(leaves=False))
    asyncio.run(run(leaves=True))


def test_an_error_of_the_block_passes():
    """What the block raises is what the caller sees."""

    async def run():
        with pytest.raises(ZeroDivisionError):
            async with WhileConnected(Line().receive):
                1 / 0  # noqa: B018

    asyncio.run(run())


def test_a_stream_whose_client_leaves_closes_its_source():
    """The generation behind it ends; no ``[DONE]`` is sent."""

    async def run():
        line, closed = Line(), []

        async def chunks():
            try:
                yield "{}"
                line.gone.set()
                await asyncio.sleep(3600)
            finally:
                closed.append(True)

        with pytest.raises(ClientDisconnect):
            await EventStream("{}", chunks())({}, line.receive, line.send)
        assert closed == [True]
        bodies = [m["body"] for m in line.sent if m["type"] == "http.response.body"]
        assert bodies == [b"data: {}\n\n", b"data: {}\n\n"]

    asyncio.run(asyncio.wait_for(run(), 60))
