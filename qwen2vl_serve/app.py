"""The HTTP application: middleware, the framework's errors, and where each route leads.

A request goes down: ``Envelope`` (id, errors, counts) → ``Door`` (keys) → a route, of ``API`` or of
files, batches and adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse
from starlette.routing import Match

from qwen2vl_serve import __version__
from qwen2vl_serve.adapters.api import AdaptersAPI, LoadRequest, UnloadRequest
from qwen2vl_serve.api import API
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.quota import Quotas
from qwen2vl_serve.batches.asking import Asker
from qwen2vl_serve.batches.routes import BatchesAPI, BatchRequest
from qwen2vl_serve.batches.runner import Runner
from qwen2vl_serve.batches.store import BatchStore
from qwen2vl_serve.engine import Engine
from qwen2vl_serve.errors import (
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
)
from qwen2vl_serve.http import docs_page
from qwen2vl_serve.http.cors import CORS
from qwen2vl_serve.http.door import Door, host_rule
from qwen2vl_serve.http.envelope import OPEN_PATHS, Envelope, Metrics
from qwen2vl_serve.http.openapi import document
from qwen2vl_serve.http.tracing import Tracer
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.uploads import UPLOAD_BODY, FilesAPI

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/chat/completions/explain": ChatRequest,
    "/v1/batches": BatchRequest,
    "/v1/load_lora_adapter": LoadRequest,
    "/v1/unload_lora_adapter": UnloadRequest,
}
"""What is posted to the routes, as JSON."""


def build_app(
    engine: Engine,
    loader: MediaLoader,
    profile: Profile,
    keys: Keys,
    tracer: Tracer | None = None,
    *,
    batches: BatchStore | None = None,
) -> FastAPI:
    """Return the application; ``app.state.api`` is its ``API``, ``app.state.batches`` their runner.

    Without a store there are no batches.

    Raises ``PreflightError`` when keys have limits and nothing can be counted.
    """
    metrics = Metrics()
    quotas = Quotas(profile.quota_storage)
    if keys.limited:
        quotas.open()
    api = API(engine, loader, profile, metrics)
    app = FastAPI(
        title="qwen2vl_serve",
        version=__version__,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load their scripts from a CDN
        redoc_url=None,
    )
    app.state.api = api
    app.add_api_route("/v1/chat/completions", api.chat_completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions/explain", api.explain, methods=["POST"])
    files = FilesAPI(
        loader.files,
        api.documents.inspect,
        profile.files.max_file_bytes,
        api.refuse_new,
        api.uploads,
        batches=None if batches is None else batches.files,
        max_batch_bytes=0 if batches is None else profile.batches.max_file_bytes,
    )
    _add_batches(app, batches, profile, Asker(api, keys, quotas))
    metrics.admitted_tokens.set_function(lambda: api.chats.tokens.held)
    metrics.body_bytes.set_function(lambda: api.bodies.held)
    metrics.stalled.set_function(lambda: api.pulse.stalled)
    metrics.watch_engines(lambda: engine.states)
    metrics.held_bytes.set_function(lambda: loader.ledger.held)
    metrics.held_waiting.set_function(lambda: loader.ledger.waiting)
    metrics.caches.update(known=loader.known.figures, pdf_pages=api.documents.drawn.figures)
    if loader.files is not None:
        metrics.files.set_function(loader.files.count)
        metrics.files_bytes.set_function(loader.files.size)
        metrics.caches["files"] = loader.files.figures
    app.add_api_route("/v1/files", files.create, methods=["POST"], openapi_extra=UPLOAD_BODY)
    app.add_api_route("/v1/files", files.list)
    app.add_api_route("/v1/files/{file_id}", files.retrieve)
    app.add_api_route("/v1/files/{file_id}", files.delete, methods=["DELETE"])
    app.add_api_route("/v1/files/{file_id}/content", files.content)
    adapters = AdaptersAPI(
        engine,
        profile,
        with_key=bool(profile.api_keys()),
        read=api.bodies.read,
        admit=api.refuse_new,
        forget=metrics.forget_adapter,
        card=api.card,
    )
    app.add_api_route("/v1/load_lora_adapter", adapters.load, methods=["POST"])
    app.add_api_route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"])
    metrics.adapters.set_function(lambda: sum(one.parent is not None for one in engine.models))
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/health/live", api.live)
    app.add_api_route("/health/ready", api.ready)
    app.add_api_route("/version", api.version)
    app.add_api_route("/metrics", api.metrics_text)
    app.add_route("/docs", _docs)
    app.add_exception_handler(HTTPException, _raise_ours)
    app.add_exception_handler(RequestValidationError, _raise_ours)
    server = profile.server
    app.add_middleware(
        Door,
        keys=keys,
        quotas=quotas,
        open_paths=OPEN_PATHS,
        host_rule=host_rule(server.allowed_hosts, server.host),
    )
    app.add_middleware(Envelope, metrics=metrics, calls=api.calls, tracer=tracer)
    if server.cors_origins:
        app.add_middleware(CORS, origins=server.cors_origins)  # added last: outermost
    app.openapi = cache(lambda: document(app, BODIES))  # type: ignore[method-assign]  # FastAPI's own hook
    return app


async def _docs(request: Request) -> HTMLResponse:
    """Show the OpenAPI document."""
    return HTMLResponse(docs_page.page(request.app.openapi()), headers=docs_page.HEADERS)


def _add_batches(app: FastAPI, store: BatchStore | None, profile: Profile, asker: Asker) -> None:
    """Add the routes of batches, and what works on them as ``app.state.batches``."""
    api: API = app.state.api
    section, runner = profile.batches, None
    if store is not None:
        runner = Runner(
            store,
            asker,
            concurrency=section.concurrency,
            most_lines=section.max_lines,
            most_bytes=lambda: api.bodies.max_bytes,
            counted=lambda outcome: api.metrics.batch_requests.labels(outcome).inc(),
        )
        api.metrics.batches.set_function(lambda: len(store.unfinished()))
    app.state.batches = runner
    routes = BatchesAPI(runner, section.max_unfinished, api.bodies.read, api.refuse_new)
    app.add_api_route("/v1/batches", routes.create, methods=["POST"])
    app.add_api_route("/v1/batches", routes.list)
    app.add_api_route("/v1/batches/{batch_id}", routes.retrieve)
    app.add_api_route("/v1/batches/{batch_id}/cancel", routes.cancel, methods=["POST"])


def _raise_ours(request: Request, error: Exception) -> NoReturn:
    """Turn the framework's own errors into ours; ``Envelope`` answers them."""
    path, method = request.url.path[:200], request.method
    match error:
        case HTTPException(status_code=404):
            raise RouteNotFound(f"There is no {path!r} here; /docs lists what there is.")
        case HTTPException(status_code=405):
            taken = _taken(request)
            refused = MethodNotAllowed(f"{path!r} does not take {method}; it takes {taken}.")
            refused.headers = {"Allow": taken}
            raise refused
        case _:
            raise RequestError("The request could not be read.")


def _taken(request: Request) -> str:
    """Name the methods that a path takes, of all its routes; the framework knows the first's."""
    routes = request.app.router.routes
    fitting = [one for one in routes if one.matches(request.scope)[0] is Match.PARTIAL]
    return ", ".join(sorted({method for one in fitting for method in one.methods}))
