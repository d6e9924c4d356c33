"""OpenTelemetry traces where the environment names a collector: a span a request, its stages below.

Spans are made when an answer has ended, of times that are noted anyway; while it is made nothing
is traced. The SDK's own thread sends them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from qwen2vl_serve import __version__
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.http.call import Call

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracer(environ: Mapping[str, str] = os.environ) -> Tracer | None:
    """Return a tracer if one of ``ENDPOINTS`` is set, else None.

    Raises:
        PreflightError: it is, and the extra ``otel`` is not installed.
    """
    name = next((one for one in ENDPOINTS if environ.get(one)), None)
    if name is None:
        return None
    try:
        return Tracer()
    except ImportError:
        raise PreflightError(
            f"{name} is set, but OpenTelemetry is not installed: "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http, or unset it."
        ) from None


class Tracer:
    """Sends spans over OTLP/HTTP as the SDK's own environment variables say."""

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415  # an extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        named = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "qwen2vl-serve")}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("qwen2vl_serve", __version__)

    def request(self, call: Call, scope: Scope, told: Mapping[str, Any]) -> None:
        """Make the spans of a request that has ended; ``told`` is what the log says of it.

        A ``traceparent`` header makes them part of the caller's trace.
        """
        from opentelemetry.propagate import extract  # noqa: PLC0415
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415
        from opentelemetry.trace.status import Status, StatusCode  # noqa: PLC0415

        end = time.perf_counter()
        epoch = time.time_ns() - int(end * 1e9)  # of the clock that stages are measured with

        def at(clock: float) -> int:
            return epoch + int(clock * 1e9)

        span = self._tracer.start_span(
            f"{told['method']} {told['route']}",
            context=extract(dict(Headers(scope=scope))),
            attributes={
                _ATTRIBUTES.get(name, f"qwen2vl.{name}"): value
                for name, value in told.items()
                if value is not None and name != "seconds"
            },
            start_time=at(call.started),
        )
        below, begun = set_span_in_context(span), call.started
        # What came after the last stage is the answer: its tokens, or its bytes.
        for name, until in (*call.stages, ("answer", end)):
            stage = self._tracer.start_span(name, context=below, start_time=at(begun))
            stage.end(at(until))
            begun = until
        if told["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR, told["code"]))
        span.end(at(end))

    def close(self) -> None:
        """Send what is left, for as long as the SDK allows itself."""
        self._provider.shutdown()


# Names that OpenTelemetry's conventions have for what our log tells.
_ATTRIBUTES = {
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "code": "error.type",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
