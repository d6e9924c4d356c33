"""Readiness means progress: what counts as moving, and when an engine hangs."""

from __future__ import annotations

import asyncio

import pytest

from qwen2vl_serve.engines.pulse import Pulse
from qwen2vl_serve.errors import EngineUnavailable
from tests.fake_engine import FakeEngine


class Watched:
    """An engine, a pulse, and a clock that moves a second a look."""

    def __init__(self, hang_seconds: float = 10, probe_seconds: float = 0) -> None:
        self.engine = FakeEngine()
        self.now = 0.0
        self.pulse = Pulse(self.engine, hang_seconds, probe_seconds, lambda: self.now)

    def look(self, times: int, *, seconds: float = 1, moves: bool = False) -> None:
        for _ in range(times):
            self.now += seconds
            self.engine.progress += moves
            self.pulse.look()


def test_an_idle_engine_does_not_hang() -> None:
    """Without work nothing is asked of it."""
    one = Watched()
    one.look(1000)
    one.pulse.require()


def test_work_without_a_step_is_a_hang_after_the_bound() -> None:
    """Red at the bound, not before; any step makes it green."""
    one = Watched()
    one.engine.running = 1
    one.look(100, moves=True)
    one.look(9)
    one.pulse.require()
    one.look(1)
    with pytest.raises(EngineUnavailable, match="10 s"):
        one.pulse.require()
    one.look(1, moves=True)
    one.pulse.require()


def test_clients_that_give_up_do_not_hide_a_hang() -> None:
    """Each waits less than the bound and leaves; together they show it."""
    one = Watched()
    for _ in range(4):
        one.engine.running = 1
        one.look(3)
        one.engine.running = 0
        one.look(5)
    assert one.pulse.hangs


def test_a_server_that_was_stopped_itself_blames_nobody() -> None:
    """A look after a long time without looks counts little."""
    one = Watched()
    one.engine.running = 1
    one.look(1, seconds=3600)
    one.pulse.require()


def test_a_bound_of_nothing_is_none() -> None:
    """``hang_seconds: 0`` turns the watch off."""
    one = Watched(hang_seconds=0)
    one.engine.running = 1
    one.look(10_000)
    one.pulse.require()


def test_the_idle_engine_is_probed_and_a_probe_is_work() -> None:
    """After so many idle seconds one token; while it hangs one probe only, and it is noticed."""

    async def run() -> None:
        one = Watched(hang_seconds=10, probe_seconds=30)
        one.look(29)
        await asyncio.sleep(0)
        assert one.engine.probes == 0
        one.look(1)
        await asyncio.sleep(0.01)
        assert (one.engine.probes, one.engine.running) == (1, 0)
        one.engine.hung = True
        one.look(31)
        await asyncio.sleep(0.01)
        one.look(10)
        assert (one.engine.probes, one.engine.running) == (2, 1)
        assert one.pulse.hangs
        one.engine.hung = False
        await asyncio.sleep(0.05)
        one.pulse.require()
        one.pulse.stop()

    asyncio.run(run())


def test_a_probe_that_fails_is_left_to_the_check() -> None:
    """A dead engine is told by ``check``; the probe does not add an error of its own."""

    async def run() -> None:
        one = Watched(probe_seconds=1)
        one.engine.dead = True
        one.look(1)
        await asyncio.sleep(0.01)
        one.pulse.require()
        assert one.engine.probes == 1

    asyncio.run(run())
