"""The OpenAPI document: FastAPI's own, with bodies, answers and errors as they really are.

Bodies are parsed and errors are answered outside of FastAPI, so that it knows of neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from qwen2vl_serve import errors
from qwen2vl_serve.errors import APIError
from qwen2vl_serve.protocol import ChatRequest

Schema = dict[str, Any]

_ALWAYS = (
    errors.MalformedRequest,
    errors.RequestTimeout,
    errors.RequestHeadTooLarge,
    errors.InternalError,
)
"""What any request may be answered by."""

_LOCKED = (
    *_ALWAYS,
    errors.InvalidAPIKey,
    errors.InvalidHost,
    errors.RateLimited,
    errors.QuotaUnavailable,
)
"""What any request may be answered by that needs a key."""


def _every(kind: type[APIError]) -> Iterator[type[APIError]]:
    if kind.code is not None:
        yield kind
    for narrower in kind.__subclasses__():
        yield from _every(narrower)


_NO_ROUTE = (errors.RouteNotFound, errors.MethodNotAllowed)
_BODY = tuple(one for one in _every(APIError) if one not in (*_NO_ROUTE, errors.UnknownFile))


def _object(**properties: Schema) -> Schema:
    """Return the schema of an object that has these and may have more."""
    return {"type": "object", "required": [*properties], "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_EVENTS: Schema = {
    "description": "With `stream`: server-sent events, each a `chat.completion.chunk` as JSON, the "
    "last `[DONE]`; or the last is an error, and no `[DONE]` follows."
}

_SCHEMAS: Mapping[str, Schema] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))
    ),
    "ChatCompletion": _object(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_list(_object(index=_COUNT, message=_object(role=_TEXT))),
    ),
    "Explanation": _object(
        object={"const": "chat.completion.explanation"},
        model=_TEXT,
        prompt_tokens=_COUNT,
        text_tokens=_COUNT,
        visual_tokens=_COUNT,
        max_model_len=_COUNT,
        context_left=_COUNT,
        max_item_tokens=_COUNT,
        too_large=_list(_TEXT),
        fits=_FLAG,
        largest_max_pixels=_or_null(_COUNT),
        media=_list({"type": "object"}),
    ),
    "Model": _object(
        id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT
    ),
    "ModelList": _object(object={"const": "list"}, data=_list(_named("Model"))),
    "File": _object(
        id=_TEXT,
        object={"const": "file"},
        bytes=_COUNT,
        created_at=_COUNT,
        filename=_TEXT,
        purpose=_TEXT,
        status=_TEXT,
    ),
    "FileList": _object(
        object={"const": "list"},
        data=_list(_named("File")),
        first_id=_or_null(_TEXT),
        last_id=_or_null(_TEXT),
        has_more=_FLAG,
    ),
    "DeletedFile": _object(id=_TEXT, object={"const": "file"}, deleted=_FLAG),
    "Status": _object(status=_TEXT),
    "Version": _object(qwen2vl_serve=_TEXT, engine=_TEXT),
}

_JSON = "application/json"
_CHAT_BODY = {"required": True, "content": {_JSON: {"schema": _named("ChatRequest")}}}

_QUERY = [
    {"name": name, "in": "query", "required": False, "schema": schema}
    for name, schema in {
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "order": {"type": "string", "enum": ["asc", "desc"]},
        "after": _TEXT,
        "purpose": _TEXT,
    }.items()
]

_NO_FILE = (*_LOCKED, errors.RouteNotFound, errors.UnknownFile)

_OPERATIONS: Mapping[tuple[str, str], tuple[Mapping[str, Schema], Iterable[type[APIError]]]] = {
    ("post", "/v1/chat/completions"): (
        {_JSON: _named("ChatCompletion"), "text/event-stream": _EVENTS},
        (*_BODY, errors.UnknownFile),
    ),
    ("post", "/v1/chat/completions/explain"): (
        {_JSON: _named("Explanation")},
        (*_BODY, errors.UnknownFile),
    ),
    ("post", "/v1/files"): ({_JSON: _named("File")}, (*_BODY, errors.RouteNotFound)),
    ("get", "/v1/files"): (
        {_JSON: _named("FileList")},
        (*_LOCKED, errors.InvalidValue, errors.RouteNotFound),
    ),
    ("get", "/v1/files/{file_id}"): ({_JSON: _named("File")}, _NO_FILE),
    ("delete", "/v1/files/{file_id}"): ({_JSON: _named("DeletedFile")}, _NO_FILE),
    ("get", "/v1/models"): ({_JSON: _named("ModelList")}, _LOCKED),
    ("get", "/v1/models/{name}"): ({_JSON: _named("Model")}, (*_LOCKED, errors.ModelNotFound)),
    ("get", "/health/live"): ({_JSON: _named("Status")}, _ALWAYS),
    ("get", "/health/ready"): (
        {_JSON: _named("Status")},
        (*_ALWAYS, errors.EngineUnavailable, errors.ShuttingDown),
    ),
    ("get", "/version"): ({_JSON: _named("Version")}, _LOCKED),
    ("get", "/metrics"): ({CONTENT_TYPE_LATEST: _TEXT}, _LOCKED),
}
"""Of each operation what it answers, by content type, and which errors."""


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of ``app``; what is not known here stays as FastAPI says it."""
    made: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    # The body is parsed by hand (one pass, our errors), so it is described by hand too.
    _, definitions = models_json_schema(
        [(ChatRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    schemas.update(definitions["$defs"])
    schemas.update(_SCHEMAS)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # such errors are ours, with 400
            if path.startswith("/v1/chat/"):
                operation["requestBody"] = _CHAT_BODY
            if path not in ("/health/live", "/health/ready"):
                # A server without keys is open.
                operation["security"] = [{"key": []}, {}]
            if (method, path) in _OPERATIONS:
                answers, refusals = _OPERATIONS[method, path]
                operation["responses"] = {
                    "200": {
                        "description": "As asked for",
                        "content": {kind: {"schema": schema} for kind, schema in answers.items()},
                    },
                    **_refusals(refusals),
                }
    made["paths"]["/v1/files"]["get"]["parameters"] = _QUERY
    return made


def _refusals(kinds: Iterable[type[APIError]]) -> dict[str, Any]:
    """Return the responses of errors: one for each status, which lists its codes."""

    def status(kind: type[APIError]) -> int:
        return kind.status

    responses = {}
    for number, group in groupby(sorted(set(kinds), key=status), key=status):
        codes = sorted(f"`{kind.code}`: {_first_line(kind)}" for kind in group)
        responses[str(number)] = {
            "description": "\n\n".join(codes),
            "content": {_JSON: {"schema": _named("Error")}},
        }
    return responses


def _first_line(kind: type[APIError]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]
