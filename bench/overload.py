"""Ten times the capacity, beside stock vLLM: ``python -m bench.overload``.

For each kind of request and each server in turn: the time to the first token with one client; the
most answers a second that some number of clients gets (the capacity); then, for a minute, ten times
as many requests as that at random times, each on a connection of its own, whatever becomes of them.
Told is how many answers a second were whole in the flood, beside the capacity; how long the
admitted waited for their first token, beside the single client; how soon the others were told no;
what the API process holds; and how the first request after the flood is served.

Where the machine itself stands still (``bench.pauses``), times that were met by that are set aside
and the seconds do not count; both are told.

Clients that have no first token after 10 s close their connection. The client shares the cores with
both servers; its own CPU time is told, and how much too late it sent. ``--apart`` keeps engines on
other processors than servers and client, as a card is.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from bench.overload_client import (
    TOKENS,
    Outcome,
    Requests,
    ask,
    closed_loop,
    open_loop,
    pictures,
    text,
    timed,
)
from bench.overload_figures import Calm, Flood, Result, percentile, table
from bench.pauses import Pauses, watched
from bench.rounds import conditions, leave, plain
from bench.servers import BenchError, Halves, Server, both

TIMES = 10
LEVELS = (4, 8, 16, 32)
"""Clients at once among which the capacity is sought."""

CALM_SECONDS = 10.0
"""How long each of these, and the single client, is measured."""

OURS = ("limits.max_in_flight=8", "limits.max_starting=2", "limits.queue_seconds=0.01")
"""What an operator sets who wants short first tokens rather than the most answers: as many at once
as the engine takes without becoming slow for each, two of them at their prompts and pictures, and
hardly any waiting."""

LOOK_SECONDS = 0.25
AFTER_SECONDS = 3.0
"""After the last request of the flood the first good one is sent: an answer that was admitted at
its end takes some two seconds to write."""

FILLING_SECONDS = 3.0
"""Answers of so many seconds at the beginning are not counted: the server was empty before."""

KINDS: dict[str, Requests] = {"text": text, "pictures": pictures}


async def calm(server: Server, requests: Iterator[bytes], seconds: float) -> Calm:
    """Measure without a flood.

    Raises:
        BenchError: a request was not answered.
    """
    loop = asyncio.get_running_loop()
    asked = {}
    with watched() as pauses:
        await closed_loop(server.port, requests, 2, min(seconds, 3.0))
        (single,) = await closed_loop(server.port, requests, 1, seconds)
        for one in single:
            if one.end != "answered":
                raise BenchError(f"without a flood a request {one.end}: {one.said!r}")
        for clients in LEVELS:
            begun = loop.time()
            found = await closed_loop(server.port, requests, clients, seconds)
            asked[clients] = found, begun
    firsts = times(single, pauses, lambda one: one.first)
    rates = {
        clients: answer_rate(found, begun, pauses) for clients, (found, begun) in asked.items()
    }
    best = max(rates, key=lambda clients: rates[clients])
    return Calm(percentile(firsts, 0.5), percentile(firsts, 0.99), rates[best], best)


def answer_rate(clients: Sequence[Sequence[Outcome]], begun: float, pauses: Pauses) -> float:
    """Return the answers a second of a closed loop: the sum of its clients' own rates.

    Each client's is taken up to the end of its last answer. What all had by a certain time would
    hold up to one answer for each client too many or too few, and clients begin together.
    """
    rate = 0.0
    for outcomes in clients:
        end = outcomes[-1].at
        count = sum(one.end == "answered" for one in outcomes)
        rate += count / (end - begun - pauses.within(begun, end))
    return rate


def times(
    outcomes: Sequence[Outcome], pauses: Pauses, taken: Callable[[Outcome], float | None]
) -> list[float]:
    """Return how long each took, of those that took it and met no pause meanwhile."""
    found = ((one, taken(one)) for one in outcomes)
    return [
        seconds
        for one, seconds in found
        if seconds is not None and not pauses.touch(one.began - one.late, one.began + seconds)
    ]


async def flood(server: Server, requests: Iterator[bytes], rate: float, seconds: float) -> Flood:
    """Send ``rate`` requests a second for so many seconds and tell what became of them."""
    process = psutil.Process(server.pid)
    sizes = [process.memory_info().rss]

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            sizes.append(process.memory_info().rss)

    loop = asyncio.get_running_loop()
    begun, cpu = loop.time(), server.cpu_seconds()
    with watched() as pauses:
        looking = asyncio.create_task(look())
        first_after = asyncio.create_task(_later(server, requests, seconds + AFTER_SECONDS))
        outcomes, client_cpu = await timed(open_loop(server.port, requests, rate, seconds))
        after = await first_after
        passed = loop.time() - begun
        cpu = server.cpu_seconds() - cpu
        looking.cancel()
        await asyncio.sleep(2.0)
    counts = Counter(outcome.end for outcome in outcomes)
    answered = [one for one in outcomes if one.end == "answered"]
    refused = [one for one in outcomes if one.end == "refused"]
    firsts = times(answered, pauses, lambda one: one.first)
    heads = times(refused, pauses, lambda one: one.head)
    filled = begun + min(FILLING_SECONDS, seconds / 4)
    ended = [one for one in answered if filled <= one.at <= begun + seconds]
    counted = begun + seconds - filled - pauses.within(filled, begun + seconds)
    paused = pauses.within(begun, begun + seconds)
    return Flood(
        offered=len(outcomes) / seconds,
        goodput=len(ended) / counted,
        answered=counts["answered"],
        refused=counts["refused"],
        gave_up=counts["gave up"],
        failed=counts["failed"],
        first_p50=percentile(firsts, 0.5),
        first_p99=percentile(firsts, 0.99),
        refusal_p50=percentile(heads, 0.5),
        refusal_p99=percentile(heads, 0.99),
        rss_before=sizes[0],
        rss_peak=max(sizes),
        rss_after=process.memory_info().rss,
        client_cpu=client_cpu,
        api_cpu=cpu / passed,
        late_p99=percentile([one.late for one in outcomes], 0.99),
        after=after.first,
        paused=paused,
        set_aside=len(answered) + len(refused) - len(firsts) - len(heads),
    )


async def _later(server: Server, requests: Iterator[bytes], seconds: float) -> Outcome:
    await asyncio.sleep(seconds)
    return await ask(server.port, next(requests))


async def measure(
    servers: Sequence[Server], kinds: Sequence[str], seconds: float, calm_seconds: float
) -> list[Result]:
    """Measure every kind on every server, one after another.

    Raises:
        BenchError: a server does not answer without a flood.
    """
    results = []
    for kind in kinds:
        for server in servers:
            requests = KINDS[kind](server.model)
            quiet = await calm(server, requests, calm_seconds)
            print(f"{kind}, {server.name}: {quiet.capacity:.1f} answers/s", file=sys.stderr)
            flooded = await flood(server, requests, TIMES * quiet.capacity, seconds)
            results.append(Result(kind, server.name, quiet, flooded))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a server failed."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, leave)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before = os.getloadavg()
    ours = () if arguments.as_shipped else (*OURS, *arguments.ours)
    import uvloop  # noqa: PLC0415  (comes with vLLM)

    with tempfile.TemporaryDirectory(prefix="overload-") as folder:
        try:
            halves = Halves.of_machine() if arguments.apart else None
            with (
                both(arguments.profile, Path(folder), ours, halves) as servers,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                chosen = servers[1:] if arguments.ours_only else servers
                work = measure(chosen, arguments.kinds, arguments.seconds, arguments.calm_seconds)
                results = runner.run(work)
        except BenchError as error:
            print(f"overload: {error}", file=sys.stderr)
            return 1
    told = conditions(
        arguments.profile,
        ours,
        before,
        seconds=arguments.seconds,
        tokens=TOKENS,
        engines="apart" if arguments.apart else "beside",
    )
    print(table(results))
    for one in results:
        missed = ", ".join(one.missed())
        print(f"{one.kind}, {one.server}: {'missed: ' + missed if missed else 'all goals reached'}")
    print(plain(told))
    if arguments.json is not None:
        kept = {"conditions": told, "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--profile", default="demo", help="profile of both servers (demo)")
    made.add_argument("--seconds", type=_seconds, default=60.0, help="how long a flood lasts (60)")
    made.add_argument(
        "--calm-seconds",
        type=_seconds,
        default=CALM_SECONDS,
        help=f"how long each number of clients is measured without one ({CALM_SECONDS:g})",
    )
    made.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], help="only these")
    made.add_argument("--ours-only", action="store_true", help="leave stock vLLM alone")
    made.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="set a field for ours alone, after " + " and ".join(OURS) + "; may be repeated",
    )
    made.add_argument(
        "--apart",
        action="store_true",
        help="engines on one half of the processors, servers and client on the other",
    )
    made.add_argument("--as-shipped", action="store_true", help="set nothing for ours")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return made


def _seconds(text_: str) -> float:
    seconds = float(text_)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, is {text_}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
