"""Class K: clients that leave, that are slow on purpose, and too many at once."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from bench.fuzz.site import Script
from tests.hostile.case import GOOD, Case, Outcome, Refusal, asked, image, shown
from tests.hostile.target import Answer, Target, answer_of

TITLE = "load"

FREED_SECONDS, FREED_LOOKS = 10.0, 30
"""A place is free within one second, at the first looks; machines that do other work are given
more. Where one stands still, seconds pass without a look."""

LONG: dict[str, Any] = asked(max_tokens=3900, ignore_eos=True, temperature=1.0)
STREAM = LONG | {"stream": True}


def cases() -> list[Case]:
    """Return the class."""
    return [
        Case("K", "leaves while it is answered", leaves(LONG, begun)),
        Case("K", "leaves in mid-stream", leaves(STREAM, first_event)),
        Case("K", "leaves 8 answers at once", leaves(LONG | {"n": 8}, begun)),
        Case("K", "resets in mid-stream", leaves(STREAM, first_event, reset=True)),
        Case("K", "leaves while its picture is fetched", leaves_fetching, needs="fetching"),
        Case("K", "leaves with half a body sent", half_sent),
        Case("K", "leaves right behind the head", head_only),
        Case("K", "60 clients that leave at once", crowd_leaves),
        Case("K", "headers that drip", slow(drip_header)),
        Case("K", "a request line that drips", slow(drip_line)),
        Case("K", "a connection that says nothing", slow(silence)),
        Case("K", "a body that drips", slow(drip_body), needs="limits"),
        Case("K", "a chunked body that drips", slow(drip_chunks), needs="limits"),
        Case("K", "a reader that does not read", idle_reader),
        Case("K", "400 connections that say nothing", many_silent),
        Case("K", "200 connections in the middle of a head", many_heads),
        Case("K", "100 requests at once", flood),
        Case(
            "K", "100 requests at once, refused as they should be", refused_politely, True, "limits"
        ),
    ]


def _open(target: Target, body: dict[str, Any]) -> socket.socket:
    line = target.connect()
    line.sendall(target.post(json.dumps(body).encode()))
    return line


def _working(target: Target) -> bool:
    return bool(target.busy())


def begun(target: Target, line: socket.socket) -> None:
    """Wait until the server works on it."""
    deadline = time.monotonic() + 60
    while not _working(target) and time.monotonic() < deadline:
        time.sleep(0.02)


def first_event(target: Target, line: socket.socket) -> None:
    """Read the beginning of the answer."""
    while b"data: " not in line.recv(65536):
        pass


def _freed(target: Target) -> Outcome:
    began = time.monotonic()
    looks = 0
    while held := target.busy():
        looks += 1
        if time.monotonic() - began > FREED_SECONDS and looks > FREED_LOOKS:
            return Outcome(f"{FREED_SECONDS:.0f} s later still held: {held}")
        # Gauges of vLLM's stand still while its engine has nothing to do.
        if wrong := target.good():
            return Outcome(wrong)
    return GOOD


def leaves(
    body: dict[str, Any], until: Callable[[Target, socket.socket], None], reset: bool = False
) -> Callable[[Target], Outcome]:
    """A client that asks for much and is gone."""

    def run(target: Target) -> Outcome:
        with _open(target, body) as line:
            until(target, line)
            if reset:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return _freed(target)

    return run


def leaves_fetching(target: Target) -> Outcome:
    """The site takes the connection and says nothing."""
    url = target.sites.put("silent")
    target.sites.open.scripts["silent"] = Script((), ending="hang")
    before = target.sites.open.connections
    with _open(target, shown(image(url))):
        deadline = time.monotonic() + 60
        while target.sites.open.connections == before and time.monotonic() < deadline:
            time.sleep(0.02)
    return _freed(target)


def half_sent(target: Target) -> Outcome:
    """Twenty times the beginning of a body."""
    request = target.post(json.dumps(asked("x" * 1000)).encode())
    for _ in range(20):
        with target.connect() as line:
            line.sendall(request[:-500])
    return _freed(target)


def head_only(target: Target) -> Outcome:
    """Twenty times a head that announces a body."""
    head = target.post(b"x" * 9).rpartition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    for _ in range(20):
        with target.connect() as line:
            line.sendall(head)
    return _freed(target)


def crowd_leaves(target: Target) -> Outcome:
    """More than are worked on at once; some are in the queue when all leave."""
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(_open(target, LONG | {"max_tokens": 500}))
        begun(target, stack)  # type: ignore[arg-type]  # any connection
    return _freed(target)


Drip = tuple[bytes, bytes]


def drip_header(target: Target) -> Drip:
    """A header every now and then."""
    return target.head("GET", "/v1/models"), b"X: y\r\n"


def drip_line(target: Target) -> Drip:
    """A letter every now and then."""
    return b"GET /", b"a"


def silence(target: Target) -> Drip:
    """Nothing."""
    return b"", b""


def drip_body(target: Target) -> Drip:
    """A byte of a body every now and then."""
    lines = ("Content-Type: application/json", "Content-Length: 100000")
    return target.head("POST", "/v1/chat/completions", *lines) + b"\r\n", b" "


def drip_chunks(target: Target) -> Drip:
    """A chunk every now and then."""
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    return target.head("POST", "/v1/chat/completions", *lines) + b"\r\n", b"1\r\n \r\n"


def slow(words: Callable[[Target], Drip]) -> Callable[[Target], Outcome]:
    """A client that is to be cut off: 408, or the end."""

    def run(target: Target) -> Outcome:
        first, drip = words(target)
        answer, seconds = dripped(target, first, drip)
        if answer is None:
            return Outcome(f"still connected after {seconds:.0f} s")
        if answer.status == 0:
            return GOOD if not drip else Outcome(unlike="closed without a word")
        return Refusal(408, ("request_timeout",)).judge(first + drip, answer)

    return run


def dripped(target: Target, first: bytes, drip: bytes) -> tuple[Answer | None, float]:
    """Send ``drip`` twice a second until the server ends it."""
    began = time.monotonic()
    with target.connect() as line:
        line.sendall(first)
        line.settimeout(0.5)
        while (seconds := time.monotonic() - began) < target.patience:
            try:
                line.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                try:
                    line.sendall(drip)
                    continue
                except OSError:
                    return Answer(0), seconds
            except OSError:
                return Answer(0), seconds
            line.settimeout(30)
            return answer_of(line, first.partition(b" ")[0] or b"GET", began), seconds
    return None, seconds


def idle_reader(target: Target) -> Outcome:
    """It asks for eight long streams and reads none; others are served, and then it leaves."""
    with target.connect() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(target.post(json.dumps(STREAM | {"n": 8}).encode()))
        for _ in range(5):
            time.sleep(0.5)
            if wrong := target.good():
                return Outcome(wrong)
    return _freed(target)


def _held_open(target: Target, count: int, words: bytes) -> Outcome:
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(target.connect()).sendall(words)
        began = time.monotonic()
        wrong = target.good()
        seconds = time.monotonic() - began
    if wrong is None and seconds > 15:
        wrong = f"a good request took {seconds:.1f} s"
    return Outcome(wrong)


def many_silent(target: Target) -> Outcome:
    """They hold their sockets while a good one asks."""
    return _held_open(target, 400, b"")


def many_heads(target: Target) -> Outcome:
    """The same with a part of a request."""
    return _held_open(target, 200, target.head("GET", "/v1/models"))


def _at_once(target: Target, count: int = 100) -> list[Answer]:
    gate = threading.Barrier(count)

    def ask(number: int) -> Answer:
        gate.wait(120)
        return target.chat(asked(f"Hello {number}", max_tokens=16, ignore_eos=True))[0]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def flood(target: Target) -> Outcome:
    """Every one is answered or refused; none hangs, none fails."""
    odd = {one.status for one in _at_once(target)} - {200, 429, 503}
    return Outcome(f"status {sorted(odd)}" if odd else None)


def refused_politely(target: Target) -> Outcome:
    """Some are refused, each with a time to come back after; none of those answered is cut."""
    answers = _at_once(target)
    refusals = [one for one in answers if one.status != 200]
    if not refusals or len(refusals) == len(answers):
        return Outcome(f"{len(refusals)} of {len(answers)} refused")
    for one in refusals:
        error = json.loads(one.body)["error"]
        if one.status != 503 or error["code"] != "overloaded" or "retry-after" not in one.headers:
            return Outcome(f"{one.told} {error}")
    used = [json.loads(one.body).get("usage", {}) for one in answers if one.status == 200]
    short = [one for one in used if one.get("completion_tokens", 16) != 16]
    return Outcome(f"{len(short)} answers were cut" if short else None)
