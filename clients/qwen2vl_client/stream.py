"""A streamed answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

from qwen2vl_client.answer import Answer
from qwen2vl_client.reading import AnswerReader
from qwen2vl_client.transport import ByteStream


class TextStream:
    """The text of an answer as it is generated: iterate over it, or close it early.

    ::

        with client.stream("Describe it.", images="a.jpg") as stream:
            for text in stream:
                print(text, end="", flush=True)
        print(stream.answer.seconds)

    ``text`` is what has arrived so far; ``answer`` is the whole, once the stream has ended.
    ``close()`` (or leaving the loop or the ``with`` block) ends the HTTP answer, and the server
    stops generating; it may be called from another thread. An error in mid-stream is raised
    from the iteration; ``text`` still holds what came before it. Iterate from one thread.
    """

    def __init__(
        self,
        source: ByteStream,
        started: float,
        on_complete: Callable[[Answer], None] | None = None,
    ) -> None:
        self._source = source
        self._reader = AnswerReader(source.headers, started)
        self._on_complete = on_complete
        self.request_id = self._reader.request_id

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text; leaving the loop early closes the stream."""
        # The generator is not kept: a loop that is left drops it, and that closes the source.
        return self._read()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def text(self) -> str:
        """What has arrived so far."""
        return self._reader.text

    @property
    def answer(self) -> Answer:
        """The whole answer; ``APIResponseError`` before the stream has ended."""
        return self._reader.whole()

    def close(self) -> None:
        """Stop: the server sees the connection close and frees the request's slot."""
        self._source.close()

    def _read(self) -> Iterator[str]:
        reader = self._reader
        with self._source:
            for piece in self._source:
                for text in reader.feed(piece):
                    yield text
                    if self._source.closed:
                        return
                if reader.answer is not None:
                    self._source.finish()
                    if self._on_complete is not None:
                        self._on_complete(reader.answer)
                    return
            if not self._source.closed:
                raise reader.broke_off()
