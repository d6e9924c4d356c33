"""Half an hour of mixed requests with faults: ``python -m bench.soak --minutes 30``.

Clients send texts, pictures, streams, explanations and uploads, name pictures at a site that never
answers, and leave at any point. Every few minutes the engine is killed; the server must end with
a status other than 0, and is started again as systemd would. At the end: every request had
exactly one outcome and the server's log tells the same of it; ``/metrics`` counts what the log
tells; the memory of no process rises by more than its noise.

``--scripted`` puts the tests' scripted engine into the place of vLLM.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from bench.fuzz.site import Site, site
from bench.rounds import leave
from bench.servers import HOST, BenchError, free_port, our_command
from bench.soak_memory import slope
from bench.soak_server import Kill, Life, Supervisor, kill_engine_core
from bench.soak_traffic import Crowd, Outcome
from qwen2vl_serve.profile import load_profile

KILL_MINUTES = 10

SMALL_CACHES = (
    "engine.kv_cache_memory_bytes=67108864",
    "engine.mm_processor_cache_gb=0.02",
)
"""Such as fill within a minute: as long as a cache fills, its process grows."""

CLIENTS = 6
SCRAPE_SECONDS = 5.0
SETTLE_SECONDS = 15.0
SHOWN = 10
MIB = 2**20

LOSES_ENGINE = signal.SIGRTMIN
"""To ``tests.serve_fake``."""

UNAVAILABLE = frozenset({"overloaded", "engine_unavailable", "shutting_down"})
"""Codes that any request may get."""

ERRORS = {
    "stalled": frozenset({"image_download_timeout"}),
    # Another client may have uploaded the same picture, and deleted it.
    "by id": frozenset({"file_not_found"}),
    "delete": frozenset({"file_not_found"}),
}

_COUNT = re.compile(
    r'^qwen2vl_requests_total\{code="(\w*)",route="([^"]*)",status="(\d+)"\} (\S+)', re.MULTILINE
)


@dataclass
class Soak:
    """A run: the supervised server, its clients, and what of its counters was last seen."""

    supervisor: Supervisor
    crowd: Crowd
    kill: Kill
    scraped: dict[int, Counter[tuple[int, str]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self, seconds: float, kills: int) -> None:
        """Let the clients ask for so long, while the engine is killed so many times.

        Raises:
            BenchError: the server did not start, or its engine could not be killed.
        """
        self.supervisor.start()
        self.crowd.start(CLIENTS)
        for left in range(kills, -1, -1):
            self._watch(seconds / (kills + 1))
            if left:
                self.supervisor.kill_engine(self.kill)
                self.supervisor.wait_ready()
        if not self.crowd.stop():
            self.faults.append("a client got no answer")
        self._settled()
        self.supervisor.stop()

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.supervisor.faults:
            time.sleep(min(SCRAPE_SECONDS, max(end - time.monotonic(), 0)))
            self._scrape()

    def _scrape(self) -> str:
        text = ""
        with suppress(requests.RequestException):
            text = requests.get(f"http://{HOST}:{self.crowd.port}/metrics", timeout=10).text
            counts: Counter[tuple[int, str]] = Counter()
            for code, route, status, number in _COUNT.findall(text):
                if route.startswith("/v1/"):
                    counts[int(status), code] += round(float(number))
            self.scraped[len(self.supervisor.lives) - 1] = counts
        return text

    def _settled(self) -> None:
        """Judge the last server while nobody asks: nothing is held, and it counts as it logs."""
        end = time.monotonic() + SETTLE_SECONDS
        held = re.compile(
            r"^(qwen2vl_(?:requests_in_flight|admission_in_flight\S*|admission_queued\S*|"
            r"body_held_bytes|media_held_bytes)) ([1-9]\S*)", re.MULTILINE
        )  # fmt: skip
        while still := held.findall(self._scrape()):
            if time.monotonic() > end:
                self.faults.append(f"held though nobody asks: {still}")
                return
            time.sleep(0.2)
        last = len(self.supervisor.lives) - 1
        counted = self.scraped.get(last, Counter())
        while (told := self.supervisor.lives[last].counted()) != counted:
            if time.monotonic() > end:  # the log's last lines are long there
                break
            time.sleep(0.2)
        if told != counted:
            self.faults.append(f"/metrics counts {dict(counted)}, the log tells {dict(told)}")

    def judge(self) -> None:
        """Compare what the clients saw with what the server's lives tell."""
        lines: dict[str, list[int]] = {}
        for life in self.supervisor.lives:
            for name, requests_ in life.requests.items():
                lines.setdefault(name, []).extend(one["status"] for one in requests_)
        for one in self.crowd.outcomes:
            if (wrong := self._wrong(one, lines.pop(one.id, []))) is not None:
                self.faults.append(f"{one.kind} {one.id}: {wrong}")
        # The rest is the scrapes', under ids of the server's own.
        self.faults += [f"a log line of no request: {one}" for one in lines if "soak" in one]
        for number, counted in self.scraped.items():
            told = self.supervisor.lives[number].counted()
            if more := counted - told:
                self.faults.append(f"life {number}: /metrics counts more than the log: {more}")
        self.faults += self.supervisor.faults

    def _wrong(self, one: Outcome, told: Sequence[int]) -> str | None:
        allowed = UNAVAILABLE | ERRORS.get(one.kind, frozenset())
        if one.end == "wrong":
            return one.code
        if one.end in ("error", "broken off") and one.code not in allowed:
            return f"HTTP {one.status} {one.code}"
        if one.end == "closed" and not self.supervisor.down(one.begun, one.ended):
            return f"closed without a whole answer ({one.code}) while the server lived"
        whole = one.end in ("answered", "error", "broken off")
        if whole and list(told) != [one.status]:
            return f"the client saw {one.status}, the log tells {list(told)}"
        return f"several outcomes in the log: {list(told)}" if len(told) > 1 else None


