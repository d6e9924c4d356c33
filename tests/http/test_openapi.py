"""The OpenAPI document against the server: each operation, and each answer as documented."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from bench.fuzz.document import CONFORMANCE, operations, raw, undocumented, varied
from qwen2vl_serve import errors
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import load_profile
from tests.served import HELLO, Served, served

EXAMPLES = 12
CASES = [(one, GenerationMode.POSITIVE) for one in operations()] + [
    (one, GenerationMode.NEGATIVE) for one in operations() if varied(one)
]
REJECTION: list[Any] = CHECKS.get_by_names(["not_a_server_error", "negative_data_rejection"])


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    # What is drawn as a picture's address is nobody's.
    profile = load_profile("demo", ["media.allowed_domains=[nowhere.invalid]"])
    with served(profile, Keys()) as one:
        yield one


@pytest.mark.parametrize(
    ("operation", "mode"), CASES, ids=[f"{one.label} {mode.value}" for one, mode in CASES]
)
def test_what_the_document_allows_and_forbids(
    server: Served, operation: Any, mode: GenerationMode
) -> None:
    """Drawn requests are answered as documented; what the document forbids is refused."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Case[Any]) -> None:
        answer = case.call(base_url=server.root)
        case.validate_response(answer, checks=[*CONFORMANCE, *REJECTION])

    run()


def test_what_exists_is_answered_as_documented(server: Served) -> None:
    """Answers that no drawn request gets: of files, models, streams and pictures."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    form = {"files": {"file": ("a.png", picture.getvalue())}, "data": {"purpose": "vision"}}
    file = server.request("POST", "/v1/files", **form).json()["id"]
    part = {"type": "image_url", "image_url": {"file_id": file}}
    seen = {**HELLO, "messages": [{"role": "user", "content": [part]}]}
    for method, path, body, status in (
        ("GET", f"/v1/files/{file}", None, 200),
        ("GET", "/v1/files", None, 200),
        ("GET", "/v1/models/demo", None, 200),
        ("GET", "/v1/models/another", None, 404),
        ("POST", "/v1/chat/completions", HELLO, 200),
        ("POST", "/v1/chat/completions", {**HELLO, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {**HELLO, "model": "another"}, 404),
        ("POST", "/v1/chat/completions/explain", seen, 200),
        ("DELETE", f"/v1/files/{file}", None, 200),
        ("DELETE", f"/v1/files/{file}", None, 404),
    ):
        answer = server.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        asked = f"{method} {path} HTTP/1.1".encode()
        kind = answer.headers["content-type"]
        assert undocumented(asked, status, kind, answer.content) is None


def test_every_operation_and_every_error_is_documented(server: Served) -> None:
    """No operation is left as the framework describes it, and each code stands somewhere."""
    document = requests.get(f"{server.root}/openapi.json", timeout=60).json()
    for path, operations_ in document["paths"].items():
        for method, operation in operations_.items():
            where = f"{method} {path}"
            assert "422" not in operation["responses"], where
            assert operation["responses"]["500"]["content"], where
            for answer in operation["responses"]["200"]["content"].values():
                assert answer["schema"], where
    told = json.dumps(document["paths"])
    kinds = {one for one in vars(errors).values() if getattr(one, "code", None)}
    # Of what is no operation there is nothing to document; the shape is the same.
    elsewhere = {errors.MethodNotAllowed}
    assert [one.code for one in kinds - elsewhere if f"`{one.code}`: " not in told] == []


@pytest.mark.parametrize(
    ("request_line", "status", "kind", "body", "fine"),
    [
        (b"GET /v1/models HTTP/1.1", 200, "application/json", {"object": "list", "data": []}, True),
        (b"GET /v1/models?x=1 HTTP/1.1", 200, "application/json", {"object": "list"}, False),
        (b"GET /v1/models HTTP/1.1", 200, "text/html", {"object": "list", "data": []}, False),
        (b"GET /v1/models HTTP/1.1", 418, "application/json", {}, False),
        (b"GET /v1/models HTTP/1.1", 401, "application/json", {"detail": "no"}, False),
        (b"GET /v2/models HTTP/1.1", 200, "application/json", {}, False),
    ],
)
def test_an_undocumented_answer_is_seen(
    request_line: bytes, status: int, kind: str, body: Any, fine: bool
) -> None:
    """Another status, content type, body or path is told."""
    found = undocumented(request_line, status, kind, json.dumps(body).encode())
    assert (found is None) == fine


def test_a_drawn_request_is_sent_as_drawn() -> None:
    """Its bytes hold the method, path and body that were drawn, and a length that is theirs."""
    chat = next(one for one in operations() if one.label == "POST /v1/chat/completions")
    case = chat.Case(body=HELLO, media_type="application/json")
    head, _, body = raw(case).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
    assert json.loads(body) == HELLO
