"""A streamed answer, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType

from qwen2vl_client.answer import Answer
from qwen2vl_client.async_transport import AsyncByteStream
from qwen2vl_client.reading import AnswerReader


class AsyncTextStream:
    """The text of an answer as it is generated, for ``async for``; otherwise as ``TextStream``.

    ::

        async with await client.stream("Describe it.", images="a.jpg") as stream:
            async for text in stream:
                print(text, end="", flush=True)

    ``await stream.close()``, leaving the ``async with`` block or cancelling the task that
    iterates ends the HTTP answer, and the server stops generating.
    """

    def __init__(
        self,
        source: AsyncByteStream,
        started: float,
        on_complete: Callable[[Answer], None] | None = None,
    ) -> None:
        self._source = source
        self._reader = AnswerReader(source.headers, started)
        self._on_complete = on_complete
        self.request_id = self._reader.request_id

    def __aiter__(self) -> AsyncIterator[str]:
        """Yield the pieces of text; leaving the loop early closes the stream."""
        return self._read()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def text(self) -> str:
        """What has arrived so far."""
        return self._reader.text

    @property
    def answer(self) -> Answer:
        """The whole answer; ``APIResponseError`` before the stream has ended."""
        return self._reader.whole()

    async def close(self) -> None:
        """Stop: the server sees the connection close and frees the request's slot."""
        await self._source.close()

    async def _read(self) -> AsyncIterator[str]:
        reader = self._reader
        async with self._source:
            async for piece in self._source:
                for text in reader.feed(piece):
                    yield text
                    if self._source.closed:
                        return
                if reader.answer is not None:
                    await self._source.finish()
                    if self._on_complete is not None:
                        self._on_complete(reader.answer)
                    return
            if not self._source.closed:
                raise reader.broke_off()
