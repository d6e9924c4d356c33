"""The HTTP application: middleware, error shape, routes.

A request goes down this page: ``Envelope`` (id, errors, counts) → ``RequireKey`` → a route of
``API``: read → parse → engine → response.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, NoReturn, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl_serve import __version__
from qwen2vl_serve.auth import Keys, RequireKey
from qwen2vl_serve.engine import Engine, ServedModel
from qwen2vl_serve.errors import (
    APIError,
    InternalError,
    MethodNotAllowed,
    ModelNotFound,
    RequestError,
    RequestTooLarge,
    RouteNotFound,
    ShuttingDown,
    UnsupportedContentType,
)
from qwen2vl_serve.media.loader import MediaLoader, Picture
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol import ChatRequest
from qwen2vl_serve.validation import RequestLimits, parse_chat

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What needs no key: a probe holds none."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_T = TypeVar("_T")


class Metrics:
    """Our own figures; vLLM's stand in prometheus_client's default registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "qwen2vl_requests",
            "Requests answered, by route, HTTP status and error code",
            ["route", "status", "code"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "qwen2vl_requests_in_flight",
            "Requests under /v1 being answered",
            registry=self.registry,
        )
        self.seconds = Histogram(
            "qwen2vl_request_seconds",
            "Time from the request's head to the end of its answer",
            ["route"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Return vLLM's figures and ours in Prometheus's text format."""
        return generate_latest(REGISTRY) + generate_latest(self.registry)


class Envelope:
    """ASGI middleware around everything: request id, error shape, counts and one log line.

    An ``APIError`` raised further in becomes its own answer, any other exception a 500 that
    tells nothing but the id under which the log holds the cause.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens further in."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own_id = uuid.uuid4().hex
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else own_id
        scope.setdefault("state", {})["id"] = own_id
        started, status, code = time.perf_counter(), 0, ""

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        counted = scope["path"].startswith("/v1/")
        self.metrics.in_flight.inc(counted)
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            failure = (
                error
                if isinstance(error, APIError)
                else InternalError(
                    f"The server failed on this request; its log has the cause under {request_id}."
                )
            )
            if failure is not error:
                logger.exception("request %s failed", request_id)
            code = failure.code or ""
            if status == 0:
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            self.metrics.in_flight.dec(counted)
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status, code).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if route not in OPEN_PATHS:
                logger.info(
                    "%s %s %s %s %.3f s%s",
                    request_id, scope["method"], scope["path"], status, seconds,
                    f" {code}" if code else "",
                )  # fmt: skip


class EventStream(StreamingResponse):
    """Server-sent events ending in ``[DONE]``; an error ends them without it.

    A client that leaves closes ``chunks``, and with it the generation.
    """

    def __init__(self, first: str, chunks: AsyncGenerator[str, None]) -> None:
        super().__init__(self._events(first, chunks), media_type="text/event-stream")
        self._chunks = chunks
        # Proxies buffer event streams unless told; browsers must not keep them.
        self.headers["x-accel-buffering"] = "no"
        self.headers["cache-control"] = "no-store"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; however that ends, the generation ends with it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()

    async def _events(
        self, first: str, chunks: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        yield f"data: {first}\n\n"
        try:
            async for chunk in chunks:
                yield f"data: {chunk}\n\n"
        except APIError as error:
            logger.warning("stream cut short: %s", error)
            yield f"data: {to_json(error.body()).decode()}\n\n"
            return
        yield "data: [DONE]\n\n"


class API:
    """The routes, over one engine and one profile."""

    def __init__(
        self, engine: Engine, loader: MediaLoader, profile: Profile, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.metrics = metrics
        self.max_body_bytes = profile.limits.max_body_bytes
        self.limits = RequestLimits(
            max_messages=profile.limits.max_messages,
            max_n=profile.limits.max_n,
            max_tokens=profile.limits.max_tokens,
            images=profile.media.limit_mm_per_prompt.image,
            videos=profile.media.limit_mm_per_prompt.video,
        )
        self.draining = False

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation about text, pictures and videos."""
        self._refuse_while_draining()
        chat = parse_chat(await self._read(request), self.limits)
        self._find(chat.model)
        pictures = await _unless_gone(request, self.loader.load(chat))
        if not chat.stream:
            answer = self.engine.complete(chat, pictures, request.state.id)
            body = await _unless_gone(request, answer)
            return Response(_with_media(body, chat, pictures), media_type="application/json")
        chunks = self.engine.stream(chat, pictures, request.state.id)
        # The first chunk before the status line: until then an error has its own status.
        first = await _unless_gone(request, anext(chunks))
        return EventStream(_with_media(first.encode(), chat, pictures).decode(), chunks)

    async def models(self) -> JSONResponse:
        """List the served models."""
        return JSONResponse(
            {"object": "list", "data": [_model(model) for model in self.engine.models]}
        )

    async def model(self, name: str) -> JSONResponse:
        """Describe one served model."""
        return JSONResponse(_model(self._find(name)))

    async def live(self) -> JSONResponse:
        """Tell that the process turns its event loop."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> JSONResponse:
        """Tell that the engine answers and that new requests are taken."""
        self._refuse_while_draining()
        await self.engine.check()
        return JSONResponse({"status": "ready"})

    async def version(self) -> JSONResponse:
        """Tell the versions of this server and of its engine."""
        return JSONResponse({"qwen2vl_serve": __version__, "engine": self.engine.version})

    async def metrics_text(self) -> Response:
        """Return vLLM's figures and ours for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ShuttingDown("The server is shutting down and takes no new requests.")

    def _find(self, name: str | None) -> ServedModel:
        for model in self.engine.models:
            if name is None or model.id == name:
                return model
        names = ", ".join(repr(model.id) for model in self.engine.models)
        raise ModelNotFound(
            f"model {str(name)[:100]!r} is not served here; served: {names}.", param="model"
        )

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise UnsupportedContentType(
                f"The content type is {kind[:60]!r}; send application/json."
            )
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise UnsupportedContentType(
                f"The body is encoded as {encoding[:60]!r}; send it uncompressed."
            )
        limit = self.max_body_bytes
        body = bytearray()
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise self._too_large(int(declared))
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise self._too_large(len(body))
        return bytes(body)

    def _too_large(self, size: int) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body holds {size} bytes or more; at most {self.max_body_bytes} are read: "
            "send smaller or fewer pictures, or raise limits.max_body_bytes in the profile."
        )


def build_app(engine: Engine, loader: MediaLoader, profile: Profile, keys: Keys) -> FastAPI:
    """Return the application; ``app.state.api`` is its ``API``."""
    metrics = Metrics()
    api = API(engine, loader, profile, metrics)
    app = FastAPI(title="qwen2vl_serve", version=__version__, redirect_slashes=False)
    app.state.api = api
    app.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"])
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/health/live", api.live)
    app.add_api_route("/health/ready", api.ready)
    app.add_api_route("/version", api.version)
    app.add_api_route("/metrics", api.metrics_text)
    app.add_exception_handler(HTTPException, _raise_ours)
    app.add_exception_handler(RequestValidationError, _raise_ours)
    app.add_middleware(RequireKey, keys=keys, open_paths=OPEN_PATHS)
    app.add_middleware(Envelope, metrics=metrics)  # added last: outermost
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own hook
    return app


def _with_media(body: bytes, chat: ChatRequest, pictures: Sequence[Picture]) -> bytes:
    """Add ``media``, where asked for, to a JSON object that is already written."""
    if not chat.include_media_info:
        return body
    return body[:-1] + b',"media":' + to_json([one.info() for one in pictures]) + b"}"


def error_response(error: APIError) -> JSONResponse:
    """Return an error in OpenAI's shape."""
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))


def _raise_ours(request: Request, error: Exception) -> NoReturn:
    """Turn the framework's own errors into ours; ``Envelope`` answers them."""
    path, method = request.url.path[:200], request.method
    match error:
        case HTTPException(status_code=404):
            raise RouteNotFound(f"There is no {path!r} here; /docs lists what there is.")
        case HTTPException(status_code=405):
            raise MethodNotAllowed(f"{path!r} does not take {method}.")
        case _:
            raise RequestError("The request could not be read.")


async def _unless_gone(request: Request, answer: Awaitable[_T]) -> _T:
    """Await ``answer``; cancel it as soon as the client closes the connection.

    Raises:
        ClientDisconnect: the client left first.
    """
    work = asyncio.ensure_future(answer)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            # Its clean-up (the abort in the engine) ends before ours does.
            await asyncio.gather(work, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "qwen2vl_serve",
        "max_model_len": model.max_model_len,
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        # The body is parsed by hand (one pass, our errors), so it is described by hand too.
        _, definitions = models_json_schema(
            [(ChatRequest, "validation")], ref_template="#/components/schemas/{model}"
        )
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        schema["paths"]["/v1/chat/completions"]["post"]["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}
            },
        }
        app.openapi_schema = schema
    return app.openapi_schema
