"""How a fleet behaves before it is rented: ``python -m bench.fleet``.

    python -m bench.fleet measure 8000 --replicas 2 --json service.json    times of its answers
    python -m bench.fleet replay 8000 --service service.json --replicas 2 --json run.json
    python -m bench.fleet recorded run.json again.json
    python -m bench.fleet simulate --service service.json --price 0.5

``measure`` asks a running server, or all replicas of a fleet on one machine; ``replay`` sends
conversations to such a fleet and tells beside what was measured what the model predicts, the mean
of twenty simulations; ``recorded`` does so for runs that were kept, all of them as one;
``simulate`` compares routing policies for fleets of several sizes, each replica on a machine of its
own, under the conversations of so many users a day, and finds the smallest fleet for each.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

from bench.fleet_client import TOKENS, Client, replayed
from bench.fleet_measure import measured
from bench.fleet_model import POLICIES, Outcome, Service, fewest, simulate
from bench.fleet_replay import (
    ENOUGH,
    SIMULATIONS,
    Figures,
    Predicted,
    Recorded,
    Replay,
    record,
    together,
)
from bench.fleet_traffic import DAY_SECONDS, Habits, Request, trace
from bench.servers import BenchError
from qwen2vl_serve.fleet.affinity import AT_EASE
from qwen2vl_serve.fleet.options import Routing

SIZES = (10, 100, 1000)

Number = TypeVar("Number", int, float)


class Unusable(Exception):
    """An option that does not go with the others."""


@dataclass(frozen=True)
class Measured:
    """What ``measure`` found, and its whole file."""

    service: Service
    content: dict[str, Any]


def measured_in(name: str) -> Measured:
    """Return what ``measure`` wrote.

    Raises:
        argparse.ArgumentTypeError: the file is not one of its.
    """
    try:
        content = json.loads(Path(name).read_text())
        service = Service(**content["service"])
        service.require()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a file that measure wrote, is {name} ({error!r})"
        ) from None
    return Measured(service, content)


def run_in(name: str) -> Recorded:
    """Return what ``replay`` wrote.

    Raises:
        argparse.ArgumentTypeError: the file is not one of its.
    """
    try:
        return Recorded.of(json.loads(Path(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"must be a file that replay wrote, is {name} ({error!r})"
        ) from None


def traffic(habits: Habits, arguments: argparse.Namespace) -> Sequence[Request]:
    """Return the requests of the seconds that are asked for.

    Raises:
        Unusable: there are none.
    """
    requests = trace(habits, arguments.seconds, arguments.seed)
    if not requests:
        raise Unusable(
            f"argument --seconds: must be enough for a request at {habits.requests:g} a second, "
            f"is {arguments.seconds:g}"
        )
    return requests


def row(*cells: object) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def cells(figures: Figures) -> tuple[str, str, str]:
    """Return figures as a table has them."""
    return f"{figures.hit_rate:.3f}", f"{figures.p50:.2f}", f"{figures.p99:.2f}"


def compare(arguments: argparse.Namespace) -> None:
    """Print what each policy does with fleets of several sizes, and what it costs."""
    service = arguments.service.service
    habits = Habits.of_users(
        arguments.users, arguments.peak, turns=arguments.turns, popular=arguments.popular
    )
    requests = traffic(habits, arguments)
    busiest = f"{habits.requests:.1f} requests a second at the busiest time"
    print(f"{arguments.users:g} users a day, {busiest} (peak {arguments.peak:g})")
    print(f"{len(requests)} requests simulated\n")
    print("| replicas | routing | hit rate | p50, s | p99, s | most at one |")
    print("| --- | --- | --- | --- | --- | --- |")
    for replicas in arguments.sizes:
        for policy in POLICIES:
            found = simulate(requests, replicas, service, policy)
            print(row(replicas, policy, *cells(Figures.of(found)), found.most), flush=True)
    print(f"\np99 of at most {arguments.p99:g} s, {arguments.price:g} an hour and card:\n")
    print("| routing | replicas | hit rate | p99, s | per 1,000 pictures |")
    print("| --- | --- | --- | --- | --- |")
    pictures_a_day = arguments.users * arguments.turns
    for policy in POLICIES:
        least = fewest(requests, service, policy, arguments.p99, max(arguments.sizes))
        if least is None:
            print(row(policy, f"more than {max(arguments.sizes)}", "", "", ""))
            continue
        found = simulate(requests, least, service, policy)
        cost = least * arguments.price * DAY_SECONDS / 3600 / pictures_a_day * 1000
        hit_rate, _, p99 = cells(Figures.of(found))
        print(row(policy, least, hit_rate, p99, f"{cost:.4f}"), flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Print and keep the times of a server's answers."""
    client = Client(arguments.port, arguments.model, arguments.tokens)
    names = ("requests", "replicas", "places", "each", "cached")
    service, told = asyncio.run(
        measured(client, **{name: getattr(arguments, name) for name in names})
    )
    kept = {"conditions": asked(arguments) | told, "service": asdict(service)}
    print(json.dumps(kept["conditions"], indent=1))
    print("\nby how many times an answer is longer where so many replicas give so many each:\n")
    print(row("replicas", *range(1, service.places + 1)))
    print(row(*["---"] * (service.places + 1)))
    for busy in range(1, service.together + 1):
        speeds = (service.speed(each, busy, each * busy) for each in range(1, service.places + 1))
        print(row(busy, *(f"{1 / one:.2f}" for one in speeds)))
    if arguments.json is not None:
        keep(arguments.json, kept)


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, of which server's model and when."""
    day = time.strftime("%Y-%m-%d")
    return {"model": arguments.model, "tokens": arguments.tokens, "at": day}


