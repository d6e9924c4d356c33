"""Traces as a collector receives them: a span a request, its stages below it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.errors import EngineUnavailable, PreflightError
from qwen2vl_serve.http.tracing import Tracer, tracer
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.profile import load_profile
from tests.fake_engine import FakeEngine
from tests.test_app import HELLO, error_of, served


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            data = gzip.decompress(data)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{one.server_port}")
        yield one
        one.shutdown()


def spans_of(collector: Collector, body: dict[str, Any], engine: FakeEngine, **headers: str) -> Any:
    traces = tracer()
    assert isinstance(traces, Tracer)
    profile = load_profile("demo")
    app = build_app(engine, media_loader(profile), profile, Keys(()), traces)
    with served(app, engine) as api:
        answer = api.chat(body, headers=headers)
        assert answer.content
    traces.close()
    (root,) = [span for span in collector.spans if span.name == "POST /v1/chat/completions"]
    below = [span for span in collector.spans if span.parent_span_id == root.span_id]
    return answer, root, below


def attributes(span: Any) -> dict[str, Any]:
    return {
        one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes
    }


def test_a_request_is_a_span_with_its_stages(collector: Collector) -> None:
    """The stages follow one another without a gap and fill the request; figures are attributes."""
    body = {**HELLO, "stream": True}
    _, root, below = spans_of(collector, body, FakeEngine(pause=0.01))
    below.sort(key=lambda span: span.start_time_unix_nano)
    names = ["read", "queue", "fetch", "decode", "first token", "answer"]
    assert [span.name for span in below] == names
    ends = [span.end_time_unix_nano for span in below]
    assert [root.start_time_unix_nano, *ends[:-1]] == [s.start_time_unix_nano for s in below]
    assert ends[-1] == root.end_time_unix_nano
    told = attributes(root)
    assert told["gen_ai.usage.output_tokens"] == 3
    assert told["gen_ai.request.model"] == "demo"
    assert told["http.response.status_code"] == 200
    assert root.status.code == 0


def test_the_callers_trace_is_continued(collector: Collector) -> None:
    """A ``traceparent`` header names the trace and the parent."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    _, root, _ = spans_of(collector, HELLO, FakeEngine(), **headers)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (trace, parent)


def test_a_failure_is_marked(collector: Collector) -> None:
    """Status and code of the error stand in the span."""
    engine = FakeEngine(failure=EngineUnavailable("gone"))
    answer, root, _ = spans_of(collector, HELLO, engine)
    assert error_of(answer)["code"] == "engine_unavailable"
    assert (root.status.code, root.status.message) == (2, "engine_unavailable")


def test_without_a_collector_nothing_is_traced() -> None:
    """No variable, no tracer, and none of the SDK is imported."""
    assert tracer({}) is None


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and not installed: one line that says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(PreflightError, match="pip install opentelemetry-sdk "):
        tracer({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
