"""A run of ``bench.fleet replay``: what was sent to which fleet, and what the model says of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from bench.fleet_model import Outcome, Service, simulate
from bench.fleet_traffic import Habits, Request, trace

SIMULATIONS = 20
"""Of the same requests: each draws its own times of answers and names of replicas."""

ENOUGH = 500
"""Of fewer answers the 99th percentile is that of the few slowest ones, by chance."""


@dataclass(frozen=True)
class Replay:
    """Conversations and the fleet that they are sent to, all of it on one machine.

    ``rate`` is requests a second, ``turns`` those of a conversation, ``pause`` the seconds between
    them, ``seconds`` how long all of it lasts, and ``seed`` that of the conversations.
    """

    replicas: int
    routing: str
    rate: float
    turns: float
    pause: float
    seconds: float
    seed: int

    @property
    def habits(self) -> Habits:
        """What its users do: a fifth of the conversations are about twenty pictures."""
        return Habits(self.rate / self.turns, self.turns, self.pause, 0.2, 20)

    def requests(self) -> Sequence[Request]:
        """Return what is sent, the same each time."""
        return trace(self.habits, self.seconds, self.seed)

    def simulated(self, service: Service) -> Sequence[Outcome]:
        """Return what became of the same requests in each of ``SIMULATIONS`` simulations.

        Raises:
            ValueError: ``service`` was measured with fewer replicas.
        """
        requests, size = self.requests(), self.replicas
        return [
            simulate(requests, size, service, self.routing, seed=seed, together=size)
            for seed in range(1, SIMULATIONS + 1)
        ]


@dataclass(frozen=True)
class Figures:
    """Share of known pictures, and percentiles of the seconds of an answer."""

    hit_rate: float
    p50: float
    p99: float

    @classmethod
    def of(cls, outcome: Outcome) -> Self:
        """Return those of one run."""
        return cls(outcome.hit_rate, outcome.at(0.5), outcome.at(0.99))


@dataclass(frozen=True)
class Predicted:
    """What the simulations say: the mean of each figure, its least and its most.

    ``crowded`` is the most requests at one replica in any of them.
    """

    mean: Figures
    least: Figures
    most: Figures
    crowded: int

    @classmethod
    def by(cls, outcomes: Sequence[Outcome]) -> Self:
        """Return it from the simulations' outcomes."""
        each = [asdict(Figures.of(one)) for one in outcomes]

        def all_by(of_all: Any) -> Figures:
            return Figures(**{name: of_all([one[name] for one in each]) for name in each[0]})

        crowded = max(one.most for one in outcomes)
        return cls(all_by(statistics.mean), all_by(min), all_by(max), crowded)


@dataclass(frozen=True)
class Recorded:
    """A run that was kept: what was sent, the times measured before it, and what was found."""

    run: Replay
    service: Service
    found: Outcome

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Self:
        """Return it from the content of ``record``.

        Raises:
            KeyError, TypeError, ValueError: it is another content.
        """
        run, measured = Replay(**kept["replay"]), kept["measured"]
        service = Service(**kept["measured_before"]["service"])
        service.require()
        seconds = measured["seconds"]
        hits = round(measured["hit_rate"] * len(seconds))
        return cls(run, service, Outcome(run.routing, run.replicas, seconds, hits))


def together(recorded: Sequence[Recorded]) -> tuple[Predicted, Outcome]:
    """Return what the model says and what was found of several runs, as if of one.

    Each is simulated again with the times that were measured before it.
    """
    simulated = zip(*(one.run.simulated(one.service) for one in recorded), strict=True)
    return Predicted.by([_joined(each) for each in simulated]), _joined(
        [one.found for one in recorded]
    )


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        outcomes[0].policy,
        outcomes[0].replicas,
        [seconds for one in outcomes for seconds in one.seconds],
        sum(one.hits for one in outcomes),
        max(one.most for one in outcomes),
    )


def record(
    replay: Replay, conditions: dict[str, Any], service: dict[str, Any], found: Outcome
) -> dict[str, Any]:
    """Return what is kept of a run, as JSON has it, so that it can be simulated again.

    ``service`` is the content of ``measure``'s file. What the model says of it is not kept: that
    of today is asked, whichever was there then.
    """
    measured = {"answers": len(found.seconds), **asdict(Figures.of(found))}
    return {
        "replay": asdict(replay),
        "conditions": conditions,
        "measured_before": service,
        "measured": measured | {"seconds": [round(one, 6) for one in found.seconds]},
    }
