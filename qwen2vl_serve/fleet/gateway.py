"""The fleet's door: reads a request, has a replica answer it, and asks another where one is lost.

No engine, no picture and no conversation is here: a few hundred requests a second and process, on
any machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from contextvars import Context

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.errors import APIError, EngineUnavailable, Overloaded, RouteNotFound
from qwen2vl_serve.fleet.affinity import content_key
from qwen2vl_serve.fleet.asking import REPLICA_HEADER, Ask, Messages, plain_scope
from qwen2vl_serve.fleet.figures import together
from qwen2vl_serve.http.body import BodyReader
from qwen2vl_serve.http.call import Call
from qwen2vl_serve.http.connection import WhileConnected
from qwen2vl_serve.http.cors import CORS
from qwen2vl_serve.http.envelope import OPEN_PATHS, Envelope, Metrics
from qwen2vl_serve.line import Refused
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.uploads import FORM_BYTES, RECEIVE_SECONDS

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Most replicas that are asked about one request."""

FIGURES_SECONDS = 5.0
"""How long a replica may take to tell its figures."""

_KEYED = ("/v1/chat/completions", "/v1/chat/completions/explain")
_NOTHING = "its answer ended before it began"
_NOT_HERE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class ReplicaLost(Exception):
    """A replica, or the way to it, broke while it was asked."""


Answers = Callable[[Ask], AsyncGenerator[Messages, None]]
"""Has a replica answer. Raises ``ReplicaLost``, or ``Refused`` when too many wait for replicas."""


class Gateway:
    """ASGI application in front of replicas of ``profile``.

    ``answers`` asks one, ``replicas`` names those that are there. ``app`` is what is to be served.
    """

    def __init__(
        self, profile: Profile, keys: Keys, answers: Answers, replicas: Callable[[], Sequence[str]]
    ) -> None:
        self.answers = answers
        self.replicas = replicas
        self.keys = keys
        self.names = frozenset(profile.model.served_names)
        limits, files = profile.limits, profile.files
        self.bodies = BodyReader(_overloaded)
        self.bodies.resize(limits.max_body_bytes, limits.body_seconds, limits.max_held_body_bytes)
        self.forms = BodyReader(
            _overloaded, kind="multipart/form-data", setting="files.max_file_bytes"
        )
        self.forms.resize(
            files.max_file_bytes + FORM_BYTES, RECEIVE_SECONDS, limits.max_held_body_bytes
        )
        self.metrics = Metrics()
        self.app: ASGIApp = Envelope(self._answer, self.metrics, set())
        if profile.server.cors_origins:
            self.app = CORS(self.app, profile.server.cors_origins)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = scope["path"]
        if path == "/health/live":
            await JSONResponse({"status": "live"})(scope, receive, send)
            return
        if path not in OPEN_PATHS:
            # Each replica asks again; here it keeps what strangers send out of the memory.
            caller = self.keys.check(request.headers.get("authorization"))
            if caller.name:
                scope["state"]["key"] = caller.name
        if path == "/metrics":
            await (await self._figures(scope))(scope, receive, send)
            return
        if path in _NOT_HERE:
            raise RouteNotFound(
                "Adapters of a fleet are those of its profile (adapters.lora_modules): one loaded "
                "while it runs would be on one replica. Name it there and deploy again."
            )
        body = await self._body(request)
        key = content_key(body, self.names) if path in _KEYED else ""
        call: Call = scope["state"]["call"]
        ask = Ask(key, plain_scope(scope, call.id), body)
        async with WhileConnected(receive):
            await _Exchange(self, ask, send).run()

    async def _body(self, request: Request) -> bytes:
        if request.method not in ("POST", "PUT", "PATCH"):
            return b""
        form = request.url.path == "/v1/files"
        return await (self.forms if form else self.bodies).read(request)

    async def _figures(self, scope: Scope) -> Response:
        """Return the figures of every replica, and this gateway's own, for Prometheus."""
        names = self.replicas()
        sent = plain_scope(scope, scope["state"]["call"].id)

        async def of(name: str) -> tuple[str, bytes]:
            try:
                async with asyncio.timeout(FIGURES_SECONDS):
                    async with aclosing(self.answers(Ask("", sent, b"", replica=name))) as batches:
                        said = [one async for batch in batches for one in batch]
                if not said:
                    raise ReplicaLost(_NOTHING)
            except (ReplicaLost, Refused, TimeoutError) as error:
                logger.warning("replica %s does not tell its figures: %r", name, error)
                return name, b""
            if (name.encode() not in dict(said[0]["headers"]).values()) or said[0]["status"] != 200:
                return name, b""
            return name, b"".join(one.get("body", b"") for one in said[1:])

        # Each in a context of its own: Ray's router takes calls made within one request, while they
        # wait together, for the same call.
        asked = [asyncio.create_task(of(name), context=Context()) for name in names]
        told = dict(await asyncio.gather(*asked))
        text = together({"": self.metrics.text(), **told})
        return Response(text, media_type=CONTENT_TYPE_LATEST)


class _Exchange:
    """One request on its way: from replica to replica until one begins to answer."""

    def __init__(self, gateway: Gateway, ask: Ask, send: Send) -> None:
        self.gateway = gateway
        self.ask = ask
        self.send = send
        self.begun = False
        self.is_stream = False

    async def run(self) -> None:
        """Send the answer of the first replica that gives one.

        Raises:
            EngineUnavailable: the replica was lost, or all that were asked refused.
            Overloaded: too many wait for replicas.
        """
        # What a lost replica had done already must not be done twice.
        most = 1 if self.ask.scope["method"] == "DELETE" else ATTEMPTS
        for attempt in range(1, most + 1):
            try:
                if await self._try(last=attempt == most):
                    return
            except Refused as refusal:
                raise _overloaded(refusal) from None
            except ReplicaLost:
                if self.begun:
                    await self._break_off()
                    return
                self.ask = self.ask.elsewhere(*self.ask.sent_to)
        raise EngineUnavailable("The replica that was asked is lost; try again.")

    async def _try(self, *, last: bool) -> bool:
        """Pass an answer on; return False, having sent nothing, if another shall be asked."""
        async with aclosing(self.gateway.answers(self.ask)) as batches:
            async for batch in batches:
                for message in batch:
                    if message["type"] == "http.response.start":
                        headers = dict(message["headers"])
                        name = headers.get(REPLICA_HEADER, b"").decode()
                        others = set(self.gateway.replicas()) - self.ask.tried - {name}
                        if message["status"] == 503 and others and not last:
                            self.ask = self.ask.elsewhere(name)
                            return False
                        kind = headers.get(b"content-type", b"")
                        self.is_stream = kind.startswith(b"text/event-stream")
                    self.begun = True
                    await self.send(dict(message))
        if not self.begun:
            raise ReplicaLost(_NOTHING)
        return True

    async def _break_off(self) -> None:
        """End a stream with an error event; another answer stays shorter than it announced."""
        if self.is_stream:
            error = EngineUnavailable("The replica was lost while it answered.")
            last = b"data: " + to_json(error.body()) + b"\n\n"
            await self.send({"type": "http.response.body", "body": last})


def _overloaded(refusal: Refused) -> APIError:
    return Overloaded(f"{refusal.text}: try again in 1 s.", retry_after=1)
