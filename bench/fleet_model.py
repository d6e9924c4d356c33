"""A fleet as a queueing model: replicas with places and a cache, and who chooses among them.

A replica answers so many requests at once, the others wait in turn. An answer takes one of the
times that were measured, of pictures that are cached or of new ones. It goes on at a speed that was
measured for so many answers at its replica and on its machine, and that changes whenever one of
them begins or ends: processor sharing. The cache keeps the pictures used last.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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

    ``hit`` are those of a picture that was asked about before, ``miss`` of new ones. An answer
    takes ``crowd[n - 1]`` times as long while its replica gives n of them, at most as many as
    ``crowd`` has entries. It takes another ``neighbours[b - 2][n - 1]`` times as long while b
    replicas of its machine, its own among them, give n each; where those give n on average only,
    whole or not, it is taken to be the same. What a new picture takes beyond a known one is work
    that its replica does for it alone: all other answers stand still. A replica caches ``cached``
    pictures.
    """

    hit: Sequence[float]
    miss: Sequence[float]
    crowd: Sequence[float]
    cached: int
    neighbours: Sequence[Sequence[float]] = ()

    def require(self) -> None:
        """Return if answers can have taken these times.

        Raises:
            ValueError: they cannot.
        """
        if not (self.hit and self.miss and min(*self.hit, *self.miss) > 0):
            raise ValueError("hit and miss must have times of more than 0 s")
        if not (self.crowd and self.crowd[0] == 1):
            raise ValueError("crowd must begin with 1")
        for table in (self.crowd, *self.neighbours):
            if len(table) != self.places:
                raise ValueError("neighbours must have as many entries each as crowd")
            if not all(1 <= one < math.inf for one in table):
                raise ValueError("crowd and neighbours must have nothing below 1")
        if self.cached < 1:
            raise ValueError("cached must be at least 1")

    @property
    def places(self) -> int:
        """How many answers a replica gives at once."""
        return len(self.crowd)

    @property
    def together(self) -> int:
        """How many replicas a machine may have."""
        return len(self.neighbours) + 1

    @cached_property
    def preparing(self) -> float:
        """How long a replica works for a new picture alone, in seconds."""
        return max(statistics.median(self.miss) - statistics.median(self.hit), 0.0)

    def draw(self, rng: random.Random, *, hit: bool) -> tuple[float, float]:
        """Return how long a replica works for an answer alone, and how long it then takes alone."""
        if hit:
            return 0.0, rng.choice(self.hit)
        return self.preparing, max(rng.choice(self.miss) - self.preparing, self._least)

    @cached_property
    def _least(self) -> float:
        return min(self.hit)

    def speed(self, answers: int, busy: int = 1, total: int = 0) -> float:
        """Return how fast each of so many answers of a replica is given.

        ``busy`` replicas of its machine give ``total`` answers together. The speed of an answer
        that is alone is 1.
        """
        slowed = self.crowd[answers - 1]
        if busy > 1:
            row = self.neighbours[busy - 2]
            fewer, more = divmod(total, busy)
            beside = row[fewer - 1]
            if more:  # the mean lies between two that were measured
                beside += (row[fewer] - beside) * more / busy
            slowed *= beside
        return 1 / slowed


class Machine:
    """Where engines run that slow each other: those that are busy, and how many answers they give.

    Whenever one begins or ends, each engine has gone on at the speed that it had until then.
    """

    def __init__(self) -> None:
        self.busy: dict[Shared, None] = {}
        self.total = 0

    def go_on(self) -> None:
        """Bring every engine to the present; before anything that changes their speeds."""
        for one in self.busy:
            one.go_on()

    def plan(self, one: Shared, change: int) -> None:
        """Take note that ``one`` gives so many more answers; have each wait for its next end."""
        self.total += change
        if one.answers:
            self.busy[one] = None
        else:
            del self.busy[one]
        for each in self.busy:
            each.plan()


class Shared:
    """An engine's time, shared by the answers that it gives.

    Its clock counts seconds of an answer that is alone, and so goes at the speed of each; an
    answer that takes so many ends when it has gone on by as many, whoever comes or ends before.
    While the engine works for one answer alone, its clock stands still. ``speed`` tells it from the
    number of answers and the numbers of ``machine``, which is one of its own if none is given:
    engines that are busy, and their answers together.
    """

    def __init__(
        self, env: Any, speed: Callable[[int, int, int], float], machine: Machine | None = None
    ) -> None:
        self._env = env
        self._speed = speed
        self._machine = machine or Machine()
        self._ends: list[tuple[float, int, Any]] = []
        self._numbers = itertools.count()
        self._clock = self._looked = self._now = 0.0
        self._alone, self._now_alone = 0.0, 1.0
        self._planned: Any = None

    @property
    def answers(self) -> int:
        """How many it gives."""
        return len(self._ends)

    def answer(self, seconds: float, alone: float = 0.0) -> Any:
        """Return the event that an answer has ended which takes so long alone.

        Before that the engine works ``alone`` seconds for it, during which no answer goes on.
        """
        self._machine.go_on()
        ended = self._env.event()
        self._alone += alone
        heapq.heappush(self._ends, (self._clock + seconds, next(self._numbers), ended))
        self._machine.plan(self, 1)
        return ended

    def go_on(self) -> None:
        """Bring the clock to the present; a new plan follows."""
        past = self._env.now - self._looked
        still = min(self._alone / self._now_alone, past)
        self._alone -= still * self._now_alone
        self._clock += (past - still) * self._now

    def plan(self) -> None:
        """Wait for the next end at the present speed; a plan made before is outdated."""
        machine = self._machine
        self._looked = self._env.now
        beside = len(machine.busy), machine.total
        self._now, self._now_alone = self._speed(self.answers, *beside), self._speed(1, *beside)
        left = max(self._ends[0][0] - self._clock, 0.0) / self._now
        self._planned = self._env.timeout(self._alone / self._now_alone + left)
        self._planned.callbacks.append(self._end)

    def _end(self, plan: Any) -> None:
        if plan is self._planned:
            self._machine.go_on()
            self._clock, _, ended = heapq.heappop(self._ends)  # exactly, not by a sum of shares
            self._alone = 0.0
            self._planned = None
            ended.succeed()
            self._machine.plan(self, -1)


class Replica:
    """One engine: its places, its time, and the pictures that it has cached."""

    def __init__(self, env: Any, service: Service, machine: Machine) -> None:
        self.places = simpy.Resource(env, service.places)
        self.time = Shared(env, service.speed, machine)
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
    """Return the fleet's own policy; see ``qwen2vl_serve.fleet.affinity``.

    Names are as good as Ray's, which nobody chooses: they decide who prefers whom.
    """
    names = {f"{rng.getrandbits(64):x}": number for number in range(len(loads.each))}
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
    requests: Sequence[Request],
    replicas: int,
    service: Service,
    policy: str,
    *,
    seed: int = 1,
    together: int = 1,
) -> Outcome:
    """Return how a fleet fares with these requests, with ``together`` replicas on each machine.

    Raises:
        ValueError: it was not measured how so many slow each other.
    """
    if together > service.together:
        raise ValueError(f"{together} replicas on a machine, {service.together} were measured")
    rng = random.Random(seed)  # noqa: S311  (not for secrets)
    env = simpy.Environment()
    machines = [Machine() for _ in range(0, replicas, together)]
    fleet = [Replica(env, service, machines[number // together]) for number in range(replicas)]
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
            alone, seconds = service.draw(rng, hit=hit)
            yield replica.time.answer(seconds, alone)
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
