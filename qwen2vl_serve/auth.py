"""API keys: who may use the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen2vl_serve.errors import InvalidAPIKey


class Keys:
    """The keys of a server; none at all leaves it open."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so that a comparison tells nothing about the key's.
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Return when the header ``Authorization`` carries one of the keys.

        Raises:
            InvalidAPIKey: no ``Bearer`` key, or none of these.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidAPIKey("No API key was given; send the header Authorization: Bearer KEY.")
        given = _digest(key.strip())
        # Every key is compared: the time must not tell which one was near.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise InvalidAPIKey("The API key is not one of this server's.")


class RequireKey:
    """ASGI middleware: every path but ``open_paths`` needs one of ``keys``."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str]) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or raise ``InvalidAPIKey`` for ``Envelope`` to answer."""
        if scope["type"] == "http" and self.keys and scope["path"] not in self.open_paths:
            self.keys.check(Headers(scope=scope).get("authorization"))
        await self.app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
