"""Thousands of clients that take their time do not stop one that does not."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import requests

from tests.conftest import ServerProcess
from tests.served import HELLO, eventually

SLOW = 5000
DESCRIPTORS = SLOW + 500
MOST_BYTES_EACH = 48 * 1024
"""Of the server's memory for each connection; measured are 16 KiB, the larger part by the
tasks that read a body."""

GOOD_SECONDS = 30.0
"""A server that waited for the slow ones would take the 300 s that they are given."""

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
SLOW_HEAD = HEAD + b"X-Slow: "
SLOW_BODY = HEAD + b'Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"messages": ['


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let this process open enough; the server begins with 1024 and raises them itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"this system allows {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def good(server: ServerProcess, path: str = "/chat/completions/explain") -> float:
    """Ask three times as a good client does; return the seconds until the soonest answer.

    What the slow ones do to it they do each time; a machine that stands still does not.
    """
    taken = []
    for _ in range(3):
        begun = time.monotonic()
        answer = requests.post(server.url + path, json=HELLO, timeout=60)
        assert answer.status_code == 200, answer.text
        taken.append(time.monotonic() - begun)
    return min(taken)


def test_slow_connections_do_not_stop_a_good_one(
    descriptors: None, launch_server: Callable[..., ServerProcess]
) -> None:
    """5,000 heads and bodies that never end: others are served, and memory is bounded."""
    # As a login shell sets it; what is hard stays.
    command = ["prlimit", "--nofile=1024:", sys.executable, "-m", "tests.serve_fake"]
    server = launch_server(
        "up", "limits.header_seconds=300", "limits.body_seconds=300", command=command
    )
    server.wait_ready()
    process = psutil.Process(server.process.pid)
    port = int(server.root.rpartition(":")[2])
    good(server)
    before, files = process.memory_info().rss, process.num_fds()
    with contextlib.ExitStack() as stack:
        slow = []
        for number in range(SLOW):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            one.sendall(SLOW_BODY if number % 2 else SLOW_HEAD)
            slow.append(one)
        eventually(lambda: process.num_fds() >= files + SLOW - 5, 60)
        taken = [good(server)]
        for _ in range(2):
            for one in slow:
                one.send(b"1")
            taken.append(good(server))
        good(server, "/chat/completions")
        held = process.memory_info().rss - before
        assert max(taken) < GOOD_SECONDS
        assert held / SLOW < MOST_BYTES_EACH
        print(f"{held / SLOW / 1024:.1f} KiB a connection, {max(taken):.2f} s")
    eventually(lambda: process.num_fds() <= files + 50, 60)
    eventually(lambda: server.metric("qwen2vl_requests_in_flight ") == 0)
    assert server.metric("qwen2vl_body_held_bytes ") == 0
    assert server.stop() == 0
