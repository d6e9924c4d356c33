"""Asks a running server, or fleet, about pictures, and times whole answers."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from bench.fleet_model import WARM, Outcome, Service
from bench.fleet_traffic import Request
from bench.overload_client import TOKENS, ask, pictures
from bench.servers import HOST, BenchError

_KNOWN = re.compile(rb"^qwen2vl_cache_(hits|misses)_total\{(.*)\} (\S+)$", re.MULTILINE)


async def timed(port: int, request: bytes) -> float:
    """Return the seconds of a whole answer.

    Raises:
        BenchError: it was not whole.
    """
    begun = time.perf_counter()
    outcome = await ask(port, request)
    if outcome.end != "answered":
        raise BenchError(f"a request {outcome.end}: {outcome.said!r}")
    return time.perf_counter() - begun


async def measured(
    port: int, model: str, requests: int, places: int, cached: int
) -> tuple[Service, dict[str, Any]]:
    """Return the times of a server's answers about new and known pictures, and the conditions.

    With one client each of so many pictures is asked about twice; then ``places`` clients ask
    about known ones, which tells by how much each slows the others.
    """
    fresh = pictures(model)
    for request in itertools.islice(fresh, 3):
        await timed(port, request)
    miss, hit, known = [], [], []
    for request in itertools.islice(fresh, requests):
        miss.append(await timed(port, request))
        hit.append(await timed(port, request))
        known.append(request)
    crowd: list[float] = []

    async def client(mine: Iterator[bytes]) -> None:
        crowd.extend([await timed(port, request) for request in mine])

    share = [known[number::places] * 2 for number in range(places)]
    await asyncio.gather(*(client(iter(one)) for one in share))
    slowdown = max(statistics.mean(crowd) / statistics.mean(hit) - 1, 0.0) / max(places - 1, 1)
    told = {
        "model": model,
        "tokens": TOKENS,
        "requests": requests,
        "hit_median": statistics.median(hit),
        "miss_median": statistics.median(miss),
        "crowd_median": statistics.median(crowd),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }
    return Service(hit, miss, slowdown, places, cached), told


async def replayed(port: int, model: str, requests: Sequence[Request]) -> Outcome:
    """Send requests at their times; return what became of them, after the warm-up."""
    fresh = pictures(model)
    bodies: dict[str, bytes] = {}
    for request in requests:
        if request.key not in bodies:
            bodies[request.key] = next(fresh)
    outcome = Outcome("", 0)
    told_from = requests[-1].at * WARM
    begun = time.perf_counter()
    before = (0.0, 0.0)

    async def one(request: Request) -> None:
        await asyncio.sleep(max(begun + request.at - time.perf_counter(), 0.0))
        seconds = await timed(port, bodies[request.key])
        if request.at >= told_from:
            outcome.seconds.append(seconds)

    async def count() -> None:
        nonlocal before
        await asyncio.sleep(max(begun + told_from - time.perf_counter(), 0.0))
        before = await asyncio.to_thread(known, port)

    await asyncio.gather(count(), *map(one, requests))
    hits, misses = await asyncio.to_thread(known, port)
    looked = hits + misses - sum(before)
    outcome.hits = round((hits - before[0]) / max(looked, 1.0) * len(outcome.seconds))
    return outcome


def known(port: int) -> tuple[float, float]:
    """Return how often pictures were known to the replica that got them, and how often not."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=20) as answer:
        page = answer.read()
    counts = {b"hits": 0.0, b"misses": 0.0}
    for what, labels, value in _KNOWN.findall(page):
        if b'cache="known"' in labels:
            counts[what] += float(value)
    return counts[b"hits"], counts[b"misses"]
