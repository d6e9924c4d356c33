"""Around every request: id, error shape, counts and one log line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import get_args

from fastapi.responses import JSONResponse
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl_serve.engine import EngineState
from qwen2vl_serve.errors import APIError, InternalError
from qwen2vl_serve.http import request_log
from qwen2vl_serve.http.call import Call
from qwen2vl_serve.http.door import add_headers
from qwen2vl_serve.http.tracing import Tracer
from qwen2vl_serve.media.lru import CacheFigures

logger = logging.getLogger("qwen2vl_serve.requests")

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What needs no key: a probe holds none."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
        self.admitted = Gauge(
            "qwen2vl_admission_in_flight",
            "Answers that are worked on, by kind of request",
            ["kind"],
            registry=self.registry,
        )
        self.queued = Gauge(
            "qwen2vl_admission_queued",
            "Requests that wait for their turn, by kind",
            ["kind"],
            registry=self.registry,
        )
        self.admitted_tokens = Gauge(
            "qwen2vl_admission_visual_tokens",
            "Visual tokens that are worked on",
            registry=self.registry,
        )
        self.body_bytes = Gauge(
            "qwen2vl_body_held_bytes",
            "Bytes of the bodies of requests being answered",
            registry=self.registry,
        )
        self.waited = Histogram(
            "qwen2vl_admission_waited_seconds",
            "Time that requests waited for their turn, of those that had to",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )
        self.refused = Counter(
            "qwen2vl_admission_refused",
            "Requests sent away because the server was full: kind, reason, and the profile's limit",
            ["kind", "reason", "limit"],
            registry=self.registry,
        )
        self.batches = Gauge(
            "qwen2vl_batches_unfinished",
            "Batches that are not yet finished",
            registry=self.registry,
        )
        self.batch_requests = Counter(
            "qwen2vl_batch_requests",
            "Requests of batches, by what became of them",
            ["outcome"],
            registry=self.registry,
        )
        self.stalled = Gauge(
            "qwen2vl_engine_stalled_seconds",
            "How long the engine has had work and not moved",
            registry=self.registry,
        )
        self.engines = Gauge(
            "qwen2vl_engines",
            "Engines behind this address, by what they do",
            ["state"],
            registry=self.registry,
        )
        self.media = Counter(
            "qwen2vl_media",
            "Pictures and videos of requests, by kind; decoded, or known from before",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.media_bytes = Counter(
            "qwen2vl_media_bytes",
            "Bytes of the pictures and videos of requests, by kind",
            ["kind"],
            registry=self.registry,
        )
        self.adapters = Gauge(
            "qwen2vl_adapters", "LoRA adapters that are served", registry=self.registry
        )
        self.adapter_requests = Counter(
            "qwen2vl_adapter_requests",
            "Chat requests to a LoRA adapter, by its name; gone with the adapter",
            ["adapter"],
            registry=self.registry,
        )
        self.files = Gauge("qwen2vl_files", "Uploaded files that are kept", registry=self.registry)
        self.files_bytes = Gauge(
            "qwen2vl_files_bytes", "Bytes of the uploaded files", registry=self.registry
        )
        self.held_bytes = Gauge(
            "qwen2vl_media_held_bytes",
            "Bytes of pictures and videos that requests hold",
            registry=self.registry,
        )
        self.held_waiting = Gauge(
            "qwen2vl_media_held_waiting",
            "Requests that wait until others hold fewer bytes",
            registry=self.registry,
        )
        self.start_weights_bytes = Gauge(
            "qwen2vl_start_weights_bytes",
            "Weights on the fullest card, foreseen and actual",
            ["kind"],
            registry=self.registry,
        )
        self.start_kv_tokens = Gauge(
            "qwen2vl_start_kv_tokens",
            "Tokens that the KV cache holds, foreseen and actual",
            ["kind"],
            registry=self.registry,
        )
        self.start_seconds = Gauge(
            "qwen2vl_start_seconds",
            "Time of the start, foreseen and actual",
            ["kind"],
            registry=self.registry,
        )
        self.caches: dict[str, Callable[[], CacheFigures]] = {}
        self.registry.register(_Caches(self.caches))
        self.seconds = Histogram(
            "qwen2vl_request_seconds",
            "Time from the request's head to the end of its answer",
            ["route"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )

    def watch_engines(self, states: Callable[[], Sequence[EngineState]]) -> None:
        """Count engines by their state, each time that they are asked for."""
        for state in get_args(EngineState):
            self.engines.labels(state).set_function(partial(_count, states, state))

    def forget_adapter(self, name: str) -> None:
        """Stop telling of an adapter that is gone; names would pile up."""
        with contextlib.suppress(KeyError):
            self.adapter_requests.remove(name)

    def refused_unread(self, error: APIError) -> str:
        """Count and log what was refused before it was a request; return the id that it gets."""
        call = Call(uuid.uuid4().hex)
        call.code = error.code
        self.requests.labels("other", error.status, error.code or "").inc()
        told = request_log.fields(call, "other", "other", error.status, 0.0)
        logger.info("request", extra={"request": told})
        return call.id

    def text(self) -> bytes:
        """Return vLLM's figures and ours in Prometheus's text format."""
        return generate_latest(REGISTRY) + generate_latest(self.registry)


def _count(states: Callable[[], Sequence[EngineState]], state: EngineState) -> int:
    return list(states()).count(state)


class _Caches(Collector):
    """Reads the figures of every cache when Prometheus asks for them."""

    def __init__(self, caches: Mapping[str, Callable[[], CacheFigures]]) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        hits = CounterMetricFamily(
            "qwen2vl_cache_hits", "Look-ups that found something", labels=["cache"]
        )
        misses = CounterMetricFamily(
            "qwen2vl_cache_misses", "Look-ups that found nothing", labels=["cache"]
        )
        evictions = CounterMetricFamily(
            "qwen2vl_cache_evictions", "Entries that made room for others", labels=["cache"]
        )
        entries = GaugeMetricFamily("qwen2vl_cache_entries", "What is kept now", labels=["cache"])
        held = GaugeMetricFamily("qwen2vl_cache_bytes", "Its bytes", labels=["cache"])
        for name, figures in self._caches.items():
            now = figures()
            hits.add_metric([name], now.hits)
            misses.add_metric([name], now.misses)
            evictions.add_metric([name], now.evictions)
            entries.add_metric([name], now.entries)
            held.add_metric([name], now.bytes)
        yield from (hits, misses, evictions, entries, held)


class Envelope:
    """ASGI middleware around everything: request id, error shape, counts and one log line.

    An ``APIError`` raised further in becomes its own answer, any other exception a 500 that
    tells nothing but the id under which the log holds the cause. ``calls`` are those being
    answered; whoever cuts one has its error answered here.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, calls: set[Call], tracer: Tracer | None = None
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.calls = calls
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens further in."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own_id = uuid.uuid4().hex
        given = Headers(scope=scope).get("x-request-id", "")
        call = Call(given if _REQUEST_ID.fullmatch(given) else own_id)
        state = scope.setdefault("state", {})
        state["id"], state["call"] = own_id, call
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = call.id
                if call.stages and status == 200:
                    MutableHeaders(scope=message)["server-timing"] = call.timing()
                add_headers(message, state)
            await send(message)

        counted = scope["path"].startswith("/v1/")
        if counted:
            self.calls.add(call)
        self.metrics.in_flight.inc(counted)
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except (Exception, asyncio.CancelledError) as error:
            refusal = failure(error, call)
            call.code = refusal.code
            if status == 0:
                await error_response(refusal)(scope, receive, send_with_id)
        finally:
            self.calls.discard(call)
            call.end()
            self.metrics.in_flight.dec(counted)
            seconds = time.perf_counter() - call.started
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status, call.code or "").inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if route not in OPEN_PATHS:
                told = request_log.fields(call, scope["method"], route, status, seconds)
                told["key"] = state.get("key")
                logger.info("request", extra={"request": told})
                if self.tracer is not None:
                    self.tracer.request(call, scope, told)


def failure(error: BaseException, call: Call) -> APIError:
    """Return what the client is told of ``error``; a cancellation by another is raised."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, asyncio.CancelledError):
        cut = call.taken_back()
        if cut is None:
            raise error
        return cut
    logger.error("request %s failed", call.id, exc_info=error)
    return InternalError(
        f"The server failed on this request; its log has the cause under {call.id}."
    )


def error_response(error: APIError) -> JSONResponse:
    """Return an error in OpenAI's shape."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
