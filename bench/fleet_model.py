"""A fleet as a queueing model: replicas with places and a cache, and who chooses among them.

A replica answers ``places`` requests at once, the others wait in turn. An answer takes one of the
times that were measured, of pictures that are cached or of new ones. While others are being given
all of them are slower, by ``slowdown`` for each other, from its beginning to its end: processor
sharing. The cache keeps the pictures used last.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from bench.fleet_traffic import Request
from bench.overload_figures import percentile
from qwen2vl_serve.fleet.affinity import AT_EASE, SLACK, bound, ranked

WARM = 0.25
"""The first quarter of the time fills the caches and is not told."""

PREFERRED = 8
"""So many replicas of a key's order are tried before the least busy one."""


@dataclass(frozen=True)
class Service:
    """Measured times of an answer in seconds, with one client; see ``bench.fleet measure``.

    ``hit`` are those of a picture that was asked about before, ``miss`` of new ones. ``slowdown``
    is the share by which each other answer lengthens one, measured with ``places`` clients.
    """

    hit: Sequence[float]
    miss: Sequence[float]
    slowdown: float
    places: int
    cached: int

    def require(self) -> None:
        """Return if answers can have taken these times.

        Raises:
            ValueError: they cannot.
        """
        if not (self.hit and self.miss and min(*self.hit, *self.miss) > 0):
            raise ValueError("hit and miss must have times of more than 0 s")
        if not (self.slowdown >= 0 and min(self.places, self.cached) >= 1):
            raise ValueError("slowdown must be at least 0, places and cached at least 1")

    def draw(self, rng: random.Random, *, hit: bool) -> float:
        """Return how long an answer takes alone."""
        return rng.choice(self.hit if hit else self.miss)

    def speed(self, answers: int) -> float:
        """Return how fast each of so many answers is given; of one it is 1."""
        return 1 / (1 + self.slowdown * (answers - 1))


class Shared:
    """An engine's time, shared by the answers that it gives.

    Its clock counts seconds of an answer that is alone, and so goes at the speed of each; an
    answer that takes so many ends when it has gone on by as many, whoever comes or ends before.
    """

    def __init__(self, env: Any, speed: Callable[[int], float]) -> None:
        self._env = env
        self._speed = speed
        self._ends: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._clock = self._looked = 0.0
        self._planned: Any = None

    def answer(self, seconds: float) -> Any:
        """Return the event that an answer has ended which takes so long alone."""
        self._go_on()
        ended = self._env.event()
        heapq.heappush(self._ends, (self._clock + seconds, next(self._numbers), ended))
        self._plan()
        return ended

    def _go_on(self) -> None:
        if self._ends:
            self._clock += (self._env.now - self._looked) * self._speed(len(self._ends))
        self._looked = self._env.now

    def _plan(self) -> None:
        """Wait for the next end; a plan made before is outdated."""
        self._planned = None
        if self._ends:
            left = max(self._ends[0][0] - self._clock, 0.0) / self._speed(len(self._ends))
            self._planned = self._env.timeout(left)
            self._planned.callbacks.append(self._end)

    def _end(self, plan: Any) -> None:
        if plan is self._planned:
            self._go_on()
            self._clock, _, ended = heapq.heappop(self._ends)  # exactly, not by a sum of shares
            ended.succeed()
            self._plan()


class Replica:
    """One engine: its places, its time, and the pictures that it has cached."""

    def __init__(self, env: Any, service: Service) -> None:
        self.places = simpy.Resource(env, service.places)
        self.time = Shared(env, service.speed)
        self._most = service.cached
        self._cache: OrderedDict[str, None] = OrderedDict()

    def shown(self, key: str) -> bool:
        """Take note of a picture; return whether it was cached."""
        hit = key in self._cache
        self._cache[key] = None
        self._cache.move_to_end(key)
        if len(self._cache) > self._most:
            self._cache.popitem(last=False)
        return hit


