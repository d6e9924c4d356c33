"""Memory is given back in quiet times, once for each, and not while there is work."""

from __future__ import annotations

import subprocess
import sys

from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.launch.idle_memory import QUIET_SECONDS, IdleMemory


def looks(idle: IdleMemory, seconds: int) -> list[bool]:
    return [idle.look() for _ in range(seconds)]


def test_once_after_each_quiet_time_that_follows_pictures() -> None:
    """The look that completes the quiet time says so; further quiet, or text alone, does not."""
    metrics = Metrics()
    idle = IdleMemory(metrics)
    assert not any(looks(idle, 3 * QUIET_SECONDS)), "no picture has come"
    for kind in ("image", "video"):
        metrics.media_bytes.labels(kind).inc(1000)
        assert looks(idle, QUIET_SECONDS + 1) == [False] * QUIET_SECONDS + [True]
        assert not any(looks(idle, 2 * QUIET_SECONDS))


def test_work_ends_the_quiet() -> None:
    """A request that runs, and pictures that come, make the time begin anew."""
    metrics = Metrics()
    idle = IdleMemory(metrics)
    metrics.media_bytes.labels("image").inc(1000)
    looks(idle, QUIET_SECONDS - 1)
    metrics.in_flight.inc()
    assert not any(looks(idle, 2 * QUIET_SECONDS))
    metrics.in_flight.dec()
    metrics.media_bytes.labels("image").inc(1000)
    assert looks(idle, QUIET_SECONDS + 1).index(True) == QUIET_SECONDS


PROGRAM = """
from pathlib import Path
from qwen2vl_serve.launch.idle_memory import give_back
def pages(): return int(Path("/proc/self/statm").read_text().split()[1])
raised = bytearray(30 << 20)
del raised  # from here on glibc keeps blocks of that size
before, blocks, pins = pages(), [], []
for _ in range(40):
    blocks.append(bytearray(b"x") * (4 << 20))
    pins.append(bytearray(b"x") * 60_000)
blocks.clear()
kept = pages() - before
give_back()
print(kept * 4096 >> 20, (pages() - before) * 4096 >> 20)
"""


def test_what_malloc_keeps_is_given_back() -> None:
    """160 MiB of freed blocks, held by small ones between them, leave the process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert left < 20
    assert left <= kept
