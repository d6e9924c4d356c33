"""Memory after a thousand 12-megapixel pictures, all different: ``python -m bench.memory``.

Each is a JPEG of about 2.7 MB that the server has not seen before and must decode. It is told how
much the process that speaks HTTP holds before, on the way, after, and when nobody has asked for a
while. It may not exceed the state after the first pictures by more than the configured caches and a
tenth, and when it is quiet not the state before any picture by more than that.

Without ``--vllm`` the engine only looks at the pixels (``bench.engineless``): what grows is ours.
With it the demo profile is served by vLLM, whose cache of processed pictures is allowed for.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import psutil
from PIL import Image

from bench.engineless import engineless
from bench.media import QUALITY, landscape
from bench.servers import HOST, BenchError, ours
from qwen2vl_serve.launch.idle_memory import QUIET_SECONDS
from qwen2vl_serve.profile import load_profile

CLIENTS = 4
FIRST = 40
"""Pictures until libraries are loaded and every thread has decoded some: the state to compare."""

SHARE = 0.10
KNOWN_KEYS_BYTES = 1000 * 1024
"""What 1,000 remembered keys take at most (``media.loader.KNOWN_KEYS``), well rounded up."""


@dataclass(frozen=True)
class Target:
    """A process to fill: its port, how to read its memory in bytes, what its caches may hold."""

    port: int
    rss: Callable[[], int]
    caches: int


def _rows(picture: Image.Image) -> tuple[bytes, list[bytes], bytes]:
    """Return a picture as the JPEG's head, its rows of blocks, and its end.

    With restart markers the rows stand alone, so that any order of them is a picture of its own.
    """
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY, restart_marker_rows=1)
    whole = data.getvalue()
    scan = whole.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(whole[scan + 2 : scan + 4])
    rows = re.split(rb"\xff[\xd0-\xd7]", whole[start:-2])
    return whole[:start], rows, whole[-2:]


def photos(picture: Image.Image) -> Iterator[bytes]:
    """Yield JPEGs of a picture, no two alike: two rows of blocks have changed places."""
    head, rows, end = _rows(picture)
    for one, other in itertools.combinations(range(len(rows)), 2):
        order = [*rows]
        order[one], order[other] = order[other], order[one]
        scan = order[0] + b"".join(
            bytes([0xFF, 0xD0 + number % 8]) + row for number, row in enumerate(order[1:])
        )
        yield head + scan + end


def fill(target: Target, pictures: int, every: int) -> list[tuple[int, int]]:
    """Send so many pictures from several clients; return (pictures so far, resident bytes).

    The last of these is taken when the server has been quiet for a while.

    Raises:
        BenchError: a picture was not answered, or not decoded anew.
    """
    samples = [(0, target.rss())]
    fresh = photos(landscape())
    sent = 0
    with ThreadPoolExecutor(CLIENTS) as clients:
        while sent < pictures:
            count = min(FIRST if sent == 0 else every, pictures - sent)
            for _ in clients.map(
                lambda data: _ask(target.port, data), itertools.islice(fresh, count)
            ):
                sent += 1
            time.sleep(1)  # what is under way ends; nothing is sent
            samples.append((sent, target.rss()))
            print(f"{sent:6d} pictures {samples[-1][1] / 2**20:8.0f} MiB", flush=True)
    time.sleep(QUIET_SECONDS + 10)
    return [*samples, (sent, target.rss())]


def _ask(port: int, data: bytes) -> None:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}
    body = {"messages": [message], "max_tokens": 1, "include_media_info": True}
    connection = HTTPConnection(HOST, port, timeout=120)
    try:
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchError(f"HTTP {answer.status}: {text[:300]!r}")
    info = json.loads(text)["media"][0]
    if info["cached"] or info["width"] * info["height"] != 12_000_000:
        raise BenchError(f"not decoded anew: {info}")


@contextmanager
def looking() -> Iterator[Target]:
    """Serve with an engine that only looks: no cache but the remembered keys."""
    with engineless() as server:
        yield Target(server.port, server.rss, KNOWN_KEYS_BYTES)


@contextmanager
def computing() -> Iterator[Target]:
    """Serve the demo profile with vLLM."""
    cache = load_profile("demo").engine.mm_processor_cache_gb or 0.0
    with tempfile.TemporaryDirectory(prefix="memory-") as folder, ours("demo", Path(folder)) as one:
        process = psutil.Process(one.pid)
        caches = int(cache * 2**30) + KNOWN_KEYS_BYTES
        yield Target(one.port, lambda: int(process.memory_info().rss), caches)


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, print and judge; 0, or 1 when memory grew beyond what it may."""
    arguments = _parser().parse_args(argv)
    try:
        with computing() if arguments.vllm else looking() as target:
            samples = fill(target, arguments.pictures, arguments.every)
    except BenchError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    (_, start), (_, first), *_, (_, last), (_, quiet) = samples
    limits = [size * (1 + SHARE) + target.caches for size in (first, start)]
    for name, size, limit in zip(("at the end", "when quiet"), (last, quiet), limits, strict=True):
        print(f"{name} {size / 2**20:.0f} MiB, allowed {limit / 2**20:.0f} MiB")
    print(f"before any picture {start / 2**20:.0f} MiB")
    within = last <= limits[0] and quiet <= limits[1]
    print("within what is allowed" if within else "BEYOND what is allowed")
    return 0 if within else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=int, default=1000, help="how many, more than 40 (1000)")
    parser.add_argument("--every", type=int, default=96, help="pictures between samples (96)")
    parser.add_argument("--vllm", action="store_true", help="serve with vLLM, on a CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
