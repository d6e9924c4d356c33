"""The door: pure ASGI around everything, before a byte of a body is read.

``Door``, within ``Envelope``, refuses requests to other hosts, without a key, or beyond a key's
limits; ``add_headers`` is what every answer gets.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl_serve.auth.keys import ANYONE, Keys
from qwen2vl_serve.auth.quota import UNLIMITED, Quotas
from qwen2vl_serve.errors import InvalidHost, MalformedRequest

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# Answers are somebody's own, no page of ours belongs into another's frame, and a body is what its
# content type says.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


HostRule = Callable[[str], bool]
"""Tells whether this server answers to a name, given in lower case without port and brackets."""


def host_rule(named: Collection[str] | None, listens_on: str) -> HostRule | None:
    """Return what is demanded of ``Host``; None where any is taken.

    A page in the operator's browser can point a name of its own at 127.0.0.1 and speak to what
    listens there. So a server that only its machine can reach, unless told names, takes addresses
    and names without a dot: such a page has neither.
    """
    if named:
        names = frozenset(name.lower().strip("[]") for name in named)
        return None if "*" in names else names.__contains__
    return _is_local if listens_on.strip("[]") in LOOPBACK else None


def _is_local(name: str) -> bool:
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def add_headers(answer: Message, state: Mapping[str, Any]) -> None:
    """Add to an answer's start what every one has, and how much its caller's key has left."""
    headers = list(answer["headers"])
    there = {name for name, _ in headers}
    headers += [one for one in SECURITY_HEADERS if one[0] not in there]
    headers += state.get("visit", UNLIMITED).headers()
    answer["headers"] = headers


class Door:
    """ASGI middleware: every path but ``open_paths`` needs one of ``keys``, within its limits.

    ``scope["state"]`` gets ``caller``, ``visit`` and, of a key that has one, its name as ``key``.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        quotas: Quotas,
        open_paths: frozenset[str],
        host_rule: HostRule | None = None,
    ) -> None:
        self.app = app
        self.keys = keys
        self.quotas = quotas
        self.open_paths = open_paths
        self.host_rule = host_rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or raise an ``APIError`` for ``Envelope`` to answer.

        Raises:
            InvalidHost, MalformedRequest: it is meant for another server, or for none.
            InvalidAPIKey: it has no key of this server's.
            RateLimited, QuotaUnavailable: its key is used up, or cannot be counted.
        """
        if scope["type"] != "http":
            # There are no WebSockets here, and so none without a key.
            return
        headers = Headers(scope=scope)
        state = scope["state"]
        state["caller"], state["visit"] = ANYONE, UNLIMITED
        if scope["path"] in self.open_paths:
            # A probe of an orchestrator names the server by an address of its own.
            await self.app(scope, receive, send)
            return
        caller = self.keys.check(headers.get("authorization"))
        if self.host_rule is not None:
            _check_host(headers.getlist("host"), self.host_rule)
        if caller.name:
            state["caller"], state["key"] = caller, caller.name
        if caller.limits is None:
            await self.app(scope, receive, send)
            return
        async with self.quotas.visit(caller, state):
            await self.app(scope, receive, send)


def _check_host(given: Sequence[str], rule: HostRule) -> None:
    found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise MalformedRequest("The request has to name one host in its header Host.")
    name = found[1].strip("[]").rstrip(".").lower()
    if not rule(name):
        raise InvalidHost(
            f"This server does not answer to the host {name[:100]!r}; its operator names others "
            "in server.allowed_hosts of the profile."
        )
