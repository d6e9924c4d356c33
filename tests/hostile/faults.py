"""Class L, life: the engine is killed or stops, the operator ends the server, early and late."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.hostile.case import GOOD, Outcome, asked
from tests.hostile.servers import Own, started

LONG: dict[str, Any] = asked("x", max_tokens=3900, ignore_eos=True, stream=True)
"""Some seconds of work."""

RED_SECONDS = 5.0
HUNG_SECONDS = 25.0
"""The five of ``server.hang_seconds``, and time for a slow machine to notice."""

END_SECONDS = 60.0

Verdicts = dict[str, Outcome]


@dataclass(frozen=True)
class Scenario:
    """A server's life of its own; ``play`` returns a verdict for each of ``checks``."""

    name: str
    checks: tuple[str, ...]
    play: Callable[[str, Path], Verdicts]
    ours: frozenset[str] = frozenset()
    """Checks that are not compared."""


def _post(own: Own, body: dict[str, Any], seconds: float = 60) -> requests.Response:
    return requests.post(
        f"{own.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {own.key}"},
        stream=True,
        timeout=seconds,
    )


def _begun(own: Own, body: dict[str, Any], seconds: float = 60) -> tuple[Any, Any]:
    """Return a stream of which the first event has come, and its further lines."""
    answer = _post(own, body, seconds)
    lines = answer.iter_lines()
    next(lines)
    return answer, lines


def _rest(lines: Any) -> list[bytes]:
    """Return what still comes, up to the end or the client's patience."""
    found = []
    with suppress(requests.RequestException):
        found.extend(line for line in lines if line)
    return found


def _told(lines: list[bytes], code: str) -> Outcome:
    """Judge the end of a stream that could not be finished."""
    if not lines or b'"error"' not in lines[-1]:
        end = lines[-1][:100] if lines else b""
        if b"[DONE]" in end and any(b'"error"' in line for line in lines):
            return GOOD  # the other check's business
        return Outcome(f"the stream ends without an error: {end!r}")
    error = json.loads(lines[-1].removeprefix(b"data: "))["error"]
    return Outcome(unlike=None if error["code"] == code else f"code {error['code']!r}, not {code}")


def _undone(lines: list[bytes]) -> Outcome:
    return Outcome("[DONE]" if any(b"[DONE]" in line for line in lines) else None)


def _red(own: Own, seconds: float) -> Outcome:
    deadline = time.monotonic() + seconds
    while own.ready() == 200:
        if time.monotonic() > deadline:
            return Outcome(f"still green after {seconds:.0f} s")
        time.sleep(0.1)
    return GOOD


def _exit(own: Own, wanted: int | None, seconds: float = END_SECONDS) -> Outcome:
    """``wanted`` None: any status but 0."""
    try:
        status = own.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return Outcome(f"still running after {seconds:.0f} s")
    if (status == 0) != (wanted == 0):
        return Outcome(f"exit status {status}")
    return Outcome(unlike=None if status == (wanted or 1) or wanted == 0 else f"status {status}")


def _nothing_left(family: list[psutil.Process], seconds: float = 10) -> Outcome:
    _, alive = psutil.wait_procs(family, seconds)
    left = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return Outcome(f"{len(left)} processes are left" if left else None)


def _family(own: Own) -> list[psutil.Process]:
    return psutil.Process(own.process.pid).children(recursive=True)


ERROR, UNDONE, RED, EXIT, LEFT = (
    "the stream ends with an error", "and without [DONE]", "readiness turns red",
    "exit status", "no process is left",
)  # fmt: skip


def killed(kind: str, folder: Path) -> Verdicts:
    """kill -9 of the engine in mid-stream."""
    with started(kind, folder) as own:
        family = _family(own)
        _, lines = _begun(own, LONG)
        own.core().kill()
        red = _red(own, RED_SECONDS)
        rest = _rest(lines)
        return {
            ERROR: _told(rest, "engine_unavailable"),
            UNDONE: _undone(rest),
            RED: red,
            EXIT: _exit(own, None),
            LEFT: _nothing_left(family),
        }