@dataclass
class Loads:
    """How many requests each replica has, waiting ones included."""

    each: list[int]
    total: int = 0

    def add(self, replica: int, number: int) -> None:
        """Count one that came (1) or went (-1)."""
        self.each[replica] += number
        self.total += number


Policy = Callable[[str, Loads], int]
"""Chooses the replica for a key."""


def any_one(loads: Loads, rng: random.Random) -> Policy:
    """Return the policy that looks at nothing."""
    return lambda _key, _loads: rng.randrange(len(loads.each))


def in_turn(loads: Loads, _rng: random.Random) -> Policy:
    """Return the policy of nginx: one after the other."""
    count = iter(range(10**12))
    return lambda _key, _loads: next(count) % len(loads.each)


def least_busy(loads: Loads, rng: random.Random) -> Policy:
    """Return the policy that joins the shortest queue; among equal ones any."""

    def choose(_key: str, now: Loads) -> int:
        least = min(now.each)
        return rng.choice([one for one, load in enumerate(now.each) if load == least])

    del loads
    return choose


def affinity(loads: Loads, rng: random.Random) -> Policy:
    """Return the fleet's own policy; see ``qwen2vl_serve.fleet.affinity``."""
    names = {f"replica-{number}": number for number in range(len(loads.each))}
    preferred: dict[str, list[int]] = {}
    fallback = least_busy(loads, rng)

    def choose(key: str, now: Loads) -> int:
        if key not in preferred:
            preferred[key] = [names[one] for one in ranked(key, names)[:PREFERRED]]
        most = bound(now.total, len(now.each), SLACK, AT_EASE)
        for one in preferred[key]:
            if now.each[one] < most:
                return one
        return fallback(key, now)

    return choose


POLICIES: dict[str, Callable[[Loads, random.Random], Policy]] = {
    "random": any_one,
    "round robin": in_turn,
    "least busy": least_busy,
    "affinity": affinity,
}


@dataclass
class Outcome:
    """What became of the requests after the warm-up; times in seconds, from asking to the end."""

    policy: str
    replicas: int
    seconds: list[float] = field(default_factory=list)
    hits: int = 0
    most: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requests whose picture was cached."""
        return self.hits / len(self.seconds) if self.seconds else 0.0

    def at(self, share: float) -> float:
        """Return a percentile of the times; infinite where nobody asked."""
        return percentile(self.seconds, share) or float("inf")


def simulate(
    requests: Sequence[Request], replicas: int, service: Service, policy: str, seed: int = 1
) -> Outcome:
    """Return how a fleet fares with these requests."""
    rng = random.Random(seed)  # noqa: S311  (not for secrets)
    env = simpy.Environment()
    fleet = [Replica(env, service) for _ in range(replicas)]
    loads = Loads([0] * replicas)
    choose = POLICIES[policy](loads, rng)
    outcome = Outcome(policy, replicas)
    told_from = requests[-1].at * WARM if requests else 0.0

    def answer(request: Request) -> Iterator[Any]:
        number = choose(request.key, loads)
        replica = fleet[number]
        loads.add(number, 1)
        outcome.most = max(outcome.most, loads.each[number])
        with replica.places.request() as turn:
            yield turn
            hit = replica.shown(request.key)
            yield replica.time.answer(service.draw(rng, hit=hit))
        loads.add(number, -1)
        if request.at >= told_from:
            outcome.hits += hit
            outcome.seconds.append(env.now - request.at)

    def arrive() -> Iterator[Any]:
        for request in requests:
            yield env.timeout(max(request.at - env.now, 0.0))
            env.process(answer(request))

    env.process(arrive())
    env.run()
    return outcome


def fewest(
    requests: Sequence[Request], service: Service, policy: str, p99: float, most: int
) -> int | None:
    """Return the smallest fleet whose 99th percentile is at most ``p99``; None if ``most`` fails.

    Taken to be monotonous: a larger fleet is no slower.
    """

    def enough(replicas: int) -> bool:
        return simulate(requests, replicas, service, policy).at(0.99) <= p99

    if not enough(most):
        return None
    low, high = 0, most  # low is too few, high is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
