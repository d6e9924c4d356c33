"""A light client for many requests at once: streamed answers, each on a connection of its own.

It runs on the cores of the server that it measures, so it does no more than it must: requests are
written as prepared bytes, answers are not parsed but searched for what is asked about them.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bench.servers import HOST
from bench.traffic import drawn_jpeg

TOKENS = 128
"""Of every answer."""

PATIENCE_SECONDS = 10.0
"""A client without a first token after so long closes its connection."""

REFUSED_PAUSE_SECONDS = 0.1
"""How long a client of a closed loop that was refused stays away."""

PICTURES = 64
"""Pictures that are drawn; each is sent under many numbers, each time as a file of its own."""

_TOKEN = re.compile(rb'"content": ?"[^"]')
_USAGE = re.compile(rb'"completion_tokens": ?%d\b' % TOKENS)

End = Literal["answered", "refused", "gave up", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times in seconds.

    ``late`` is what its sending came after its time, the others count from the sending: ``head``
    to the first byte of an answer and ``first`` to the first token, None where there was none.
    ``began`` is when it was sent and ``at`` when it ended, on the loop's clock.
    """

    end: End
    began: float
    at: float
    late: float = 0.0
    head: float | None = None
    first: float | None = None
    said: bytes = b""


class _Asking(asyncio.Protocol):
    """One request on one connection; ``ended`` gets its outcome."""

    def __init__(self, request: bytes, late: float, began: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Outcome] = self.loop.create_future()
        self.request, self.late, self.began = request, late, began
        self.head: float | None = None
        self.first: float | None = None
        self.found = bytearray()
        self.transport: asyncio.Transport | None = None

    # A stream's transport is what TCP has; uvloop's is of no such class.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self.request)
        self.patience = self.loop.call_later(PATIENCE_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self.head is None:
            self.head = self.loop.time() - self.began
        self.found += data
        if self.first is None and _TOKEN.search(self.found):
            self.first = self.loop.time() - self.began
            self.patience.cancel()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.patience.cancel()
        if not self.ended.done():
            self._end(self._judged())

    def _judged(self) -> End:
        status = bytes(self.found[9:12])
        if status in (b"503", b"429"):
            return "refused"
        whole = self.found.find(b"data: [DONE]") >= 0 and _USAGE.search(self.found)
        return "answered" if status == b"200" and whole and self.first else "failed"

    def _give_up(self) -> None:
        if not self.ended.done():
            self._end("gave up")
        if self.transport is not None:
            self.transport.abort()

    def _end(self, end: End) -> None:
        said = bytes(self.found[-300:]) if end == "failed" else b""
        now = self.loop.time()
        self.ended.set_result(Outcome(end, self.began, now, self.late, self.head, self.first, said))


async def ask(port: int, request: bytes, due: float | None = None) -> Outcome:
    """Send a request and return how it ended; ``due`` is when it should have been sent."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    late = 0.0 if due is None else began - due
    try:
        _, asking = await loop.create_connection(lambda: _Asking(request, late, began), HOST, port)
    except OSError as error:
        return Outcome("failed", began, loop.time(), late, said=repr(error).encode())
    return await asking.ended


async def closed_loop(
    port: int, requests: Iterator[bytes], clients: int, seconds: float
) -> list[list[Outcome]]:
    """Have so many clients ask, each again when it was answered, until the time is over.

    Returned are each client's outcomes in their order; the last ones end after the time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client() -> list[Outcome]:
        outcomes = []
        while loop.time() < end:
            outcomes.append(await ask(port, next(requests)))
            if outcomes[-1].end != "answered":
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)
        return outcomes

    return await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(
    port: int, requests: Iterator[bytes], rate: float, seconds: float
) -> list[Outcome]:
    """Send requests at random times, ``rate`` a second on average, whatever becomes of them."""
    loop = asyncio.get_running_loop()
    rng = random.Random(1)  # noqa: S311  (not for secrets)
    asked: list[asyncio.Task[Outcome]] = []
    start = due = loop.time()
    while (due := due + rng.expovariate(rate)) < start + seconds:
        if (ahead := due - loop.time()) > 0:
            await asyncio.sleep(ahead)
        asked.append(loop.create_task(ask(port, next(requests), due)))
    return await asyncio.gather(*asked)


def text(model: str) -> Iterator[bytes]:
    """Yield requests of a short question, no two alike."""
    for number in itertools.count():
        yield _request(_body(model, f"What is {number} in words?"))


def pictures(model: str) -> Iterator[bytes]:
    """Yield requests about a 280×280 picture, no two alike; see ``drawn_jpeg``."""
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,HERE"}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    before, after = _body(model, content).split(b"HERE")
    rests = [base64.b64encode(drawn_jpeg(number)[2:]) for number in range(PICTURES)]
    for number in itertools.count():
        # A comment behind the file's first marker: 18 bytes, whose base64 needs no filling.
        start = base64.b64encode(b"\xff\xd8\xff\xfe\x00\x0e%012d" % number)
        yield _request(before + start + rests[number % PICTURES] + after)


def _body(model: str, content: Any) -> bytes:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def _request(body: bytes) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    ) + body


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    """Return what ``work`` returns and the share of one core that this process took for it."""
    begun, spent = time.perf_counter(), time.process_time()
    done = await work
    return done, (time.process_time() - spent) / (time.perf_counter() - begun)


Requests = Callable[[str], Iterator[bytes]]
