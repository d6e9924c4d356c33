"""A streamed answer put together from its bytes; how they come is the stream's own concern."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.checks import server_timings
from qwen2vl_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    status_error_class,
)
from qwen2vl_client.sse import SSEDecoder

_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
}

_NO_CHUNK = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
"""What reading JSON of any other shape as a chunk raises."""


class AnswerReader:
    """Takes the bytes of an event stream, and has its texts and, after the end, its answer.

    ``text`` is what has arrived; ``answer`` is None until the stream has said ``[DONE]``.
    ``started`` is the call's beginning by ``time.monotonic``.
    """

    def __init__(self, headers: Mapping[str, str], started: float) -> None:
        self.text = ""
        self.answer: Answer | None = None
        self.request_id = headers.get("x-request-id")
        self._server = server_timings(headers)
        self._started = started
        self._first_token: float | None = None
        self._decoder = SSEDecoder()
        self._head: dict[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._usage: Any = None

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the texts that the next bytes complete; ``[DONE]`` makes the ``answer``.

        Raises ``APIStatusError`` for an error among the events, and ``APIResponseError`` for what
        is no event of a chat; the texts before it are yielded first.
        """
        for event in self._decoder.feed(piece):
            if event.data == "[DONE]":
                self._complete()
                return
            text = self._take(event.data)
            if text:
                self.text += text
                yield text

    def whole(self) -> Answer:
        """Return the answer; ``APIResponseError`` before the stream has ended."""
        if self.answer is None:
            raise APIResponseError(
                "the stream has not ended: iterate to its end first (stream.text holds what "
                "has arrived)"
            )
        return self.answer

    def broke_off(self) -> APIConnectionError:
        """Return the error for a stream that ended without ``[DONE]``."""
        return APIConnectionError(
            "the stream broke off before its end ([DONE]); what arrived is in stream.text",
            retryable=False,
        )

    def _take(self, data: str) -> str:
        """Read one event and return its text; raises the error that a chunk carries."""
        try:
            return self._take_chunk(json.loads(data))
        except _NO_CHUNK as error:
            raise APIResponseError(
                f"the stream holds something that is no chunk of a chat: {data[:120]!r}"
            ) from error

    def _take_chunk(self, chunk: Mapping[str, Any]) -> str:
        if chunk.get("error"):
            raise stream_error(chunk["error"], self.request_id)
        if not self._head:
            names = ("id", "created", "model", "media", "overflow")
            self._head = {name: chunk.get(name) for name in names}
        self._usage = chunk.get("usage") or self._usage
        choices = chunk.get("choices")
        if not choices:
            return ""
        self._finish_reason = choices[0].get("finish_reason") or self._finish_reason
        delta = choices[0].get("delta") or {}
        for call in delta.get("tool_calls") or ():
            self._take_call(call)
        text = delta.get("content")
        if not isinstance(text, str) or not text:
            return ""
        if self._first_token is None:
            self._first_token = time.monotonic() - self._started
        return text

    def _take_call(self, piece: Mapping[str, Any]) -> None:
        """Join the pieces of a tool call: its name comes once, its arguments bit by bit."""
        call = self._calls.setdefault(
            int(piece.get("index") or 0),
            {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
        )
        call["id"] = piece.get("id") or call["id"]
        for name, value in (piece.get("function") or {}).items():
            if isinstance(value, str):
                call["function"][name] = call["function"].get(name, "") + value

    def _complete(self) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        raw = {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage,
        }
        self.answer = Answer.from_raw(
            raw,
            self.request_id,
            time.monotonic() - self._started,
            first_token=self._first_token,
            server=self._server,
        )


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
