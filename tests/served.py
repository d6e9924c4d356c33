"""The application behind the server's own HTTP protocol, on a real socket, over a fake engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import requests
import uvicorn

from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.engine import Medium, Usage
from qwen2vl_serve.launch.resources import batch_store, media_loader
from qwen2vl_serve.launch.serve import _config
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol.chat import ChatRequest
from tests.fake_engine import FakeEngine

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


class CountingEngine(FakeEngine):
    """Tells what an answer has used, as vLLM does; ``total`` is the sum."""

    total: int = 40

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        answer = json.loads(await super().complete(request, media, request_id, usage))
        self._tell(usage)
        return json.dumps(answer | {"usage": {"total_tokens": self.total}}).encode()

    async def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        async for chunk in super().stream(request, media, request_id, usage):
            yield chunk
        self._tell(usage)
        if request.stream_options is not None and request.stream_options.include_usage:
            yield json.dumps(
                {"choices": [], "usage": {"total_tokens": self.total}}, separators=(",", ":")
            )

    def _tell(self, usage: Usage) -> None:
        usage.prompt_tokens, usage.completion_tokens = self.total - 3, 3


@dataclass
class Served:
    root: str
    port: int
    engine: FakeEngine
    app: Any

    def request(self, method: str, path: str, key: str = "", **options: Any) -> requests.Response:
        headers = options.pop("headers", {})
        if key:
            headers = {"Authorization": f"Bearer {key}", **headers}
        return requests.request(method, self.root + path, headers=headers, timeout=60, **options)

    def chat(self, key: str = "", **fields: Any) -> requests.Response:
        return self.request("POST", "/v1/chat/completions", key, json={**HELLO, **fields})

    def raw(self, *pieces: bytes, seconds: float = 60) -> bytes:
        """Send bytes as they are; return all that comes until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as client:
            for piece in pieces:
                client.sendall(piece)
            return drained(client)


def drained(client: socket.socket) -> bytes:
    """Return what comes until the other side closes, however it does."""
    found = b""
    try:
        while piece := client.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Look every 10 ms; ``seconds`` are counted in looks, for a machine may stand still."""
    for _ in range(round(seconds * 100)):
        if condition():
            return
        time.sleep(0.01)
    assert condition(), "not within the time allowed"


@contextmanager
def served(profile: Profile, keys: Keys, engine: FakeEngine | None = None) -> Iterator[Served]:
    engine = engine or FakeEngine()
    batches = batch_store(profile)
    app = build_app(engine, media_loader(profile), profile, keys, batches=batches)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    http = uvicorn.Server(_config(app, profile))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{port}", port, engine, app)
    finally:
        http.should_exit = True
        thread.join(10)
        listener.close()
        if batches is not None:
            batches.close()
