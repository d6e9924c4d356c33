"""A streamed answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    status_error_class,
)
from qwen2vl_client.sse import SSEDecoder
from qwen2vl_client.transport import ByteStream

_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
}


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
        self.text = ""
        self.request_id = source.request_id
        self._source = source
        self._started = started
        self._on_complete = on_complete
        self._answer: Answer | None = None
        self._head: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._usage: Any = None

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
    def answer(self) -> Answer:
        """The whole answer; ``APIResponseError`` before the stream has ended."""
        if self._answer is None:
            raise APIResponseError(
                "the stream has not ended: iterate to its end first (stream.text holds what "
                "has arrived)"
            )
        return self._answer

    def close(self) -> None:
        """Stop: the server sees the connection close and frees the request's slot."""
        self._source.close()

    def _read(self) -> Iterator[str]:
        decoder = SSEDecoder()
        with self._source:
            for piece in self._source:
                for event in decoder.feed(piece):
                    if event.data == "[DONE]":
                        self._source.finish()
                        self._complete()
                        return
                    text = self._take(event.data)
                    if text:
                        self.text += text
                        yield text
                    if self._source.closed:
                        return
            if not self._source.closed:
                raise APIConnectionError(
                    "the stream broke off before its end ([DONE]); what arrived is in stream.text",
                    retryable=False,
                )

    def _take(self, data: str) -> str:
        """Read one chunk and return its text; raises the error that a chunk carries."""
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, Mapping):
            raise APIResponseError(f"the stream holds something other than JSON: {data[:120]!r}")
        if chunk.get("error"):
            raise stream_error(chunk["error"], self.request_id)
        if not self._head:
            self._head = {key: chunk.get(key) for key in ("id", "created", "model")}
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        if not choices:
            return ""
        self._finish_reason = choices[0].get("finish_reason") or self._finish_reason
        text = (choices[0].get("delta") or {}).get("content")
        return text if isinstance(text, str) else ""

    def _complete(self) -> None:
        raw = {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": self.text},
                    "finish_reason": self._finish_reason,
                }
            ],
            "usage": self._usage,
        }
        self._answer = Answer.from_raw(raw, self.request_id, time.monotonic() - self._started)
        if self._on_complete is not None:
            self._on_complete(self._answer)


def stream_error(error: object, request_id: str | None) -> APIStatusError:
    """Return the typed error for the ``error`` object of a chunk.

    The HTTP status was 200 by then; it is taken from a numeric ``code``, else from ``type``.
    """
    fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": error}
    code = None if fields.get("code") is None else str(fields["code"])
    kind = None if fields.get("type") is None else str(fields["type"])
    status = _STATUS_OF_TYPE.get(kind or "", 500)
    if code is not None and code.isdigit() and 400 <= int(code) <= 599:
        status = int(code)
    return status_error_class(status)(
        str(fields.get("message") or "the server stopped the stream without saying why"),
        status=status,
        code=code,
        type=kind,
        param=None if fields.get("param") is None else str(fields["param"]),
        request_id=request_id,
    )
