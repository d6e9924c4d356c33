"""Requests as the OpenAPI document allows and forbids them, and answers beside the document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.core.transport import Response

from bench.fuzz.drawn import drawn
from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.profile import load_profile
from tests.fake_engine import FakeEngine

if TYPE_CHECKING:
    from schemathesis.schemas import APIOperation, BaseSchema

_ROOT = "http://127.0.0.1"
_BOUNDARY = b"----------drawn-once"
_PLACE = re.compile(r"\{(\w+)\}")
_MADE_BOUNDARY = re.compile(rb"boundary=([0-9a-f]{32})")

load_all_checks()
CONFORMANCE: list[Any] = CHECKS.get_by_names(
    ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)
"""That status, content type and body of an answer are documented."""


@cache
def schema() -> BaseSchema:
    """Return the document of a server with the demo profile."""
    profile = load_profile("demo")
    app = build_app(FakeEngine(), media_loader(profile), profile, Keys())
    return schemathesis.openapi.from_dict(app.openapi())


@cache
def operations() -> Sequence[APIOperation[Any, Any, Any, Any]]:
    """Return what can be asked, as the document has it."""
    return [one.ok() for one in schema().get_all_operations() if isinstance(one, Ok)]


def varied(operation: APIOperation[Any, Any, Any, Any]) -> bool:
    """Whether there is anything in a request that can be wrong."""
    return bool(operation.body or operation.query)


def requested() -> st.SearchStrategy[Case[Any]]:
    """Draw a request of any operation, as documented or in one place not."""
    drawn = [one.as_strategy() for one in operations()]
    drawn += [
        one.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        for one in operations()
        if varied(one)
    ]
    return st.one_of(drawn)


def raw(case: Case[Any]) -> bytes:
    """Return a case as the bytes of an HTTP request that ends its connection."""
    options = case.as_transport_kwargs(base_url=_ROOT)
    options["headers"] = {
        name: value
        for name, value in options["headers"].items()
        if name.lower() in ("content-type", "accept")
    }
    sent = requests.Request(**options).prepare()
    body = sent.body or b""
    data = body.encode() if isinstance(body, str) else bytes(body)
    kind = (sent.headers.get("content-type") or "").encode("latin-1")
    if made := _MADE_BOUNDARY.search(kind):
        data, kind = (text.replace(made[1], _BOUNDARY) for text in (data, kind))
    head = f"{sent.method} {sent.path_url} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Length: {len(data)}\r\n"
    typed = b"Content-Type: " + kind + b"\r\n" if kind else b""
    return head.encode() + typed + b"\r\n" + data


def drawn_requests(count: int, number: int) -> Sequence[bytes]:
    """Return about ``count`` requests; equal numbers give equal requests."""
    return drawn(requested().map(raw), count, number)


def undocumented(request: bytes, status: int, kind: str, body: bytes) -> str | None:
    """Return what of an answer the document does not say; None where it says all."""
    method, target, _ = request.split(b" ", 2)
    operation = _operation(method.decode(), target.decode().partition("?")[0])
    if operation is None:
        return f"{target[:80]!r} is no operation of the document"
    names = dict.fromkeys(_PLACE.findall(operation.path), "x")
    url = _ROOT + operation.path.format(**names)
    sent = requests.Request(operation.method.upper(), url).prepare()
    answer = Response(
        status_code=status,
        headers={"content-type": [kind]},
        content=body,
        request=sent,
        elapsed=0.0,
        verify=False,
    )
    try:
        operation.Case(path_parameters=names).validate_response(answer, checks=CONFORMANCE)
    except FailureGroup as failures:
        return f"{operation.label}: " + "; ".join(
            f"{one.title} {one.message}"[:300] for one in failures.exceptions
        )
    return None


def _operation(method: str, path: str) -> APIOperation[Any, Any, Any, Any] | None:
    for one in operations():
        template = ".*".join(map(re.escape, _PLACE.split(one.path)[::2]))
        if one.method.upper() == method and re.fullmatch(template, path):
            return one
    return None
