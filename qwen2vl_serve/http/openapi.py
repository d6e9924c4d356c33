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
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qwen2vl_serve import errors
from qwen2vl_serve.errors import APIError

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
    "Batch": _object(
        id=_TEXT,
        object={"const": "batch"},
        endpoint=_TEXT,
        input_file_id=_TEXT,
        completion_window=_TEXT,
        status=_TEXT,
        created_at=_COUNT,
        request_counts=_object(total=_COUNT, completed=_COUNT, failed=_COUNT),
    ),
    "BatchList": _object(
        object={"const": "list"},
        data=_list(_named("Batch")),
        first_id=_or_null(_TEXT),
        last_id=_or_null(_TEXT),
        has_more=_FLAG,
    ),
    "DeletedModel": _object(id=_TEXT, object={"const": "model"}, deleted=_FLAG),
    "DeletedFile": _object(id=_TEXT, object={"const": "file"}, deleted=_FLAG),
    "Status": _object(status=_TEXT),
    "Version": _object(qwen2vl_serve=_TEXT, engine=_TEXT),
}

_JSON = "application/json"
_BYTES: Schema = {"description": "The file as it was uploaded, or was written"}

_PAGES: Mapping[str, Mapping[str, Schema]] = {
    "/v1/files": {
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "order": {"type": "string", "enum": ["asc", "desc"]},
        "after": _TEXT,
        "purpose": _TEXT,
    },
    "/v1/batches": {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": _TEXT},
}
_QUERY = {
    path: [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in named.items()
    ]
    for path, named in _PAGES.items()
}

_NO_FILE = (*_LOCKED, errors.RouteNotFound, errors.UnknownFile)
_NO_BATCH = (*_LOCKED, errors.RouteNotFound, errors.UnknownBatch)

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
    ("get", "/v1/files/{file_id}/content"): (
        {"application/octet-stream": _BYTES, "application/jsonl": _BYTES},
        _NO_FILE,
    ),
    ("post", "/v1/batches"): (
        {_JSON: _named("Batch")},
        (*_BODY, errors.RouteNotFound, errors.UnknownFile),
    ),
    ("get", "/v1/batches"): (
        {_JSON: _named("BatchList")},
        (*_LOCKED, errors.InvalidValue, errors.RouteNotFound),
    ),
    ("get", "/v1/batches/{batch_id}"): ({_JSON: _named("Batch")}, _NO_BATCH),
    ("post", "/v1/batches/{batch_id}/cancel"): ({_JSON: _named("Batch")}, _NO_BATCH),
    ("post", "/v1/load_lora_adapter"): ({_JSON: _named("Model")}, _BODY),
    ("post", "/v1/unload_lora_adapter"): ({_JSON: _named("DeletedModel")}, _BODY),
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


def document(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the OpenAPI document of ``app``; what is not known here stays as FastAPI says it.

    ``bodies`` are the models of what is posted to a path. They are parsed by hand (one pass, our
    errors), so that they are described by hand too.
    """
    made: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    _, definitions = models_json_schema(
        [(model, "validation") for model in set(bodies.values())],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(definitions["$defs"])
    schemas.update(_SCHEMAS)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)  # such errors are ours, with 400
            if method == "post" and path in bodies:
                schema = _named(bodies[path].__name__)
                operation["requestBody"] = {
                    "required": True,
                    "content": {_JSON: {"schema": schema}},
                }
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
    for path in ("/v1/files", "/v1/batches"):
        made["paths"][path]["get"]["parameters"] = _QUERY[path]
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
