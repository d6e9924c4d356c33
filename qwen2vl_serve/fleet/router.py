"""Ray's request router for replicas: ours decides the order in which they are tried.

It runs in the gateway's process. What it knows of loads is what replicas told with their last
answers and what has been sent since, by this gateway.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qwen2vl_serve.fleet import known
from qwen2vl_serve.fleet.affinity import AT_EASE, SLACK, order
from qwen2vl_serve.fleet.asking import Ask


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types
    """Chooses replicas by what they have cached, bounded by their load; see ``affinity``."""

    def initialize_state(self, slack: float = SLACK, at_ease: int = AT_EASE) -> None:
        """Take the bounds that the deployment's ``request_router_kwargs`` set."""
        self.slack, self.at_ease = slack, at_ease

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take note of who is there."""
        super().update_replicas(replicas)
        known.replicas = [one.replica_id.unique_id for one in replicas]

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the best first."""
        there = {one.replica_id.unique_id: one for one in candidate_replicas}
        ask = _asked(pending_request)
        if ask is not None and ask.replica is not None:
            return [[there[ask.replica]]] if ask.replica in there else [list(there.values())]
        names = self.preferred("" if ask is None else ask.key, self.loads(candidate_replicas))
        tried = frozenset[str]() if ask is None else ask.tried
        return [[there[one]] for one in sorted(names, key=tried.__contains__)]

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: Any,
        result: Any,  # noqa: ARG002 -- Ray's signature
    ) -> None:
        """Note in the request which replica has taken it: where that is lost, another is asked."""
        ask = _asked(pending_request)
        if ask is not None:
            ask.sent_to.append(replica_id.unique_id)

    def preferred(self, key: str, loads: dict[str, int]) -> Sequence[str]:
        """Return the replicas in the order in which they are to be tried."""
        return order(key, loads, self.slack, self.at_ease)

    def loads(self, replicas: list[RunningReplica]) -> dict[str, int]:
        """Return how many requests each replica works on; unknown ones are believed idle."""
        held = self.replica_queue_len_cache
        return {one.replica_id.unique_id: held.get(one.replica_id) or 0 for one in replicas}


class RandomRouter(AffinityRouter):
    """Chooses any replica: what affinity is measured against."""

    def preferred(self, key: str, loads: dict[str, int]) -> Sequence[str]:  # noqa: ARG002
        """Return the replicas in any order."""
        return random.sample(list(loads), len(loads))


def _asked(pending: PendingRequest | None) -> Ask | None:
    if pending is None or not pending.args:
        return None
    first = pending.args[0]
    return first if isinstance(first, Ask) else None
