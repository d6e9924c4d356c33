"""What an answer owes to its connection: to stop when the client leaves, and to stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType

from fastapi.responses import Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qwen2vl_serve.errors import APIError
from qwen2vl_serve.http.call import Call


class WhileConnected:
    """Asynchronous context: its block is cancelled as soon as the client closes the connection.

    Leaving it then raises ``ClientDisconnect``. One task watches; the block runs in its own.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> None:
        """Start watching."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is watched from within a task only")
        self._task = task
        self._watch = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching; turn our own cancellation into ``ClientDisconnect``."""
        self._watch.cancel()
        # The cancellation of another (a shutdown) passes as what it is.
        if self._gone and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientDisconnect from None


class EventStream(Response):
    """Server-sent events ending in ``[DONE]``; an error ends them without it.

    A client that leaves closes ``chunks``, and with it the generation. ``call`` may be cut: its
    error is then the last event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: str, chunks: AsyncGenerator[str, None], call: Call | None = None
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        # Proxies buffer event streams unless told; browsers must not keep them.
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-store"
        self._first = first
        self._chunks = chunks
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI's signature)
        """Send the events; however that ends, the generation ends with it."""
        head = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            try:
                async with WhileConnected(receive):
                    await send(head)
                    await send(_event(self._first))
                    async for chunk in self._chunks:
                        await send(_event(chunk))
            except (APIError, asyncio.CancelledError) as error:
                last = self._last_words(error)
            else:
                last = b"data: [DONE]\n\n"
            await send({"type": "http.response.body", "body": last})
        finally:
            await self._chunks.aclose()

    def _last_words(self, error: APIError | asyncio.CancelledError) -> bytes:
        """Return the event that says why the answer is not whole."""
        if not isinstance(error, APIError):
            cut = None if self._call is None else self._call.taken_back()
            if cut is None:
                raise error
            error = cut
        if self._call is not None:
            self._call.code = error.code
        return b"data: " + to_json(error.body()) + b"\n\n"


def _event(data: str) -> dict[str, object]:
    body = f"data: {data}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}
