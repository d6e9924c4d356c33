"""Asks a running server, or fleet, about pictures, and times whole answers.

It runs on the cores that it measures: requests are bytes that were made before, and an answer is
read to its end before it is looked at. Each has a connection of its own, as users have.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

from bench.fleet_model import WARM, Outcome
from bench.fleet_traffic import Request
from bench.overload_figures import percentile
from bench.servers import HOST, BenchError
from bench.traffic import drawn_jpeg

TOKENS = 128
"""Of every answer, if nothing else is said."""

PATIENCE_SECONDS = 120.0
"""A whole answer takes no longer."""

STRAYS = 0.1
"""So large a share of a crowd's answers may come from another replica than was meant."""

_KNOWN = re.compile(rb"^qwen2vl_cache_(hits|misses)_total\{(.*)\} (\S+)$", re.MULTILINE)
_REPLICA = re.compile(rb"^x-qwen2vl-replica: *(\S+)", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: its seconds from the sending to its end, and the replica that gave it.

    One server that is no fleet has no name.
    """

    seconds: float
    replica: str


class Known(NamedTuple):
    """A request about a picture that ``replica`` has been asked about."""

    replica: str
    request: bytes


class Client:
    """Asks the server at ``port`` for streamed answers of ``tokens`` tokens."""

    def __init__(self, port: int, model: str, tokens: int = TOKENS) -> None:
        self.port = port
        self.model = model
        self._tokens = tokens
        self._whole = re.compile(rb'"completion_tokens": ?%d\b' % tokens)
        # Another run's pictures may be cached: no two runs have one in common.
        self._numbers = count(time.time_ns())

    def new(self, number: int) -> list[bytes]:
        """Return so many requests, each about a picture that nobody has asked about."""
        return list(islice(self._requests(), number))

    def _requests(self) -> Iterator[bytes]:
        for number in self._numbers:
            url = "data:image/jpeg;base64," + base64.b64encode(drawn_jpeg(number)).decode()
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is in the picture?"},
            ]
            fields = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self._tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            body = json.dumps(fields).encode()
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            )
            yield head % (HOST.encode(), len(body)) + body

    async def ask(self, request: bytes) -> Answer:
        """Return the answer.

        Raises:
            BenchError: it was not whole, or took longer than ``PATIENCE_SECONDS``.
        """
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                reader, writer = await asyncio.open_connection(HOST, self.port)
                try:
                    writer.write(request)
                    said = await reader.read()
                finally:
                    writer.close()
        except OSError as error:  # a TimeoutError is one
            raise BenchError(f"a request failed: {error!r}") from error
        seconds = time.perf_counter() - begun
        head, _, body = said.partition(b"\r\n\r\n")
        if not (head[9:12] == b"200" and b"data: [DONE]" in body and self._whole.search(body)):
            raise BenchError(f"a request was not answered in full: {said[-300:]!r}")
        name = _REPLICA.search(head)
        return Answer(seconds, name[1].decode() if name else "")

    async def busy(self, clients: Sequence[Known], each: int) -> list[list[float]]:
        """Return the seconds of ``each`` answers of every client, while all of them have one.

        A client asks the same again and again, until the last one has its answers. What came from
        another replica than was meant is left out.

        Raises:
            BenchError: an answer was not whole, or more than ``STRAYS`` of them were such.
        """
        taken: list[list[Answer]] = [[] for _ in clients]

        async def client(one: Known, mine: list[Answer]) -> None:
            while min(map(len, taken)) < each:
                mine.append(await self.ask(one.request))

        await asyncio.gather(*map(client, clients, taken))
        # When the last of these ended, nobody had left yet.
        meant = [
            [answer.seconds for answer in mine[:each] if answer.replica == one.replica]
            for one, mine in zip(clients, taken, strict=True)
        ]
        asked = each * len(clients)
        strays = asked - sum(map(len, meant))
        if strays > STRAYS * asked or not all(meant):
            raise BenchError(
                f"{strays} of {asked} answers came from another replica than before: measure a "
                "fleet whose routing is affinity, with args.at_ease of at least --places"
            )
        return meant


async def replayed(client: Client, requests: Sequence[Request]) -> tuple[Outcome, dict[str, Any]]:
    """Send requests at their times; return what became of them, after the warm-up, and conditions.

    Times are counted from the sending and stand in the order of the requests. ``late_p99`` is the
    99th percentile of the seconds that one was sent after its time, ``client_cpu`` the share of a
    core that this process took, ``answers_by_replica`` how many each gave.

    Raises:
        BenchError: an answer was not whole.
    """
    keys = list(dict.fromkeys(request.key for request in requests))
    bodies = dict(zip(keys, client.new(len(keys)), strict=True))
    told_from = requests[-1].at * WARM
    load = os.getloadavg()
    begun, spent = time.perf_counter(), time.process_time()

    async def one(request: Request) -> tuple[float, Answer]:
        await asyncio.sleep(max(begun + request.at - time.perf_counter(), 0.0))
        late = time.perf_counter() - begun - request.at
        return late, await client.ask(bodies[request.key])

    async def looked_up() -> tuple[float, float]:
        await asyncio.sleep(max(begun + told_from - time.perf_counter(), 0.0))
        return await asyncio.to_thread(known, client.port)

    before, found = await asyncio.gather(looked_up(), asyncio.gather(*map(one, requests)))
    taken = time.perf_counter() - begun
    spent = time.process_time() - spent
    hits, misses = await asyncio.to_thread(known, client.port)
    looked = hits + misses - sum(before)
    told = [both for request, both in zip(requests, found, strict=True) if request.at >= told_from]
    outcome = Outcome("", 0, [answer.seconds for _, answer in told])
    outcome.hits = round((hits - before[0]) / max(looked, 1.0) * len(told))
    by_replica = Counter(answer.replica for _, answer in told)
    return outcome, {
        "late_p99": percentile([late for late, _ in told], 0.99),
        "client_cpu": spent / taken,
        "answers_by_replica": sorted(by_replica.values(), reverse=True),
        "cpus": os.cpu_count(),
        "load": load,
    }


def known(port: int) -> tuple[float, float]:
    """Return how often pictures were known to the replica that got them, and how often not.

    Raises:
        OSError: the server does not tell its figures.
    """
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=20) as answer:
        page = answer.read()
    counts = {b"hits": 0.0, b"misses": 0.0}
    for what, labels, value in _KNOWN.findall(page):
        if b'cache="known"' in labels:
            counts[what] += float(value)
    return counts[b"hits"], counts[b"misses"]
