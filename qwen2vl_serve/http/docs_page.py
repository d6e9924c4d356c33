"""``/docs``: the OpenAPI document as a plain page, without scripts or anything from elsewhere.

The usual pages run a script from a CDN in the server's own origin, and are blank behind a firewall.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'"
}
"""Of the page: a browser loads nothing for it and runs nothing in it."""

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code { background: #eee8; padding: 0 .2em; } td, th { text-align: left; vertical-align: top;
padding: .1em 1em .1em 0; } summary { cursor: pointer; padding: .3em 0; }
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document, as ``openapi.document`` makes it."""
    schemas = document["components"]["schemas"]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    operations = "".join(
        _operation(f"{method.upper()} {path}", operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    objects = "".join(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"{_schema(schema)}</details>"
        for name, schema in sorted(schemas.items())
    )
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>"
        f'<p>As data for programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"<h2>Routes</h2>{operations}<h2>Objects</h2>{objects}</html>"
    )


def _operation(name: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    told = escape(operation.get("description") or operation.get("summary", ""))
    parts = [f"<p>{told}</p>"]
    if parameters := operation.get("parameters"):
        rows = ((one["name"], one["schema"], one.get("required", False)) for one in parameters)
        parts.append("<h4>Parameters</h4>" + _table(rows))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        named = schemas.get(_target(schema), schema)
        parts.append(f"<h4>Body, <code>{escape(kind)}</code></h4>{_schema(named)}")
    for status, answer in operation["responses"].items():
        kinds = ", ".join(
            f"<code>{escape(kind)}</code> {_kind(content.get('schema', {}))}"
            for kind, content in answer.get("content", {}).items()
        )
        lines = "<br>".join(escape(line) for line in answer["description"].split("\n\n"))
        parts.append(f"<h4>{escape(status)}</h4><p>{kinds}</p><p>{lines}</p>")
    body = "".join(parts)
    return f"<details><summary><code>{escape(name)}</code> {told}</summary>{body}</details>"


def _schema(schema: Mapping[str, Any]) -> str:
    told = f"<p>{escape(schema.get('description', ''))}</p>"
    properties = schema.get("properties")
    if not properties:
        return f"{told}<p>{_kind(schema)}</p>"
    required = set(schema.get("required", ()))
    return told + _table((name, one, name in required) for name, one in properties.items())


def _table(rows: Iterator[tuple[str, Mapping[str, Any], bool]]) -> str:
    lines = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{_kind(schema)}<td>"
        f"{'required' if required else ''}<td>{escape(schema.get('description', ''))}"
        for name, schema, required in rows
    )
    return f"<table>{lines}</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """Say in HTML what a value may be."""
    if target := _target(schema):
        return f'<a href="#{escape(target)}">{escape(target)}</a>'
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(one) for one in choices))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in values)
    if "items" in schema:
        return f"list of {_kind(schema['items'])}"
    bounds = (
        f"{sign} {escape(str(schema[name]))}"
        for name, sign in (
            ("minimum", "≥"), ("exclusiveMinimum", "&gt;"), ("maximum", "≤"),
            ("minLength", "length ≥"), ("maxLength", "length ≤"),
        )
        if name in schema
    )  # fmt: skip
    return " ".join([escape(str(schema.get("type", "anything"))), *bounds])


def _target(schema: Mapping[str, Any]) -> str:
    return str(schema.get("$ref", "")).removeprefix("#/components/schemas/")
