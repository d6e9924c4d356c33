"""A loopback HTTP server whose answers a test scripts, byte by byte where it must."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = Callable[["Handler"], None]
REQUEST_ID = "req-7"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    connection: tuple[str, int]
    at: float


@dataclass
class Stub:
    """``script`` answers the requests in order, its last step all further ones.

    ``models`` is what it lists; None: there is no list, 404.
    """

    url: str
    script: list[Step]
    models: list[dict[str, Any]] | None = field(
        default_factory=lambda: [{"id": "stub-model", "max_model_len": 2048}]
    )
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)
    proceed: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def setup(self) -> None:
        self.stub.connections += 1
        super().setup()

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        stub = self.stub
        stub.requests.append(
            Request(
                self.command,
                self.path,
                {name.lower(): value for name, value in self.headers.items()},
                _read(raw, self.headers.get("content-type", "")),
                self.client_address,
                time.monotonic(),
            )
        )
        if self.path.endswith("/models"):
            listed = answer(200, {"object": "list", "data": stub.models})
            (failure(404, "not_found") if stub.models is None else listed)(self)
            return
        step = stub.script.pop(0) if len(stub.script) > 1 else stub.script[0]
        try:
            step(self)
        except OSError:  # the client left, which some tests are about
            stub.client_left.set()
            self.close_connection = True

    do_GET = do_POST = _serve  # noqa: N815  (http.server's names)


def _read(raw: bytes, kind: str) -> Any:
    """Return what was sent: JSON read, a form as its bytes."""
    if not raw or kind.startswith("multipart/"):
        return raw or None
    return json.loads(raw)


def answer(status: int, body: object, **headers: str) -> Step:
    """Answer with JSON (or with the bytes given)."""

    def step(handler: Handler) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(raw)))
        handler.send_header("x-request-id", REQUEST_ID)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(raw)

    return step


def completion(text: str = "A red circle.", **fields: object) -> Step:
    return answer(
        200,
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": "stub-model",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35},
            **fields,
        },
    )


def failure(status: int, code: str | None = "some_code", **headers: str) -> Step:
    error = {"message": "it failed", "type": "some_type", "param": "messages", "code": code}
    return answer(status, {"error": error}, **headers)


def drop(handler: Handler) -> None:
    """Close the connection without a byte of an answer."""
    handler.close_connection = True
    handler.connection.close()


def cut_body(handler: Handler) -> None:
    """Promise 1000 bytes, send 10, close."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def silent(seconds: float) -> Step:
    """Take the request and say nothing for a while."""

    def step(handler: Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return step


def dripping(gap: float) -> Step:
    """Send a byte of a long answer every ``gap`` seconds, until the client leaves."""

    def step(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        _until_left(handler, b" ", gap)

    return step


def events(
    pieces: Iterable[bytes], *, chunked: bool = True, ends: bool = True, pause: float = 0.0
) -> Step:
    """Send the pieces as the body of an event stream; ``ends=False`` cuts the last chunk."""

    def step(handler: Handler) -> None:
        start_events(handler, chunked=chunked)
        for piece in pieces:
            send_piece(handler, piece, chunked=chunked)
            time.sleep(pause)
        if chunked and ends:
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.close_connection = True

    return step


def endless_events(handler: Handler) -> None:
    """Send a chunk of text every 20 ms until the client leaves."""
    start_events(handler)
    piece = chunk("word ")
    _until_left(handler, b"%x\r\n%s\r\n" % (len(piece), piece), 0.02)


def stalled_events(handler: Handler) -> None:
    """Send one chunk of text, then nothing until the test lets it proceed."""
    start_events(handler)
    send_piece(handler, chunk("word"))
    handler.stub.proceed.wait(600)
    handler.close_connection = True


def start_events(handler: Handler, *, chunked: bool = True) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.send_header("x-request-id", REQUEST_ID)
    if chunked:
        handler.send_header("transfer-encoding", "chunked")
    else:
        handler.send_header("connection", "close")
    handler.end_headers()


def send_piece(handler: Handler, piece: bytes, *, chunked: bool = True) -> None:
    if chunked:
        piece = b"%x\r\n%s\r\n" % (len(piece), piece)
    handler.wfile.write(piece)
    handler.wfile.flush()


def chunk(text: str | None = None, **fields: Any) -> bytes:
    """Return the bytes of one event of a chat stream."""
    delta = {} if text is None else {"content": text}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "stub-model",
        "choices": [{"index": 0, "delta": delta, "finish_reason": fields.pop("finish", None)}],
        **fields,
    }
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def whole_stream(*texts: str) -> list[bytes]:
    """Return the events of a complete answer: role, texts, finish reason, usage, end."""
    usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
    return [
        chunk(""),
        *[chunk(text) for text in texts],
        chunk(finish="stop"),
        chunk(choices=[], usage=usage),
        DONE,
    ]


def _until_left(handler: Handler, piece: bytes, gap: float) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        handler.wfile.write(piece)
        handler.wfile.flush()
        time.sleep(gap)
    handler.close_connection = True


@contextlib.contextmanager
def running(*script: Step, tls: ssl.SSLContext | None = None) -> Iterator[Stub]:
    """Run a stub with the given script on a free port."""

    class ScriptedHandler(Handler):
        """Of this server alone: http.server makes one handler a connection."""

    with ThreadingHTTPServer(("127.0.0.1", 0), ScriptedHandler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        stub = Stub(f"{scheme}://127.0.0.1:{server.server_port}/v1", list(script))
        ScriptedHandler.stub = stub
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield stub
        finally:
            stub.proceed.set()
            server.shutdown()
            thread.join()