def memory(lives: Sequence[Life]) -> tuple[list[str], list[str]]:
    """Return a line for each kind of process, and the faults."""
    lines, faults = [], []
    for name in sorted({name for life in lives for name in life.sizes}):
        samples = [life.sizes.get(name, []) for life in lives]
        last = next(sizes[-1][1] for sizes in reversed(samples) if sizes)
        found = slope(samples)
        if found is None:
            lines.append(f"{name}: {last / MIB:.0f} MiB; too few samples for a slope")
            continue
        per_minute = [value * 60 / MIB for value in (found.per_second, found.low, found.high)]
        lines.append(
            "{}: {:.0f} MiB, slope {:+.2f} MiB a minute ({:+.2f} to {:+.2f} at 95 %), "
            "noise {:.1f} MiB, {} samples".format(
                name, last / MIB, *per_minute, found.noise / MIB, found.samples
            )
        )
        if not found.flat:
            faults.append(f"the memory of {name} grows")
    return lines, faults


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table: how the requests of each kind ended."""
    ends = ["answered", "error", "broken off", "closed", "left", "wrong"]
    counts = Counter((one.kind.partition(" (")[0], one.end) for one in outcomes)
    lines = [["request", *ends], ["---"] * (len(ends) + 1)]
    kinds = sorted({kind for kind, _ in counts})
    lines += [[kind, *(str(counts[kind, end]) for end in ends)] for kind in kinds]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def command(port: int, at: Site, scripted: bool) -> list[str]:
    """Return the command of the server that is soaked."""
    fields = [
        "server.log_format=json",
        "media.allowed_networks=[127.0.0.1/32]",
        f"media.allowed_ports=[{at.port}]",
        "media.download_seconds=2",
        "files.max_files=50",
    ]
    if scripted:
        return [sys.executable, "-m", "tests.serve_fake", "--port", str(port), "up", *fields]
    fields += SMALL_CACHES
    profile = load_profile("demo", [f"host={HOST}", f"port={port}"])
    return [*our_command(profile), *(word for one in fields for word in ("--set", one))]


def _lose_engine(server: psutil.Process) -> None:
    server.send_signal(LOSES_ENGINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print and judge; 0, or 1 when a property failed."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, leave)
    port = free_port()
    kills = arguments.kills
    if kills is None:
        kills = max(round(arguments.minutes / KILL_MINUTES) - 1, 1)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, site() as at:
        environment = {**os.environ, "XDG_STATE_HOME": folder, "VLLM_NO_USAGE_STATS": "1"}
        supervisor = Supervisor(command(port, at, arguments.scripted), environment)
        kill = _lose_engine if arguments.scripted else kill_engine_core
        soak = Soak(supervisor, Crowd(port, at, arguments.seed), kill)
        try:
            soak.run(arguments.minutes * 60, kills)
        except BenchError as error:
            print(f"soak: {error}", file=sys.stderr)
            return 1
        finally:
            soak.crowd.stopped.set()
            supervisor.abandon()
    soak.judge()
    lines, faults = memory(supervisor.lives)
    soak.faults += faults
    return _verdict(soak, lines, Path(arguments.log) if arguments.log else None)


def _verdict(soak: Soak, lines: Sequence[str], log: Path | None) -> int:
    print(table(soak.crowd.outcomes))
    codes = Counter(one.code for one in soak.crowd.outcomes if one.end in ("error", "broken off"))
    print(f"\n{len(soak.crowd.outcomes)} requests, errors {dict(codes)}")
    for number, life in enumerate(soak.supervisor.lives):
        seconds = life.ended - life.begun
        told = {f"{status} {code}".strip(): n for (status, code), n in life.counted().items()}
        print(f"life {number}: {seconds:.0f} s, status {life.status}, {told}")
    print("\n".join(lines))
    if log is not None:
        log.write_text("\n".join(map(repr, soak.crowd.outcomes)) + "\n")
    for fault in soak.faults[:SHOWN]:
        print(f"FAILED  {fault}")
    if len(soak.faults) > SHOWN:
        print(f"FAILED  and {len(soak.faults) - SHOWN} more")
    if not soak.faults:
        print("all properties held")
    return 1 if soak.faults else 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    made.add_argument("--kills", type=int, help=f"of the engine (one every {KILL_MINUTES} minutes)")
    made.add_argument("--seed", type=int, default=0, help="another seed, other requests (0)")
    made.add_argument("--scripted", action="store_true", help="with the tests' scripted engine")
    made.add_argument("--log", metavar="FILE", help="write every outcome there")
    return made


if __name__ == "__main__":
    sys.exit(main())
