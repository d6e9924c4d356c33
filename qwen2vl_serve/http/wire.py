"""HTTP on the wire: bounds of a request's head, deadlines, refusals in OpenAI's shape.

uvicorn bounds neither the bytes nor the time of a head, and tells of what it cannot parse in plain
text. It also loses the body of a request that offers to change the protocol. Its protocol is an
``asyncio.Protocol`` with a method for each step of parsing; this one adds what is missing around
those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from qwen2vl_serve.errors import (
    APIError,
    MalformedRequest,
    RequestHeadTooLarge,
    RequestTimeout,
)
from qwen2vl_serve.profile.limits import LimitsSection

LINGER_SECONDS = 2.0
"""How long a client that was answered early may go on sending before it is cut off.

Closing at once would make its system drop the answer that it has not read yet.
"""


Note = Callable[[APIError], str]
"""Takes note of a refusal; returns the id under which it did."""

_REFUSAL = (
    b"content-type: application/json\r\n"
    b"x-request-id: %b\r\n"
    b"cache-control: no-store\r\n"
    b"x-content-type-options: nosniff\r\n"
    b"connection: close\r\n"
    b"content-length: %d\r\n\r\n"
)


class BoundedHTTP(HttpToolsProtocol):
    """uvicorn's protocol with bounds.

    ``max_head_bytes`` bounds request line and headers together, ``head_seconds`` the time from
    a connection's or request's first moment to the end of its headers, ``reader_seconds`` the time
    that a client may leave what was sent to it unread. ``note`` is told of each refusal.
    """

    def __init__(
        self,
        *,
        max_head_bytes: int,
        head_seconds: float,
        reader_seconds: float,
        note: Note,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.note = note
        self.reader_seconds = reader_seconds
        self._reader: asyncio.TimerHandle | None = None
        self.max_head_bytes = max_head_bytes
        self.head_seconds = head_seconds
        self._head_bytes = 0  # as they came, since the head began
        self._size = 0  # of what is parsed of it
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first head its time."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._cancel_deadline()
        self._cancel_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, unless this connection is done with; refuse a head that grows too large."""
        if self._refused or self.parser is None:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._deadline is None:  # bytes between two requests, that begin none
                self._await_head()
        self._unset_keepalive_if_required()
        try:
            self._parse(memoryview(data))
        except HttpParserError:
            self.send_400_response("")
        if self._in_head and self._head_bytes > self.max_head_bytes and not self._refused:
            self._refuse(self._too_large())

    def _parse(self, rest: memoryview) -> None:
        """Parse; a head that offers another protocol once more, without the offer.

        The parser stops behind such a head, as if the other protocol followed. To go on in
        HTTP/1.1 is how a server declines (RFC 9110, 7.8); Java's client offers HTTP/2 to
        everybody.
        """
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except HttpParserUpgrade as offer:
                rest = rest[offer.args[0] :]
                self.parser = HttpRequestParser(self)
                # As uvicorn has it: what follows a request that closes is dropped, not refused.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(self._declined())

    def _declined(self) -> bytes:
        """Return the head that was parsed, without its ``Upgrade``."""
        version = self.scope["http_version"].encode()
        lines = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._size = 0
        if not self._in_head:
            self._in_head = True
            self._head_bytes = 0
        if self._deadline is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, its colon, space and line end too; drop what trails a body."""
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the request in; one that offers another protocol is parsed once more first."""
        if self.parser.should_upgrade():
            self.scope["method"] = self.parser.get_method().decode("ascii")
            self.scope["http_version"] = self.parser.get_http_version()
            if self.scope["method"] == "CONNECT":
                raise ValueError("no proxy")  # stops the parser
            return
        self._in_head = False
        self._cancel_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Count what follows as the next head."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        """Cut a client off that was answered before it had sent its body, after a while."""
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._cancel_deadline()
            self._deadline = self.loop.call_later(LINGER_SECONDS, self._close)

    def pause_writing(self) -> None:
        """Begin to wait for the client: what it has not read fills the buffers."""
        super().pause_writing()
        # Cut off hard: to close in order would wait until it has read the rest.
        self._reader = self.loop.call_later(self.reader_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads."""
        self._cancel_reader()
        super().resume_writing()

    def _cancel_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's words are not ours)
        """Answer what the parser refused."""
        excessive = self._size > self.max_head_bytes
        self._refuse(self._too_large() if excessive else _malformed())

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self.max_head_bytes:
            raise ValueError("the head is too large")  # stops the parser

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_seconds, self._too_slow)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._answering():
            # Some clients send a line end after a body, which begins no request.
            self._await_head()
            return
        if self._head_bytes == 0:
            self._close()  # nothing was asked
            return
        self._refuse(RequestTimeout(f"The headers took more than {self.head_seconds:g} seconds."))

    def _too_large(self) -> APIError:
        return RequestHeadTooLarge(
            f"Request line and headers take more than {self.max_head_bytes} bytes; send fewer or "
            "shorter headers."
        )

    def _refuse(self, error: APIError) -> None:
        """Answer with an error and close; where an answer is under way, only close."""
        self._refused = True
        self._cancel_deadline()
        begun = self._answering() and self.cycle.response_started
        if not self.transport.is_closing() and not begun:
            body = to_json(error.body())
            head = _REFUSAL % (self.note(error).encode(), len(body))
            self.transport.write(STATUS_LINE[error.status] + head + body)
        self._close()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def bounded_http(limits: LimitsSection, note: Note) -> Any:
    """Return what ``uvicorn.Config(http=…)`` takes; ``note`` is told of what is refused here."""
    return partial(
        BoundedHTTP,
        max_head_bytes=limits.max_header_bytes,
        head_seconds=limits.header_seconds,
        reader_seconds=limits.reader_seconds,
        note=note,
    )


def _malformed() -> APIError:
    return MalformedRequest(
        "The request is not HTTP/1.1, has a method that is not known here, or does not tell "
        "plainly where its body ends."
    )
