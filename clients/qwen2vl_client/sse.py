"""A reader of server-sent events that takes bytes as the network delivers them.

Source: HTML Living Standard, section 9.2.6 "Interpreting an event stream".
"""

from __future__ import annotations

from dataclasses import dataclass, field

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ServerSentEvent:
    """One event: its ``data`` (lines joined by a newline) and its name."""

    data: str
    event: str = "message"


@dataclass
class SSEDecoder:
    """Turn pieces of a byte stream into events; how the stream is cut makes no difference.

    Lines end in LF, CR or CRLF. They are cut before they are decoded: no byte of a UTF-8
    sequence equals CR or LF, so a character split between two pieces comes out whole.
    An event that the stream's end leaves without its blank line is dropped, as the standard
    asks. ``id`` and ``retry`` belong to reconnecting, which a POST cannot do: they are skipped.
    """

    _pending: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)
    _event: str = ""
    _at_start: bool = True
    _after_cr: bool = False

    def feed(self, piece: bytes) -> list[ServerSentEvent]:
        """Take the next bytes and return the events that they complete, in order."""
        events: list[ServerSentEvent] = []
        for byte_line in self._lines(piece):
            event = self._take_line(byte_line.decode("utf-8", errors="replace"))
            if event is not None:
                events.append(event)
        return events

    def _lines(self, piece: bytes) -> list[bytes]:
        # A CR ends its line at once; the LF that may follow, perhaps in the next piece, is
        # then part of the same line end.
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if piece.endswith(b"\r"):
            self._after_cr = True
        if b"\n" not in piece and b"\r" not in piece:
            self._pending += piece
            return []
        # bytes.splitlines cuts at CR, LF and CRLF only (str.splitlines at many more).
        whole = (bytes(self._pending) + piece).splitlines(keepends=True)
        last = whole.pop() if not whole[-1].endswith((b"\n", b"\r")) else b""
        self._pending = bytearray(last)
        lines = [line.rstrip(b"\r\n") for line in whole]
        if self._at_start:
            lines[0] = lines[0].removeprefix(_BOM)
            self._at_start = False
        return lines

    def _take_line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None  # a comment (empty name), id, retry or an unknown field

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        if not data:
            return None
        return ServerSentEvent("\n".join(data), event or "message")
