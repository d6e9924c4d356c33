"""What a soak's judgement is worth, and a short one with the scripted engine."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import soak_traffic
from bench.fuzz.site import Site
from bench.soak import Soak
from bench.soak_memory import slope
from bench.soak_server import Life, Supervisor
from bench.soak_traffic import Crowd, Outcome, judged

MIB = 2**20
CHUNK = b'data: {"choices": []}\n\n'
DONE = b"data: [DONE]\n\n"
BROKEN = b'data: {"error":{"message":"m","type":"t","param":null,"code":"engine_unavailable"}}\n\n'
ERROR = b'{"error":{"message":"m","type":"t","param":null,"code":"overloaded"}}'


@pytest.mark.parametrize(
    ("status", "kind", "body", "end", "code"),
    [
        (200, "text/event-stream", CHUNK + DONE, "answered", ""),
        (200, "text/event-stream", CHUNK + BROKEN, "broken off", "engine_unavailable"),
        (200, "text/event-stream", CHUNK + BROKEN + DONE, "wrong", "1 \\[DONE\\] and 1 errors"),
        (200, "text/event-stream", CHUNK, "wrong", "0 \\[DONE\\] and 0 errors"),
        (200, "text/event-stream", DONE + CHUNK, "wrong", "goes on after"),
        (200, "text/event-stream", CHUNK + DONE + DONE, "wrong", "2 \\[DONE\\]"),
        (200, "application/json", b'{"choices": []}', "answered", ""),
        (200, "application/json", b"{}", "wrong", "200 with"),
        (200, "application/json", b'{"choi', "wrong", "200 with"),
        (503, "application/json", ERROR, "error", "overloaded"),
        (500, "application/json", ERROR, "wrong", "HTTP 500"),
        (400, "application/json", b'{"detail": 1}', "wrong", "HTTP 400"),
    ],
)
def test_an_answer_has_one_end(status: int, kind: str, body: bytes, end: str, code: str) -> None:
    """Whole, an error, broken off with an error; anything else is wrong, and says why."""
    found, why = judged(status, kind, body)
    assert found == end
    assert re.search(code or "^$", why)


def life(begun: float, ready: float, killed: float, ended: float, **requests: list[int]) -> Life:
    lines: dict[str, list[dict[str, Any]]] = {
        name: [{"status": one, "route": "/v1/x"} for one in told] for name, told in requests.items()
    }
    process: Any = None
    return Life(process, begun, ready, killed, ended, requests=lines)


def judgement(outcome: Outcome, lives: list[Life]) -> list[str]:
    supervisor = Supervisor([], {})
    supervisor.lives = lives
    crowd = Crowd(0, Site(), outcomes=[outcome])
    one = Soak(supervisor, crowd, lambda _: None)
    one.judge()
    return one.faults


def outcome(end: str, status: int = 200, code: str = "", at: float = 10, **more: str) -> Outcome:
    return Outcome("soak-1", more.get("kind", "text"), end, status, code, at, at + 1)


@pytest.mark.parametrize(
    ("seen", "told", "wrong"),
    [
        (outcome("answered"), [200], None),
        (outcome("answered"), [], "the log tells []"),
        (outcome("answered"), [200, 200], "the log tells [200, 200]"),
        (outcome("answered"), [499], "the log tells [499]"),
        (outcome("left", 0), [499], None),
        (outcome("left", 0), [], None),
        (outcome("left", 0), [499, 200], "several outcomes"),
        (outcome("error", 503, "overloaded"), [503], None),
        (outcome("error", 400, "invalid_value"), [400], "HTTP 400 invalid_value"),
        (outcome("error", 400, "image_download_timeout"), [400], "image_download_timeout"),
        (outcome("error", 400, "image_download_timeout", kind="stalled"), [400], None),
        (outcome("wrong", 200, "why"), [200], "why"),
        (outcome("closed", 0), [], "while the server lived"),
        (outcome("closed", 200, at=99.5), [200], None),
        (outcome("closed", 0, at=120), [], None),
        (outcome("closed", 0, at=160), [], "while the server lived"),
    ],
)
def test_a_request_and_its_log_line_are_compared(
    seen: Outcome, told: list[int], wrong: str | None
) -> None:
    """One outcome, the same on both sides; without an answer only while there was no server."""
    lives = [life(0, 5, 100, 103, **{"soak-1": told}), life(104, 150, 0, 200)]
    faults = judgement(seen, lives)
    assert len(faults) == (wrong is not None)
    assert wrong is None or wrong in faults[0]


def test_what_the_counters_have_beyond_the_log_is_a_fault() -> None:
    """A request that is counted twice shows, also in a life whose engine was killed."""
    supervisor = Supervisor([], {})
    supervisor.lives = [life(0, 5, 0, 100, a=[200], b=[200])]
    one = Soak(supervisor, Crowd(0, Site()), lambda _: None)
    one.scraped[0] = supervisor.lives[0].counted()
    one.judge()
    assert one.faults == []
    one.scraped[0][200, ""] += 1
    one.judge()
    assert "more than the log" in one.faults[0]


@given(
    per_second=st.floats(-1e6, 1e6),
    levels=st.lists(st.floats(0, 1e9), min_size=1, max_size=4),
    count=st.integers(40, 80),
)
def test_the_slope_of_a_line_is_found(per_second: float, levels: list[float], count: int) -> None:
    """Whatever the level of each life."""
    lives = [[(2.0 * n, level + per_second * 2.0 * n) for n in range(count)] for level in levels]
    found = slope(lives)
    assert found is not None
    assert abs(found.per_second - per_second) <= 1e-6 * max(abs(per_second), 1e3)


def noisy(per_minute: float, noise: float, seed: int) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [
        (2.0 * n, (300 + per_minute * n / 30) * MIB + rng.gauss(0, noise) * MIB) for n in range(300)
    ]


def test_growth_is_told_from_noise() -> None:
    """In ten minutes with noise of 1 MiB, 3 MiB a minute is growth; none or 0.1 is not."""
    for seed in range(20):
        grows, stays, little = (slope([noisy(rise, 1.0, seed)]) for rise in (3.0, 0.0, 0.1))
        assert grows is not None
        assert stays is not None
        assert little is not None
        assert grows.low > 0
        assert not grows.flat
        assert stays.flat
        assert little.flat


def test_what_fills_up_in_the_beginning_is_no_growth() -> None:
    """Caches and heaps fill once; only what comes after counts."""
    rises = [(2.0 * n, min(n, 60) * MIB + random.Random(n).gauss(0, 0.3) * MIB) for n in range(300)]
    found = slope([rises])
    assert found is not None
    assert found.flat
    assert slope([rises[:8]]) is None, "too few samples say nothing"


def test_who_leaves_before_a_slow_answer_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing for longer than the client stays has closed nothing."""
    monkeypatch.setattr(soak_traffic, "LEAVES_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        crowd = Crowd(silent.getsockname()[1], Site())
        left = [
            crowd.leave(random.Random(seed), "/v1/chat/completions", b"{}") for seed in range(40)
        ]
    assert {one.end for one in left} == {"left"}
    assert "leaves (in the answer)" in {one.kind for one in left}


def test_a_short_soak_holds() -> None:
    """The scripted engine is killed once: one outcome for each request, counters that agree."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--scripted", "--minutes", "0.2", "--kills", "1"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all properties held" in ran.stdout
    assert "status 1" in ran.stdout, "the first life ended by the kill"
