"""Class J: who has no key gets nothing, however the request is spelled."""

from __future__ import annotations

import json

from tests.hostile.case import GOOD, Case, Outcome, Refusal, asked
from tests.hostile.target import Target

TITLE = "keys"

CHAT = json.dumps(asked()).encode()
TOLD = (("www-authenticate", "Bearer"),)

CLOSED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/demo"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/embeddings"),
    ("POST", "/invocations"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/pooling"),
    ("POST", "/score"), ("POST", "/generative_scoring"), ("POST", "/inference/v1/generate"),
    ("POST", "/scale_elastic_ep"), ("GET", "//v1/models"), ("POST", "//v1/chat/completions"),
    ("GET", "/V1/MODELS"), ("GET", "/v1%2fmodels"), ("GET", "/./v1/models"),
    ("GET", "/health/../v1/models"), ("GET", "/health/live/../../v1/models"),
    ("GET", "/health/live%2f..%2f..%2fv1/models"), ("GET", "/v1/models;x=/health/live"),
    ("GET", "/v1/models?path=/health/live"), ("HEAD", "/v1/models"), ("OPTIONS", "/v1/models"),
]  # fmt: skip

OURS = [
    ("POST", "/v1/chat/completions/explain"), ("GET", "/v1/files"), ("POST", "/v1/files"),
    ("DELETE", "/v1/files/file-0"), ("GET", "/metrics"), ("GET", "/version"), ("GET", "/docs"),
    ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/health/live/"),
]  # fmt: skip
"""Open by design elsewhere, or not there at all."""

HEADERS = {
    "none": (),
    "an empty one": ("Authorization: ",),
    "a scheme alone": ("Authorization: Bearer",),
    "a scheme and a space": ("Authorization: Bearer ",),
    "a wrong one": ("Authorization: Bearer wrong",),
    "a non-ASCII one": ("Authorization: Bearer \xe9\xff",),
    "10,000 letters": ("Authorization: Bearer " + "a" * 10_000,),
    "Basic": ("Authorization: Basic YWxpY2U6eA==",),
    "two schemes": ("Authorization: Bearer Bearer",),
    "in another header": ("X-Api-Key: {key}",),
    "without a scheme": ("Authorization: {key}",),
    "under another scheme": ("Authorization: Token {key}",),
    "its beginning": ("Authorization: Bearer {start}",),
    "more than it": ("Authorization: Bearer {key}x",),
    "in capitals": ("Authorization: Bearer {capitals}",),
    "a quoted one": ('Authorization: Bearer "{key}"',),
    "a wrong one before it": ("Authorization: Bearer wrong", "Authorization: Bearer {key}"),
    "in a cookie": ("Cookie: api_key={key}",),
}

HOSTS = ["a/?x=", "a/health/live?", "evil.example", "127.0.0.1@evil.example", "", "a b"]


def cases() -> list[Case]:
    """Return the class; a server without keys has nothing to show here."""
    return [
        *(without(method, path) for method, path in CLOSED),
        *(without(method, path, ours=True) for method, path in OURS),
        *(given(name, lines) for name, lines in HEADERS.items()),
        *(named(host) for host in HOSTS),
        Case("J", "the key in the query", in_query, needs="key"),
        Case("J", "the key itself", lambda target: opened(target, "Bearer"), needs="key"),
        Case("J", "the scheme in small letters", lambda t: opened(t, "bearer"), needs="key"),
        Case("J", "refused before the body", before_the_body, needs="key"),
    ]


def _request(target: Target, method: str, path: str, *lines: str) -> bytes:
    body = CHAT if method == "POST" else b""
    more = ("Content-Type: application/json", f"Content-Length: {len(body)}") if body else ()
    return target.head(method, path, *lines, *more, "Connection: close", key="") + b"\r\n" + body


def _shut(target: Target, request: bytes, method: str = "GET") -> Outcome:
    answer = target.send(request)
    if answer.status == 0 or 200 <= answer.status < 400:
        return Outcome(f"{answer.told} without a key")
    if target.key.encode() in answer.body:
        return Outcome("the answer tells the key")
    if method == "HEAD":
        return Outcome(unlike=None if answer.status == 401 else answer.told)
    return Refusal(401, ("invalid_api_key",), headers=TOLD).judge(request, answer)


def without(method: str, path: str, ours: bool = False) -> Case:
    """No key."""

    def run(target: Target) -> Outcome:
        return _shut(target, _request(target, method, path), method)

    return Case("J", f"{method} {path}", run, ours, needs="key")


def given(name: str, lines: tuple[str, ...]) -> Case:
    """Something else than the key."""

    def run(target: Target) -> Outcome:
        key = target.key
        words = {"key": key, "start": key[:-1], "capitals": key.upper()}
        told = [line.format(**words) if "{" in line else line for line in lines]
        return _shut(target, _request(target, "GET", "/v1/models", *told))

    return Case("J", f"a key: {name}", run, needs="key")


def named(host: str) -> Case:
    """No key, and a Host that is to confuse whoever puts an address together."""

    def run(target: Target) -> Outcome:
        request = _request(target, "GET", "/v1/models")
        line = f"Host: {target.host}:{target.port}".encode()
        return _shut(target, request.replace(line, b"Host: " + host.encode()))

    return Case("J", f"Host {host!r}", run, needs="key")


def in_query(target: Target) -> Outcome:
    """It would stand in every log."""
    return _shut(target, _request(target, "GET", f"/v1/models?api_key={target.key}"))


def opened(target: Target, scheme: str) -> Outcome:
    """What it is for."""
    line = f"Authorization: {scheme} {target.key}"
    answer = target.send(_request(target, "GET", "/v1/models", line))
    return GOOD if answer.status == 200 else Outcome(f"{answer.told} with the key")


def before_the_body(target: Target) -> Outcome:
    """A megabyte is announced and never sent."""
    lines = ("Content-Type: application/json", "Content-Length: 1000000")
    return _shut(target, target.head("POST", "/v1/chat/completions", *lines, key="") + b"\r\n")