def keep(file: Path, kept: dict[str, Any]) -> None:
    """Write what was found; folders on the way are made.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")


def replay(arguments: argparse.Namespace) -> None:
    """Print, and keep, what a running fleet does with conversations, beside the prediction.

    Raises:
        Unusable: the times were measured with other answers, or with fewer replicas.
    """
    before: Measured = arguments.service
    tokens = before.content.get("conditions", {}).get("tokens")
    if tokens != arguments.tokens:
        raise Unusable(
            f"argument --tokens: must be {tokens}, as --service was measured, is {arguments.tokens}"
        )
    if arguments.replicas > before.service.together:
        raise Unusable(
            f"argument --replicas: must be at most {before.service.together}, as --service was "
            f"measured, is {arguments.replicas}"
        )
    names = ("replicas", "routing", "rate", "turns", "pause", "seconds", "seed")
    run = Replay(**{name: getattr(arguments, name) for name in names})
    requests = traffic(run.habits, arguments)
    predicted = Predicted.by(run.simulated(before.service))
    client = Client(arguments.port, arguments.model, arguments.tokens)
    found, told = asyncio.run(replayed(client, requests))
    beside(run.replicas, run.routing, predicted, found)
    if arguments.json is not None:
        kept = record(run, asked(arguments) | told, before.content, found)
        keep(arguments.json, kept)


def beside(replicas: int, routing: str, predicted: Predicted, found: Outcome) -> None:
    """Print what was predicted beside what was found."""
    answers = len(found.seconds)
    few = f" (of fewer than {ENOUGH} the p99 is chance)" if answers < ENOUGH else ""
    print(row("replicas", "routing", "hit rate", "p50, s", "p99, s", "most at one", ""))
    print(row(*["---"] * 7))
    fleet = (replicas, routing)
    mean, least, most = (cells(one) for one in (predicted.mean, predicted.least, predicted.most))
    between = map("–".join, zip(least, most, strict=True))
    print(row(*fleet, *mean, predicted.crowded, f"predicted, mean of {SIMULATIONS} simulations"))
    print(row(*fleet, *between, "", "the least and the most of them"))
    print(row(*fleet, *cells(Figures.of(found)), "–", f"measured, {answers} answers{few}"))


def recorded(arguments: argparse.Namespace) -> None:
    """Print what runs of one fleet say together.

    Raises:
        Unusable: they are of several fleets.
    """
    fleets = {(one.run.replicas, one.run.routing) for one in arguments.runs}
    if len(fleets) > 1:
        told = ", ".join(f"{replicas} by {routing}" for replicas, routing in sorted(fleets))
        raise Unusable(f"argument RUN: must all be of one fleet, are {told}")
    beside(*fleets.pop(), *together(arguments.runs))


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; 0, or 1 where a server does not answer."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except Unusable as error:
        parser.error(str(error))
    except (BenchError, OSError) as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fleet: {message}\n")


def _parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m bench.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("measure", help="measure a running server's answers")
    one.set_defaults(run=measure)
    one.add_argument("--requests", type=_whole, default=40, help="new pictures (40)")
    one.add_argument("--replicas", type=_whole, default=1, help="that the fleet has (1)")
    one.add_argument(
        "--places",
        type=_whole,
        default=AT_EASE,
        help=f"answers a replica gives at once ({AT_EASE}, as many as a fleet leaves at any)",
    )
    one.add_argument("--each", type=_whole, default=10, help="answers of each of several (10)")
    one.add_argument("--cached", type=_whole, default=2000, help="pictures a replica caches (2000)")
    two = commands.add_parser("replay", help="compare a running fleet with the model")
    two.set_defaults(run=replay)
    two.add_argument("--replicas", type=_whole, required=True, help="that the fleet has")
    two.add_argument(
        "--routing", choices=get_args(Routing), default="affinity", help="the fleet's (affinity)"
    )
    two.add_argument("--rate", type=_above, default=4.0, help="requests a second (4)")
    two.add_argument("--pause", type=_one, default=5.0, help="seconds between turns (5)")
    again = commands.add_parser("recorded", help="compare recorded runs with the model")
    again.set_defaults(run=recorded)
    again.add_argument(
        "runs", type=run_in, nargs="+", metavar="RUN", help="a file of replay, of one fleet all"
    )
    three = commands.add_parser("simulate", help="compare policies and sizes")
    three.set_defaults(run=compare)
    three.add_argument("--users", type=_above, default=1e6, help="a day (1e6)")
    three.add_argument("--peak", type=_above, default=3.0, help="busiest time over mean (3)")
    three.add_argument("--popular", type=_share, default=0.2, help="share of shared pictures (0.2)")
    three.add_argument("--sizes", type=_whole, nargs="+", default=list(SIZES))
    three.add_argument("--p99", type=_above, default=1.0, help="seconds, to be kept (1)")
    three.add_argument("--price", type=_above, default=1.0, help="of a replica an hour (1)")
    for command in (one, two):
        command.add_argument("port", type=_port)
        command.add_argument("--model", default="demo")
        command.add_argument(
            "--tokens", type=_whole, default=TOKENS, help=f"of an answer ({TOKENS})"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="where it is kept")
    for command in (two, three):
        command.add_argument(
            "--service", type=measured_in, required=True, metavar="FILE", help="as measure wrote it"
        )
        command.add_argument("--seconds", type=_above, default=300.0, help="of traffic (300)")
        command.add_argument("--turns", type=_one, default=3.0, help="a conversation (3)")
        command.add_argument("--seed", type=int, default=1)
    return made


def _within(
    kind: type[Number], fits: Callable[[Number], bool], limit: str
) -> Callable[[str], Number]:
    """Return what reads a number that fits, and refuses another by its limit."""

    def read(text: str) -> Number:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"must be {limit}, is {text}")
        return number

    return read


_whole = _within(int, lambda number: number >= 1, "a whole number from 1")
_port = _within(int, lambda number: 1 <= number <= 65535, "a port from 1 to 65535")
_above = _within(float, lambda number: 0 < number < math.inf, "more than 0")
_one = _within(float, lambda number: 1 <= number < math.inf, "at least 1")
_share = _within(float, lambda number: 0 <= number <= 1, "a share from 0 to 1")


if __name__ == "__main__":
    sys.exit(main())
