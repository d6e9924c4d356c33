"""Measures how long an answer takes alone, and among others of its replica and its machine."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from bench.fleet_client import Client, Known
from bench.fleet_model import Service
from bench.servers import BenchError


async def measured(
    client: Client, *, requests: int, replicas: int, places: int, each: int, cached: int
) -> tuple[Service, dict[str, Any]]:
    """Return the times of a server's answers about new and known pictures, and the conditions.

    With one client each of ``requests`` pictures is asked about twice. Then clients ask about known
    ones again and again, for ``each`` answers of each client: 1 to ``places`` at each of 1 to
    ``replicas`` replicas, whose medians tell how answers and replicas slow each other. ``capacity``
    is how many answers a second all of them get together. Last, ``places`` are at one replica and
    one is at each other: ``lopsided`` are their medians in seconds, beside what the model expects.

    Raises:
        BenchError: an answer was not whole, or came from another replica than was meant, or other
            than ``replicas`` gave any.
    """
    load = os.getloadavg()
    for request in client.new(3 * replicas):
        await client.ask(request)
    miss, hit, fleet = await _alone(client, requests)
    if len(fleet) != replicas:
        raise BenchError(
            f"{len(fleet)} replicas answered, --replicas is {replicas} (each is met where "
            f"--requests are enough, they are {requests})"
        )
    alone = statistics.median(hit)
    table = [
        [
            # Measured already, more often, and what the model draws from.
            alone if busy == crowd == 1 else await _taken(client, fleet, [crowd] * busy, each)
            for crowd in range(1, places + 1)
        ]
        for busy in range(1, replicas + 1)
    ]
    neighbours = [_lengthened(row, table[0]) for row in table[1:]]
    service = Service(hit, miss, _lengthened(table[0], [alone] * places), cached, neighbours)
    sizes = [places, *[1] * (replicas - 1)]
    told = {
        "requests": requests,
        "replicas": replicas,
        "each": each,
        "hit_median": alone,
        "miss_median": statistics.median(miss),
        "capacity": replicas * places / table[-1][-1],
        "lopsided": await _medians(client, fleet, sizes, each),
        "lopsided_predicted": [alone / service.speed(n, replicas, sum(sizes)) for n in sizes],
        "cpus": os.cpu_count(),
        "load": load,
    }
    return service, told


async def _alone(
    client: Client, requests: int
) -> tuple[list[float], list[float], list[list[Known]]]:
    """Return the seconds of answers about new pictures, of those about them again, and who knows.

    The last are each replica's pictures, most of them first.
    """
    miss, hit = [], []
    known: defaultdict[str, list[Known]] = defaultdict(list)
    for request in client.new(requests):
        first, again = await client.ask(request), await client.ask(request)
        if first.replica != again.replica:
            raise BenchError("two replicas were asked about one picture: routing must be affinity")
        miss.append(first.seconds)
        hit.append(again.seconds)
        known[first.replica].append(Known(first.replica, request))
    return miss, hit, sorted(known.values(), key=len, reverse=True)


async def _taken(
    client: Client, fleet: Sequence[Sequence[Known]], crowds: Sequence[int], each: int
) -> float:
    return statistics.mean(await _medians(client, fleet, crowds, each))


async def _medians(
    client: Client, fleet: Sequence[Sequence[Known]], crowds: Sequence[int], each: int
) -> list[float]:
    """Return the median of each replica's answers while the first ones have so many clients."""
    clients = [
        at[number % len(at)]
        for at, crowd in zip(fleet, crowds, strict=False)
        for number in range(crowd)
    ]
    found = iter(await client.busy(clients, each))
    return [statistics.median(chain(*islice(found, crowd))) for crowd in crowds]


def _lengthened(row: Sequence[float], by: Sequence[float]) -> list[float]:
    """Return by how many times; what is not slowed may look faster by chance."""
    return [max(one / other, 1.0) for one, other in zip(row, by, strict=True)]
