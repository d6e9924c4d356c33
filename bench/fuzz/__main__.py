"""Hostile input against the running server: ``python -m bench.fuzz --minutes 10 --seed 1``.

Damaged files of every format, request bodies in every dialect with whatever can be wrong in them,
upload forms, and pictures at a site that does not keep to HTTP, against our server with an engine
that only looks (``bench.engineless``). After every case and after all of them the properties of
``bench.fuzz.properties`` must hold. The first case that breaks one is saved and ends the run.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import queue
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.engineless import Engineless, State, engineless
from bench.fuzz import cases as made
from bench.fuzz import profiles, properties
from bench.fuzz.cases import Case
from bench.fuzz.site import Site, site
from bench.servers import BenchError

WORKERS = 4
CHECK_SECONDS = 30.0
"""How often everything waits, so that a slot that is held for good shows."""

PROFILES_SHARE = 0.05
"""Of a run's time, for profiles."""

SHOWN = 5
"""How many of the slowest cases are named."""

MEMORY_SHARE, MEMORY_BYTES = 0.10, 64 * 1024 * 1024
"""How far the memory after a run may exceed that after the warm-up: a share and a fixed part."""

SPARE_THREADS, SPARE_DESCRIPTORS = 12, 8
"""The pools' threads start when they are first needed, so some only after the warm-up."""

PEAK_BYTES = 1024**3
"""How far memory may rise for a while: four decoders, each on a picture at the limit."""

LIMITS = (
    "media.max_image_pixels=4000000",
    "media.max_decoding_bytes=160000000",
    "media.max_video_pixels=1000000",
    "media.max_video_frames=2000",
    "media.max_download_bytes=2000000",
    "media.download_seconds=2",
    "media.video_decode_seconds=5",
    "media.allowed_networks=[127.0.0.1/32]",
    "files.max_files=20",
)
"""Small limits are met more often, and keep the machine usable."""


