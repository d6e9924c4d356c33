"""What the gateway sends to a replica: one HTTP request, whole, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from starlette.types import Scope

Messages = Sequence[Mapping[str, Any]]
"""ASGI messages of an answer, in their order."""

REPLICA_HEADER = b"x-qwen2vl-replica"
"""Of every answer: the replica that gave it."""

_SENT = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")


@dataclass(frozen=True, slots=True)
class Ask:
    """``key`` decides which replica gets it, unless ``replica`` names one.

    ``tried`` have refused it or were lost, and are asked again only where there is no other. The
    router notes in ``sent_to`` the replicas that took it, in the process that asks.
    """

    key: str
    scope: Mapping[str, Any]
    body: bytes
    replica: str | None = None
    tried: frozenset[str] = frozenset()
    sent_to: list[str] = field(default_factory=list, compare=False)

    def elsewhere(self, *names: str) -> Self:
        """Return the same for a replica other than these."""
        return replace(self, tried=self.tried.union(names), sent_to=[])


def plain_scope(scope: Scope, request_id: str) -> dict[str, Any]:
    """Return what of a scope can be sent to another process, under this request id."""
    headers = [one for one in scope["headers"] if one[0].lower() != b"x-request-id"]
    headers.append((b"x-request-id", request_id.encode()))
    sent = {name: scope[name] for name in _SENT if scope.get(name) is not None}
    return {"type": "http", "asgi": {"version": "3.0"}, "root_path": "", **sent, "headers": headers}
