"""Servers that the runner starts: ours and stock vLLM's, with one profile and one key."""

from __future__ import annotations

import http.client
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import psutil

from bench.servers import (
    HOST,
    Server,
    environment_for,
    free_port,
    our_command,
    run_process,
    stock_command,
    wait_ready,
)
from qwen2vl_serve.profile import load_profile

SETTINGS = (
    "limits.header_seconds=3",
    "limits.body_seconds=5",
    "limits.max_in_flight=16",
    "limits.max_queued=16",
    "limits.queue_seconds=10",
    "limits.max_media_bytes=500000",
    "limits.max_media_pixels=3000000",
    "limits.max_media_frames=30",
    "media.download_seconds=3",
    "server.shutdown_timeout=5",
)
"""Of ours: limits that a case can reach, and times that it can wait for."""

FETCH_SECONDS = "1"
"""Of stock: for the first of three attempts, each four times as long as the one before."""


@dataclass(frozen=True)
class Own:
    """A server of the runner's own."""

    kind: str
    url: str
    key: str
    process: Popen[bytes]
    log: Path

    @property
    def ready_path(self) -> str:
        return "/health/ready" if self.kind == "ours" else "/health"

    def ready(self) -> int:
        """Return the status of the readiness probe, 0 where nobody answers it."""
        line = http.client.HTTPConnection(HOST, int(self.url.rpartition(":")[2]), timeout=5)
        try:
            line.request("GET", self.ready_path)
            return line.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            line.close()

    def core(self) -> psutil.Process:
        """Return the process of the engine."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return next(one for one in family if "EngineCore" in one.name())


Start = Callable[..., "Iterator[Own]"]


def command(kind: str, port: int, key: str, settings: Sequence[str] = ()) -> list[str]:
    """Return the command line; ``settings`` are for ours alone."""
    profile = load_profile("demo", [f"host={HOST}", f"port={port}"])
    if kind == "stock":
        return [*stock_command(profile), *(["--api-key", key] if key else [])]
    return [*our_command(profile), *(word for one in settings for word in ("--set", one))]


@contextmanager
def started(
    kind: str, folder: Path, settings: Sequence[str] = (), *, await_ready: bool = True
) -> Iterator[Own]:
    """Start ``ours`` or ``stock`` with a key of its own; it is gone when the block is left.

    Raises:
        BenchError: it did not become ready.
    """
    port, key = free_port(), f"sk-{secrets.token_hex(16)}"
    log = folder / f"{kind}-{port}.log"
    environment = environment_for(folder) | {"VLLM_IMAGE_FETCH_TIMEOUT": FETCH_SECONDS}
    if kind == "ours":
        environment["QWEN2VL_API_KEY"] = key
    words = command(kind, port, key, (*SETTINGS, *settings))
    with run_process(words, log, environment) as process:
        own = Own(kind, f"http://{HOST}:{port}", key, process, log)
        if await_ready:
            wait_ready(process, log, Server(kind, port, process.pid, "demo"), own.ready_path)
        yield own


def is_alive(process: Popen[bytes]) -> Callable[[], bool]:
    """Return what tells whether a process still runs."""
    return lambda: process.poll() is None and Path(f"/proc/{os.getpid()}").exists()