@dataclass
class Run:
    """What a run has seen so far."""

    server: Engineless
    site: Site
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    slowest: list[tuple[float, Case]] = field(default_factory=list)
    peak: int = 0
    floor: int = 0
    failures: list[tuple[str, Case | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def attempt(self, case: Case) -> None:
        """Send one case and judge the answer."""
        if case.script is not None:
            self.site.scripts[case.name] = case.script
        try:
            answer = properties.send(case, self.server.port, self.site.port)
            wrong = properties.fault(case, answer)
            if wrong is not None:
                wrong += f": {answer.body[:400]!r}"
        except TimeoutError:
            wrong, answer = f"no answer within {properties.SECONDS:.0f} s", None
        except OSError as error:
            wrong, answer = f"the server cannot be reached: {error}", None
        self.site.scripts.pop(case.name, None)
        if wrong is not None:
            self.fail(wrong, case)
        if answer is not None:
            self.counts[case.kind, answer.status] += 1
            slowest = [*self.slowest, (answer.seconds, case)]
            self.slowest = sorted(slowest, key=lambda one: -one[0])[:SHOWN]

    def check(self) -> State:
        """Judge the server while nobody asks anything."""
        for look in (properties.unsettled, properties.good_request, properties.left_behind):
            if (wrong := look(self.server)) is not None:
                self.fail(wrong, None)
        if lines := properties.complaints(self.server):
            self.fail("the log complains: " + " | ".join(lines[:3]), None)
        state = self.server.state()
        self.floor = self.floor or state.rss
        self.peak = max(self.peak, state.peak)
        if state.peak > self.floor + PEAK_BYTES:
            self.fail(f"memory rose to {_mib(state.peak)} for a while", None)
        return state

    def fail(self, wrong: str, case: Case | None) -> None:
        """Note a failure, which ends the run."""
        self.failures.append((wrong, case))
        self.ended.set()

    @property
    def total(self) -> int:
        """How many cases were answered or cut."""
        return sum(self.counts.values())


def fuzz(run: Run, cases: Iterator[Case], seconds: float, most: int | None = None) -> float:
    """Send cases from several clients for so many seconds, or until one fails; return the time.

    Every ``CHECK_SECONDS`` and at the end everything waits and the server is judged.
    """
    begun = time.monotonic()
    sent = 0
    while not run.ended.is_set():
        left = begun + seconds - time.monotonic()
        if left <= 0 or (most is not None and sent >= most):
            break
        more = None if most is None else most - sent
        sent += _burst(run, cases, min(left, CHECK_SECONDS), more)
        run.check()
    return time.monotonic() - begun


def _burst(run: Run, cases: Iterator[Case], seconds: float, most: int | None) -> int:
    waiting: queue.Queue[Case | None] = queue.Queue(WORKERS * 2)

    def work() -> None:
        while (case := waiting.get()) is not None:
            if not run.ended.is_set():
                run.attempt(case)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    sent = 0
    while time.monotonic() < end and not run.ended.is_set() and (most is None or sent < most):
        waiting.put(next(cases))
        sent += 1
    for _ in workers:
        waiting.put(None)
    for worker in workers:
        worker.join()
    return sent


def grown(before: State, after: State) -> str | None:
    """Return what the server has more of than it should."""
    allowed = before.rss * (1 + MEMORY_SHARE) + MEMORY_BYTES
    if after.rss > allowed:
        return f"memory grew from {_mib(before.rss)} to {_mib(after.rss)}"
    if after.threads > before.threads + SPARE_THREADS:
        return f"threads grew from {before.threads} to {after.threads}"
    if after.descriptors > before.descriptors + SPARE_DESCRIPTORS:
        return f"descriptors grew from {before.descriptors} to {after.descriptors}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, print counts and verdict; 0, or 1 when a property was broken."""
    arguments = _parser().parse_args(argv)
    try:
        with site() as scripted:
            ports = f"media.allowed_ports=[{scripted.port}]"
            with engineless(*LIMITS, ports) as server:
                return _run(arguments, Run(server, scripted))
    except BenchError as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, run: Run) -> int:
    if arguments.replay is not None:
        run.attempt(made.from_json(arguments.replay.read_text()))
        run.check()
        return _verdict(run, arguments.save)
    print(_profiles(run, arguments.minutes * 60 * PROFILES_SHARE, arguments.seed))
    cases = made.cases(arguments.seed)
    if arguments.kinds:
        cases = made.only(arguments.kinds, arguments.seed)
    warm_up = arguments.minutes * 60 / 4
    spent = fuzz(run, cases, warm_up)
    before = None if run.ended.is_set() else run.server.state(trim=True)
    spent += fuzz(run, cases, arguments.minutes * 60 - warm_up)
    if before is not None and not run.ended.is_set():
        after = run.server.state(trim=True)
        print(f"after the warm-up  {_told(before)}\nat the end         {_told(after)}")
        if (wrong := grown(before, after)) is not None:
            run.fail(wrong, None)
    print(_table(run.counts))
    print(f"\n{run.total} cases in {spent:.0f} s, {run.total / spent:.1f} a second")
    print(f"peak of memory {_mib(run.peak)}")
    slowest = (f"{seconds:.1f} s {case.kind} {case.name}" for seconds, case in run.slowest)
    print(f"slowest answers: {', '.join(slowest)}")
    return _verdict(run, arguments.save)


def _profiles(run: Run, seconds: float, seed: int) -> str:
    """Load profiles that nobody would write, here: the server has one already."""
    count, faults = profiles.fuzz(seconds, seed)
    for wrong, text in faults[:SHOWN]:
        run.fail(f"a profile: {wrong}: {text[:1000]!r}", None)
    return f"{count} profiles loaded or refused in one line" if not faults else ""


def _verdict(run: Run, folder: Path) -> int:
    if not run.failures:
        print("all properties held")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "fuzz-server.log"
    shutil.copy(run.server.log, log)
    print(f"the server's log: {log}")
    for _, case in run.slowest:
        (folder / f"slow-{case.name}.json").write_text(made.to_json(case))
    for wrong, failed in run.failures:
        if failed is None:
            print(f"FAILED  {wrong}; the slowest cases may know why")
            continue
        path = folder / f"fuzz-{failed.name}.json"
        path.write_text(made.to_json(failed))
        print(f"FAILED  {failed.kind}: {wrong}")
        print(f"        again: python -m bench.fuzz --replay {path}")
    return 1


def _table(counts: Counter[tuple[str, int]]) -> str:
    """Return how often each kind of case got each status; 0 stands for a client that left."""
    statuses = sorted({status for _, status in counts})
    rows = [["kind", "cases", *map(str, statuses)], ["---"] * (len(statuses) + 2)]
    for kind in sorted({kind for kind, _ in counts}):
        numbers = [counts[kind, status] for status in statuses]
        rows.append([kind, str(sum(numbers)), *map(str, numbers)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _told(state: State) -> str:
    return (
        f"{_mib(state.rss)} resident, {state.threads} threads, {state.descriptors} descriptors, "
        f"{state.held} pixels held"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases (0)")
    parser.add_argument("--kinds", nargs="+", choices=[*made.WEIGHTS], help="only these kinds")
    parser.add_argument("--save", type=Path, default=Path(), help="folder for failing cases (.)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="only the case in FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
