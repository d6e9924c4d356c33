"""The requests that are measured: one at a time over a kept connection, or 16 at once."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
from PIL import Image, ImageDraw

from bench.servers import HOST, BenchError, Server

STREAMS = 16
STREAM_TOKENS = 64
SIDE = 280
SETTLE_SECONDS = 0.005
"""After an answer, until the server has closed its books on the request."""

KEEP_SECONDS = 2.0
"""How long a connection may lie idle; servers close theirs after 5 s, without notice."""


@dataclass(frozen=True)
class Sample:
    """What one request, or one of a burst, cost: seconds of wall time and of API-process CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Case:
    """A kind of request; ``body(model, number)`` is its body and never twice the same.

    ``before(model, number)`` gives a body that is sent first and not measured, or None. With
    ``by_id`` ours is sent the pictures' bytes once, and then the ids of the uploads; stock, which
    keeps no files, is sent the bytes.
    """

    name: str
    body: Callable[[str, int], dict[str, Any]]
    streams: int = 1
    before: Callable[[str, int], dict[str, Any] | None] | None = None
    warm_up: int = 20
    # Large pictures are brought to the model's size by two libraries, whose pixels differ by a
    # level of 255 here and there: enough to turn a close decision.
    same_answers: bool = True
    by_id: bool = False

    def measure(self, server: Server, client: Client, number: int) -> tuple[Sample, list[str]]:
        """Send what ``number`` stands for; return the cost of a request and the answers."""
        upload = self.by_id and server.name == "ours"
        bodies = [
            _written(self.body(server.model, number * self.streams + stream), client, upload)
            for stream in range(self.streams)
        ]
        opening = self.before and self.before(server.model, number)
        if opening:
            client.ask([_written(opening, client, upload)])
        time.sleep(SETTLE_SECONDS)
        cpu, begun = server.cpu_seconds(), time.perf_counter()
        answers = client.ask(bodies)
        wall = time.perf_counter() - begun
        time.sleep(SETTLE_SECONDS)
        cpu = server.cpu_seconds() - cpu
        return Sample(wall / self.streams, cpu / self.streams), answers


class Client:
    """A connection for each of ``STREAMS`` threads; that of single requests is kept."""

    def __init__(self, server: Server) -> None:
        self._connections = [
            http.client.HTTPConnection(HOST, server.port, timeout=120) for _ in range(STREAMS)
        ]
        self._pool = ThreadPoolExecutor(STREAMS)
        self._last = 0.0
        self._files = f"http://{HOST}:{server.port}/v1/files"
        self._ids: dict[str, str] = {}

    def ask(self, bodies: list[bytes]) -> list[str]:
        """Send the bodies at once and return the texts of the answers in their order.

        Raises:
            BenchError: an answer is an error, or a stream that does not end as it should.
        """
        if len(bodies) > 1 or time.monotonic() - self._last > KEEP_SECONDS:
            self._disconnect()
        answers = list(self._pool.map(_ask, self._connections, bodies))
        self._last = time.monotonic()
        return answers

    def upload(self, url: str) -> str:
        """Return the id of the file in a data URL, which is sent when it is new.

        Raises:
            BenchError: it was refused.
        """
        if url not in self._ids:
            data = base64.b64decode(url.partition(",")[2])
            answer = requests.post(
                self._files, files={"file": data}, data={"purpose": "vision"}, timeout=120
            )
            if answer.status_code != 200:
                raise BenchError(f"upload: HTTP {answer.status_code}: {answer.text[:300]}")
            self._ids[url] = answer.json()["id"]
        return self._ids[url]

    def close(self) -> None:
        """Close the connections for good."""
        self._pool.shutdown()
        self._disconnect()

    def _disconnect(self) -> None:
        for connection in self._connections:
            connection.close()


def _written(body: dict[str, Any], client: Client, upload: bool) -> bytes:
    """Return the body as JSON, its pictures as ids of uploads if so wished."""
    if upload:
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image_url":
                    part["image_url"] = {"file_id": client.upload(part["image_url"]["url"])}
    return json.dumps(body).encode()


def _ask(connection: http.client.HTTPConnection, body: bytes) -> str:
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"port {connection.port}: {error!r}") from error
    if response.status != 200:
        raise BenchError(f"HTTP {response.status}: {data[:300].decode(errors='replace')}")
    if response.headers.get_content_type() == "text/event-stream":
        return streamed_text(data)
    text: str = json.loads(data)["choices"][0]["message"]["content"]
    return text


def streamed_text(data: bytes) -> str:
    """Return the text of a whole stream of server-sent events.

    Raises:
        BenchError: it holds an error, does not end in ``[DONE]`` or lacks tokens.
    """
    events = [line[len(b"data: ") :] for line in data.splitlines() if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise BenchError(f"the stream does not end in [DONE]: {data[-300:]!r}")
    text, tokens = [], None
    for event in events[:-1]:
        chunk = json.loads(event)
        if "error" in chunk:
            raise BenchError(f"the stream holds an error: {event!r}")
        text += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != STREAM_TOKENS:
        raise BenchError(f"the stream holds {tokens} tokens instead of {STREAM_TOKENS}")
    return "".join(text)


def text(model: str, number: int) -> dict[str, Any]:
    """Return the body of a short question that asks for one token."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"What is {number} in words?"}],
        "temperature": 0,
        "max_tokens": 1,
    }


def _picture(model: str, number: int) -> dict[str, Any]:
    url = "data:image/jpeg;base64," + base64.b64encode(drawn_jpeg(number)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    return text(model, number) | {"messages": [{"role": "user", "content": content}]}


def _stream(model: str, number: int) -> dict[str, Any]:
    return text(model, number) | {
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def drawn_jpeg(number: int) -> bytes:
    """Return a 280×280 JPEG of shapes on soft noise, about 12 kB; no two numbers share one."""
    rng = random.Random(number)  # noqa: S311 -- no secret
    coarse = Image.frombytes("RGB", (20, 20), rng.randbytes(1200))
    picture = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = rng.randrange(SIDE - 80), rng.randrange(SIDE - 80)
        colour = tuple(rng.randbytes(3))
        rng.choice((pen.ellipse, pen.rectangle))((x, y, x + 70, y + 70), fill=colour)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return data.getvalue()


TEXT = Case("text, 1 token", text)
PICTURE = Case(f"{SIDE}×{SIDE} picture, 1 token", _picture)
STREAMED = Case(f"{STREAMS} streams × {STREAM_TOKENS} tokens", _stream, streams=STREAMS, warm_up=2)
