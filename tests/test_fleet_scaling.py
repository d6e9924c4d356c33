"""A fleet that grows with its queue and shrinks again, on a real Ray cluster over scripted engines.

``FLEET=1 pytest tests/test_fleet_scaling.py -s`` takes some four minutes and prints its times. The
tests build on one another, and each also runs alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests

from tests.test_fleet import CHAT, FleetProcess, Load, content, environment, replica, running

pytestmark = pytest.mark.skipif(not os.environ.get("FLEET"), reason="asked for by FLEET=1")
__all__ = ["environment"]
MOST, TARGET, CLIENTS = 2, 4, 8


@pytest.fixture(scope="module")
def fleet(environment: object) -> Iterator[FleetProcess]:
    """One replica, two at most; Ray waits less than it does by itself."""
    with running(
        environment,  # type: ignore[arg-type]
        profile="demo",
        seam="tests.fleet_engine",
        set=["files.max_files=0"],
        max_replicas=MOST,
        target_ongoing_requests=TARGET,
        upscale_delay_s=2,
        downscale_delay_s=5,
        replica_cpus=0.5,
    ) as process:
        yield process


class Listed:
    """The replicas that the gateway asks, which those that drain are not, and when that changed."""

    def __init__(self, fleet: FleetProcess) -> None:
        self.fleet = fleet
        self.begun = time.monotonic()
        self.now: set[str] = set()
        self.left: dict[str, float] = {}
        self.counts: list[tuple[float, int]] = []
        self.look()

    def look(self) -> int:
        page = self.fleet.get("/metrics").text
        names = set(re.findall(r'qwen2vl_requests_in_flight\{replica="([^"]+)"', page))
        names.discard("gateway")
        at = time.monotonic()
        self.left |= dict.fromkeys(self.now - names, at)
        self.now = names
        if not self.counts or self.counts[-1][1] != len(names):
            self.counts.append((round(at - self.begun, 1), len(names)))
        return len(names)

    def until(self, count: int, gone: frozenset[int] = frozenset()) -> None:
        """Wait for so many, with none of these processes."""
        deadline = time.monotonic() + 180
        while self.look() != count or gone & {one.pid for one in self.fleet.processes()}:
            assert time.monotonic() < deadline, self.counts
            time.sleep(1)


@contextlib.contextmanager
def load_for_two(fleet: FleetProcess) -> Iterator[Listed]:
    """8 clients, each with a request under way; entered when there are two replicas."""
    seen = Listed(fleet)
    load = Load(fleet, CLIENTS, words="long client")
    try:
        seen.until(MOST)
        yield seen
    finally:
        answers = load.stop()
        print(f"\n{dict(answers)}, the slowest in {load.slowest:.1f} s", end="; ")
        print(f"(seconds, replicas) {seen.counts}", flush=True)
    assert set(answers) == {"ok"}


def test_replicas_come_with_the_queue(fleet: FleetProcess) -> None:
    """From one to two; nobody notices, and the new one answers."""
    assert Listed(fleet).look() == 1
    with load_for_two(fleet) as seen:
        conversation_of_each(fleet, seen.now)


def conversation_of_each(fleet: FleetProcess, names: set[str]) -> dict[str, str]:
    """Conversations with answers of half a minute, one for each replica."""
    found: dict[str, str] = {}
    for number in range(100):
        words = f"longest, conversation {number}"
        answer = fleet.ask(words, max_tokens=1)
        content(answer)
        found.setdefault(replica(answer), words)
        if found.keys() >= names:
            return found
    pytest.fail(f"never asked: {names - found.keys()}")


@dataclass
class Stream:
    """One answer; ``last`` is its last line, ``[DONE]`` where it is whole."""

    replica: str
    begun: float
    ended: float = 0.0
    chunks: int = 0
    last: str = ""


class Streams:
    """A client for each conversation that has it answered, anew until told to stop."""

    def __init__(self, fleet: FleetProcess, conversations: list[str]) -> None:
        self.fleet = fleet
        self.stopped = threading.Event()
        self.seen: list[Stream] = []
        self.threads = [threading.Thread(target=self._ask, args=(one,)) for one in conversations]
        for one in self.threads:
            one.start()

    def _ask(self, words: str) -> None:
        body = {"messages": [{"role": "user", "content": words}], "stream": True}
        while not self.stopped.is_set():
            with requests.post(self.fleet.root + CHAT, json=body, stream=True, timeout=60) as said:
                one = Stream(replica(said), time.monotonic())
                self.seen.append(one)
                for line in said.iter_lines(decode_unicode=True):
                    one.last = line or one.last
                    one.chunks += line.startswith("data: {")
                one.ended = time.monotonic()

    def stop(self) -> list[Stream]:
        self.stopped.set()
        for one in self.threads:
            one.join(120)
        return self.seen


def test_replicas_go_when_the_load_is_over_and_end_their_answers(fleet: FleetProcess) -> None:
    """From two to one, with a stream at each: both are whole."""
    with load_for_two(fleet) as seen:
        conversations = conversation_of_each(fleet, seen.now)
        streams = Streams(fleet, list(conversations.values()))
    seen = Listed(fleet)
    seen.until(1)
    answers = streams.stop()
    within = [one for one in answers if one.begun < seen.left.get(one.replica, 0) < one.ended]
    print(f"{len(answers)} streams, {len(within)} of the replica that left; {seen.counts}")
    assert within
    assert {(one.last, one.chunks) for one in answers} == {("data: [DONE]", 62)}
    deadline = time.monotonic() + 60
    while len(fleet.processes()) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    content(fleet.ask("Hello"))


def test_a_new_version_begins_with_as_many_as_there_are(fleet: FleetProcess) -> None:
    """Under load, and though none would be added for ten minutes, nor taken away; an old gateway
    stays until a new one is there."""
    with load_for_two(fleet) as seen:
        before = frozenset(one.pid for one in fleet.processes())
        fleet.deploy(upscale_delay_s=600, downscale_delay_s=600)
        seen.until(MOST, gone=before)
