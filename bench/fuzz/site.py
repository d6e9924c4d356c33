"""A site on loopback that answers as it was told, most often not as HTTP has it."""

from __future__ import annotations

import contextlib
import gzip
import random
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SECONDS = 8.0
"""How long it keeps a connection busy at most; longer than the fetcher's patience."""


@dataclass(frozen=True)
class Script:
    """An answer: ``pieces`` with ``pause`` seconds in between, the last one ``endless`` or once.

    ``ending`` is ``close``, ``reset`` or ``hang``.
    """

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    endless: bool = False
    ending: str = "close"


class Site:
    """Scripts by the first step of a path; any other path gets ``otherwise``."""

    def __init__(self) -> None:
        self.port = 0
        self.scripts: dict[str, Script] = {}
        self.otherwise = _MISSING
        self.connections = 0


@contextmanager
def site(host: str = "127.0.0.1", port: int = 0) -> Iterator[Site]:
    """Run the site on an address of loopback; without ``port`` on a free one of five digits."""
    scripted = Site()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            scripted.connections += 1
            head = b""
            with contextlib.suppress(OSError):
                while b"\r\n\r\n" not in head:
                    piece = self.request.recv(4096)
                    if not piece:
                        return
                    head += piece
                name = head.split()[1].decode("latin-1").split("/")[1]
                _answer(self.request, scripted.scripts.get(name, scripted.otherwise))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 64

    while True:
        server = Server((host, port), Handler)
        scripted.port = server.server_address[1]
        if port or scripted.port >= 10_000:
            break
        server.server_close()
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield scripted
        server.shutdown()


_MISSING = Script((b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",))


def _answer(connection: socket.socket, script: Script) -> None:
    end = time.monotonic() + SECONDS
    connection.settimeout(SECONDS)
    for piece in script.pieces:
        connection.sendall(piece)
        time.sleep(script.pause)
    while script.endless and time.monotonic() < end:
        connection.sendall(script.pieces[-1])
        time.sleep(script.pause)
    if script.ending == "hang":
        # Until the fetcher hangs up, or for so long.
        connection.settimeout(max(end - time.monotonic(), 0.01))
        connection.recv(1)
    elif script.ending == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hostile(rng: random.Random, data: bytes, here: str) -> Script:  # noqa: PLR0912  (a table)
    """Return a way to answer with ``data``; ``here`` is the address that is asked for."""
    size = len(data)
    ok = b"HTTP/1.1 200 OK\r\n"
    length = b"Content-Length: %d\r\n" % size
    honest = ok + length + b"\r\n" + data
    pieces: tuple[bytes, ...] = (honest,)
    more: dict[str, Any] = {}
    match rng.choice(_WAYS):
        case "length":
            lie = rng.choice((0, size - 1, size + 1, -1, 2**31, 2**63, 10**30, "x", "1,2"))
            pieces = (ok + f"Content-Length: {lie}\r\n\r\n".encode() + data,)
        case "two lengths":
            pieces = (ok + length + b"Content-Length: %d\r\n\r\n" % (size // 2) + data,)
        case "chunked":
            head = ok + b"Transfer-Encoding: chunked\r\n\r\n"
            piece = rng.choice((b"%x" % size, b"-1", b"f" * 18, b"g", b"", b"0" * 99))
            tail = rng.choice((b"\r\n0\r\n\r\n", b"\r\n", b"0\r\nX: " + b"y" * 9000, b""))
            pieces = (head + piece + b"\r\n" + data + tail,)
        case "encoded":
            name = rng.choice((b"gzip", b"deflate", b"br", b"x", b"identity, gzip", b"zstd"))
            body = gzip.compress(b"\0" * rng.choice((10, 4_000_000)), mtime=0)
            pieces = (ok + b"Content-Encoding: %s\r\n\r\n" % name + body,)
        case "drip":
            pieces = (ok + length + b"\r\n", *(data[i : i + 1] for i in range(40)))
            more = {"pause": 0.1}
        case "endless":
            pieces, more = (ok + b"\r\n", data), {"endless": True}
        case "endless head":
            pieces, more = (ok, b"X-Y: " + b"y" * 4000 + b"\r\n"), {"endless": True}
        case "redirect":
            code = rng.choice((301, 302, 303, 307, 308, 300, 304))
            to = (rng.choice(_PLACES) or here).encode("latin-1")
            pieces = (b"HTTP/1.1 %d Moved\r\nLocation: %s\r\n\r\n" % (code, to),)
        case "status":
            status = rng.choice((b"204", b"206", b"404", b"500", b"999", b"100", b"0", b"-1", b"x"))
            pieces = (b"HTTP/1.1 %s X\r\nContent-Length: 3\r\n\r\nabc" % status,)
        case "early":
            pieces = (b"HTTP/1.1 103 Early\r\n\r\n" * 50 + honest,)
        case "silent":
            pieces, more = (), {"ending": "hang"}
        case "half":
            pieces, more = (honest[: -size // 2],), {"ending": rng.choice(_ENDINGS)}
        case "noise":
            noise = rng.randbytes(rng.choice((1, 100, 5000)))
            pieces, more = (noise,), {"ending": rng.choice(_ENDINGS)}
    return Script(pieces, **more)


_ENDINGS = ("close", "reset", "hang")
_PLACES = (
    "", "/", "//", "..", "http://127.0.0.1:1/", "http://[::1]/", "file:///etc/passwd",
    "x" * 9000, "http://a:b@c/", "javascript:x", "http://[", "\xff\xfe", "http://10.0.0.1/",
    "data:,x", "?" * 99,
)  # fmt: skip
_WAYS = (
    *("honest",) * 6, "length", "two lengths", "chunked", "chunked", "encoded", "drip", "endless",
    "endless head", "redirect", "redirect", "status", "early", "silent", "half", "noise",
)  # fmt: skip
