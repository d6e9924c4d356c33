"""What a call asks of its transport, step by step.

A ``Flow`` is a generator that does no I/O: it yields a step, is sent that step's outcome (or has
its error thrown in), and returns the call's result. ``Transport.run`` performs the steps with
requests, ``AsyncTransport.run`` with httpx; everything between them and the caller is the same.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

JSON = "application/json"


@dataclass(frozen=True)
class Call:
    """One HTTP request; its outcome is a ``Reply``, or the open byte stream where ``streamed``.

    ``path`` counts from ``base_url``, or from the server's root where ``from_root``.
    """

    method: str
    path: str
    body: bytes | None = None
    content_type: str = JSON
    timeout: float | None = None
    streamed: bool = False
    from_root: bool = False


@dataclass(frozen=True)
class Wait:
    """Let so many seconds pass; its outcome is None."""

    seconds: float


@dataclass(frozen=True)
class Alone:
    """Run a flow while no other of the same ``key`` runs; its outcome is the flow's result."""

    key: str
    flow: Flow[Any]


@dataclass(frozen=True)
class Reply:
    """A whole JSON answer; names of ``headers`` are in lower case."""

    json: dict[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def request_id(self) -> str | None:
        """What finds the request in the server's log."""
        return self.headers.get("x-request-id")


T = TypeVar("T")
Step: TypeAlias = Call | Wait | Alone
Flow: TypeAlias = Generator[Step, Any, T]