def stopped(kind: str, folder: Path) -> Verdicts:
    """SIGSTOP of the engine in mid-stream: it lives and does not move."""
    with started(kind, folder, ("server.hang_seconds=5",)) as own:
        family = _family(own)
        _, lines = _begun(own, LONG, seconds=HUNG_SECONDS)
        core = own.core()
        core.suspend()
        red = _red(own, HUNG_SECONDS)
        rest = _rest(lines)
        verdicts = {
            ERROR: _told(rest, "engine_unavailable"),
            UNDONE: _undone(rest),
            RED: red,
            EXIT: _exit(own, None) if kind == "ours" else GOOD,
        }
        if kind != "ours":
            core.resume()
            return verdicts | {LEFT: GOOD}
        return verdicts | {LEFT: _nothing_left(family)}


FINISHED, CUT, NEW = (
    "a short answer is finished", "an endless one says that it is cut", "nothing new is taken",
)  # fmt: skip


def ended(kind: str, folder: Path) -> Verdicts:
    """SIGTERM in mid-stream."""
    with started(kind, folder, ("server.shutdown_timeout=3",)) as own:
        family = _family(own)
        endless = {**LONG, "n": 8, "temperature": 1, "max_tokens": None}
        _, long_lines = _begun(own, endless)
        _, short_lines = _begun(own, {**LONG, "max_tokens": 100})
        own.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        try:
            new = _post(own, asked(), 5).status_code
        except requests.RequestException:
            new = 0
        short, long = _rest(short_lines), _rest(long_lines)
        verdicts = {
            FINISHED: Outcome(None if short[-1:] == [b"data: [DONE]"] else "it is cut"),
            CUT: _told(long, "shutting_down"),
            NEW: Outcome(f"status {new}" if new == 200 else None),
            EXIT: _exit(own, 0),
            LEFT: _nothing_left(family),
        }
        if kind == "ours":
            told = [line for line in own.log.read_text().splitlines() if " shutting_down " in line]
            whole = any(re.search(r" in=\d+ out=[1-9]\d* ttft=", line) for line in told)
            verdicts["the log has what the cut one used"] = Outcome(
                unlike=None if whole else f"{told}"
            )
        return verdicts


def hurried(kind: str, folder: Path) -> Verdicts:
    """SIGTERM twice: the second one waits for nobody."""
    with started(kind, folder, ("server.shutdown_timeout=300",)) as own:
        family = _family(own)
        _begun(own, {**LONG, "n": 8, "temperature": 1})
        own.process.send_signal(signal.SIGTERM)
        _red(own, END_SECONDS)  # two signals that nobody has seen yet would be one
        with suppress(ProcessLookupError):
            own.process.send_signal(signal.SIGTERM)
        return {EXIT: _exit(own, 0), LEFT: _nothing_left(family)}


def ended_early(kind: str, folder: Path) -> Verdicts:
    """SIGTERM while the engine starts."""
    with started(kind, folder, await_ready=False) as own:
        deadline = time.monotonic() + 60
        # As soon as it has children the engine is being made.
        while not _family(own) and own.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        family = _family(own)
        os.kill(own.process.pid, signal.SIGTERM)
        try:
            status = own.process.wait(15)
        except subprocess.TimeoutExpired:
            return {EXIT: Outcome("still starting after 15 s"), LEFT: _nothing_left(family, 0)}
        return {
            EXIT: Outcome(unlike=None if status == 0 else f"exit status {status}"),
            LEFT: _nothing_left(family),
        }


SCENARIOS = (
    Scenario("killed engine", (ERROR, UNDONE, RED, EXIT, LEFT), killed),
    # What a supervisor should see of a hung engine is a setting of ours.
    Scenario("stopped engine", (ERROR, UNDONE, RED, EXIT, LEFT), stopped, frozenset({EXIT, LEFT})),
    Scenario(
        "SIGTERM in a stream",
        (FINISHED, CUT, NEW, EXIT, LEFT, "the log has what the cut one used"),
        ended,
        frozenset({CUT, "the log has what the cut one used"}),
    ),
    Scenario("SIGTERM twice", (EXIT, LEFT), hurried, frozenset({EXIT})),
    Scenario("SIGTERM while starting", (EXIT, LEFT), ended_early, frozenset({EXIT})),
)
