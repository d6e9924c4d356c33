"""The door, over real sockets: keys, limits, hosts, origins, headers, owners of files."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from PIL import Image

from qwen2vl_serve import app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile
from qwen2vl_serve.auth.quota import Quotas
from qwen2vl_serve.http.door import host_rule
from qwen2vl_serve.profile import default_keys_path, load_profile
from tests.fake_engine import FakeEngine
from tests.served import HELLO, CountingEngine, Served, eventually, served

Serve = Callable[..., Served]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeysFile:
    """The default one, which may be absent."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return KeysFile(default_keys_path())


@pytest.fixture
def serve(tmp_path: Path, file: KeysFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start servers with the named keys of ``file``; all share one storage of quotas."""
    monkeypatch.setattr("qwen2vl_serve.auth.keys.LOOK_SECONDS", 0.0)
    # No test straddles the end of a minute, however long it takes.
    monkeypatch.setattr(app, "Quotas", partial(Quotas, clock=lambda: 6_000_000.0))
    with ExitStack() as stack:

        def start(*overrides: str, plain: tuple[str, ...] = (), engine: Any = None) -> Served:
            storage = f"server.quota_storage='sqlite:///{tmp_path / 'quotas.sqlite'}'"
            profile = load_profile("demo", [storage, *overrides])
            return stack.enter_context(served(profile, Keys(plain, file), engine))

        yield start


def code(answer: requests.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def left(answer: requests.Response, unit: str) -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{unit}"])


CLOSED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/demo"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/explain"), ("GET", "/v1/files"), ("POST", "/v1/files"),
    ("GET", "/v1/files/file-0"), ("DELETE", "/v1/files/file-0"), ("GET", "/metrics"),
    ("GET", "/version"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"),
    ("GET", "/docs/oauth2-redirect"), ("GET", "/nothing"), ("GET", "//v1/models"),
    ("GET", "/health/live/"), ("GET", "/health/live/../../v1/models"), ("GET", "/HEALTH/LIVE"),
    ("GET", "/health/live%2f"), ("OPTIONS", "/v1/models"), ("HEAD", "/v1/models"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_route_is_closed_but_the_probes(
    serve: Serve, file: KeysFile, method: str, path: str
) -> None:
    """With named keys, whatever the path is spelled like, no key means 401."""
    file.add("alice")
    api = serve()
    answer = api.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in answer
    if method != "HEAD":
        assert b'"invalid_api_key"' in answer
    for probe in ("/health/live", "/health/ready"):
        assert api.request("GET", probe).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic YWxpY2U6eA==", "Bearer wrong", "Bearer \xe9", "Bearer  a b"],
)
def test_only_the_key_opens(serve: Serve, file: KeysFile, header: str) -> None:
    """None, an empty, a wrong, a non-ASCII one or another scheme is 401; the key itself is not."""
    secret = file.add("alice")
    api = serve()
    head = f"GET /v1/models HTTP/1.1\r\nHost: a/?x=\r\nAuthorization: {header}\r\n"
    answer = api.raw((head + "Connection: close\r\n\r\n").encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert secret.encode() not in answer
    assert api.request("GET", "/v1/models", secret).status_code == 200


def test_a_key_is_revoked_and_added_while_serving(serve: Serve, file: KeysFile) -> None:
    """The next request already sees the change."""
    alice = file.add("alice")
    api = serve(plain=("plain",))
    assert api.chat(alice).status_code == 200
    file.revoke("alice")
    assert code(api.chat(alice)) == (401, "invalid_api_key")
    assert api.chat(file.add("bob")).status_code == 200
    assert api.chat("plain").status_code == 200


def test_requests_of_a_minute_end_in_429(serve: Serve, file: KeysFile) -> None:
    """Every answer tells what is left, the refused one when to come back; others go on."""
    secret = file.add("alice", KeyLimits(requests_per_minute=3))
    other = file.add("bob", KeyLimits(requests_per_minute=3))
    api = serve()
    assert [left(api.chat(secret), "requests") for _ in range(3)] == [2, 1, 0]
    answer = api.chat(secret)
    assert code(answer) == (429, "rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    assert left(answer, "requests") == 0
    assert left(api.chat(other), "requests") == 2
    assert len(api.engine.requests) == 4


def test_refusals_come_before_the_body(serve: Serve, file: KeysFile) -> None:
    """A key that is used up is told so while its body has not been sent."""
    secret = file.add("alice", KeyLimits(requests_per_minute=1))
    api = serve()
    api.chat(secret)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
        f"Authorization: Bearer {secret}\r\nContent-Type: application/json\r\n\r\n"
    )
    assert api.raw(head.encode()).startswith(b"HTTP/1.1 429 ")


def test_errors_tell_what_is_left_too(serve: Serve, file: KeysFile) -> None:
    """A 400, a 404 and a 500 of a limited key carry the headers."""
    secret = file.add("alice", KeyLimits(requests_per_minute=10, tokens_per_minute=1000))
    api = serve(engine=FakeEngine(failure=RuntimeError("x")))
    answers = [
        api.chat(secret, temperature=9),
        api.request("GET", "/nothing", secret),
        api.chat(secret),
    ]
    assert [answer.status_code for answer in answers] == [400, 404, 500]
    assert [left(answer, "requests") for answer in answers] == [9, 8, 7]


def test_unlimited_and_unnamed_keys_carry_no_limits(serve: Serve, file: KeysFile) -> None:
    """Where nothing is limited, nothing is told."""
    api = serve(plain=("plain",))
    for secret in ("plain", file.add("alice")):
        answer = api.chat(secret)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_reserved_before_and_settled_after(
    serve: Serve, file: KeysFile, stream: bool
) -> None:
    """``max_tokens`` is taken at first, and what was not used is there for the next request."""
    secret = file.add("alice", KeyLimits(tokens_per_minute=1000))
    api = serve(engine=CountingEngine())
    answer = api.chat(secret, max_tokens=900, stream=stream)
    assert left(answer, "tokens") in range(90, 100)
    assert "usage" not in answer.text if stream else '"total_tokens": 40' in answer.text
    assert left(api.request("GET", "/v1/models", secret), "tokens") == 960
    refused = api.chat(secret, max_tokens=961, stream=stream)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert left(api.request("GET", "/v1/models", secret), "tokens") == 960
    assert "lower max_tokens" in api.chat(secret, max_tokens=2000).json()["error"]["message"]


def test_a_client_that_asks_for_usage_still_gets_it(serve: Serve, file: KeysFile) -> None:
    """Settling takes nothing out of a stream that its client asked for."""
    secret = file.add("alice", KeyLimits(tokens_per_minute=1000))
    api = serve(engine=CountingEngine())
    answer = api.chat(secret, stream=True, stream_options={"include_usage": True})
    assert '"total_tokens":40' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert left(api.request("GET", "/v1/models", secret), "tokens") == 960


def picture(size: int = 280) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), (200, 10, 10)).save(data, "PNG")
    return data.getvalue()


def test_visual_tokens_are_known_before_they_are_computed(serve: Serve, file: KeysFile) -> None:
    """280 × 280 pixels are 100 tokens; the second picture of a minute of 150 is refused."""
    secret = file.add("alice", KeyLimits(visual_tokens_per_minute=150))
    api = serve()
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    content = [
        {
            "type": "image_url",
            "image_url": {"url": url, "resized_height": 280, "resized_width": 280},
        }
    ]
    messages = [{"role": "user", "content": content}]
    assert left(api.chat(secret, messages=messages), "visual-tokens") == 50
    refused = api.chat(secret, messages=messages)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "visual tokens" in refused.json()["error"]["message"]
    assert len(api.engine.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_freed_when_the_client_leaves(
    serve: Serve, file: KeysFile, stream: bool
) -> None:
    """One at a time: the second is refused, and let in once the first has hung up."""
    secret = file.add("alice", KeyLimits(concurrent=1))
    api = serve(engine=FakeEngine(words=["word "] * 100_000, pause=0.01))
    body = json.dumps({**HELLO, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", api.port)) as first:
        first.sendall(head.encode() + body)
        eventually(lambda: api.engine.running == 1)
        refused = api.chat(secret, stream=stream)
        assert code(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
    eventually(lambda: api.engine.running == 0)
    api.engine.words = ["word"]
    eventually(lambda: api.chat(secret, stream=stream).status_code == 200)


def test_two_servers_share_one_count(serve: Serve, file: KeysFile) -> None:
    """The minute of a key is the same behind every process that shares its storage."""
    secret = file.add("alice", KeyLimits(requests_per_minute=4))
    one, two = serve(), serve()
    assert [left(api.chat(secret), "requests") for api in (one, two, one, two)] == [3, 2, 1, 0]
    assert one.chat(secret).status_code == two.chat(secret).status_code == 429


def test_a_key_sees_its_models_only(serve: Serve, file: KeysFile) -> None:
    """Another model is as missing as one that is not served; the default is one it may use."""
    secret = file.add("alice", models=["alias"])
    api = serve()
    data = api.request("GET", "/v1/models", secret).json()["data"]
    assert [model["id"] for model in data] == ["alias"]
    assert code(api.request("GET", "/v1/models/demo", secret)) == (404, "model_not_found")
    refused = api.chat(secret, model="demo")
    assert code(refused) == (404, "model_not_found")
    assert "'demo'" not in refused.json()["error"]["message"].partition("served:")[2]
    assert api.chat(secret).status_code == api.chat(secret, model="alias").status_code == 200


def test_the_openai_client_understands_refusals(serve: Serve, file: KeysFile) -> None:
    """The official package raises its own errors for 401 and 429."""
    secret = file.add("alice", KeyLimits(requests_per_minute=1))
    api = serve()
    client = openai.OpenAI(base_url=f"{api.root}/v1", api_key=secret, max_retries=0)
    client.chat.completions.create(model="demo", messages=HELLO["messages"])
    with pytest.raises(openai.RateLimitError) as limited:
        client.models.list()
    assert limited.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_files_belong_to_the_key_that_sent_them(serve: Serve, file: KeysFile) -> None:
    """Another's file cannot be listed, read, shown or deleted, nor told from a missing one."""
    alice, bob = file.add("alice"), file.add("bob")
    api = serve(plain=("one", "two"))

    def upload(key: str) -> str:
        form = {"file": ("a.png", picture()), "purpose": (None, "vision")}
        answer = api.request("POST", "/v1/files", key, files=form)
        assert "owner" not in answer.json()
        return str(answer.json()["id"])

    def listed(key: str) -> list[str]:
        return [one["id"] for one in api.request("GET", "/v1/files", key).json()["data"]]

    def shown(key: str, file_id: str) -> int:
        content = [{"type": "image_url", "image_url": {"file_id": file_id}}]
        return api.chat(key, messages=[{"role": "user", "content": content}]).status_code

    ids = {key: upload(key) for key in (alice, bob, "one")}
    assert len(set(ids.values())) == 3
    for key, own in ids.items():
        assert listed(key) == [own]
        assert shown(key, own) == 200
        for other in set(ids.values()) - {own}:
            path = f"/v1/files/{other}"
            assert code(api.request("GET", path, key)) == (404, "file_not_found")
            assert code(api.request("DELETE", path, key)) == (404, "file_not_found")
            assert shown(key, other) == 404
    assert listed("two") == [ids["one"]]
    assert api.request("DELETE", f"/v1/files/{ids[alice]}", alice).json()["deleted"]
    assert listed(bob) == [ids[bob]]


@pytest.mark.parametrize(
    ("listens", "named", "host", "taken"),
    [
        ("127.0.0.1", None, "localhost", True),
        ("127.0.0.1", None, "127.0.0.1", True),
        ("::1", None, "::1", True),
        ("127.0.0.1", None, "192.168.1.4", True),
        ("127.0.0.1", None, "box", True),
        ("127.0.0.1", None, "app.localhost", True),
        ("127.0.0.1", None, "evil.example", False),
        ("127.0.0.1", None, "127.0.0.1.evil.example", False),
        ("127.0.0.1", None, "localhost.evil.example", False),
        ("127.0.0.1", ("good.example",), "good.example", True),
        ("127.0.0.1", ("good.example",), "localhost", False),
        ("0.0.0.0", None, "evil.example", True),
        ("0.0.0.0", ("Good.example",), "good.example", True),
        ("0.0.0.0", ("good.example",), "evil.example", False),
        ("127.0.0.1", ("*",), "evil.example", True),
    ],
)
def test_which_hosts_are_answered(
    listens: str, named: tuple[str, ...] | None, host: str, taken: bool
) -> None:
    """A name that a page on the internet could own opens no server of this machine alone."""
    rule = host_rule(named, listens)
    assert (rule is None or rule(host)) == taken


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"Host: localhost:8000", 200), (b"Host: [::1]:8000", 200), (b"Host: EVIL.example", 421),
        (b"Host: evil.example.", 421), (b"Host: a/?x=", 400), (b"Host: a@b", 400),
        (b"Host:", 400), (b"Host: a\r\nHost: b", 400), (b"X: y", 400),
        (b"Host: evil.example:80:80", 400),
    ],
)  # fmt: skip
def test_the_host_is_checked(serve: Serve, host: bytes, status: int) -> None:
    """One plain name, and one of ours; probes are answered whatever they call us."""
    api = serve()
    rest = b"\r\nConnection: close\r\n\r\n"
    answer = api.raw(b"GET /v1/models HTTP/1.1\r\n" + host + rest)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert api.raw(b"GET /health/live HTTP/1.1\r\n" + host + rest).startswith(b"HTTP/1.1 200 ")


def test_no_origin_is_let_in_unless_named(serve: Serve) -> None:
    """Without ``cors_origins`` a browser gets no leave; with it only that origin does."""
    preflight = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    plain = serve(plain=("k",))
    refused = plain.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert refused.status_code == 401
    assert "access-control-allow-origin" not in refused.headers
    api = serve("server.cors_origins=https://page.example", plain=("k",))
    asked = api.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://page.example"
    other = {**preflight, "Origin": "https://other.example"}
    denied = api.request("OPTIONS", "/v1/chat/completions", headers=other)
    assert "access-control-allow-origin" not in denied.headers
    assert denied.status_code == 400
    assert "server.cors_origins" in denied.json()["error"]["message"]
    # Of a method that no page may use, with any origin let in, a page can read why.
    anybody = serve('server.cors_origins="*"')
    method = {**other, "Access-Control-Request-Method": "PUT"}
    denied = anybody.request("OPTIONS", "/v1/chat/completions", headers=method)
    assert denied.status_code == 400
    assert "method" in denied.json()["error"]["message"]
    assert denied.headers["access-control-allow-origin"] == "*"
    # Errors as well, or a page could not read why.
    wrong = api.request("GET", "/v1/models", headers={"Origin": "https://page.example"})
    assert wrong.status_code == 401
    assert wrong.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-request-id" in wrong.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in wrong.headers


@pytest.mark.parametrize("path", ["/v1/models", "/docs", "/nothing", "/health/live", "/metrics"])
def test_browsers_are_told_to_be_careful(serve: Serve, path: str) -> None:
    """Every answer, errors too: its type as declared, in no frame, kept nowhere."""
    headers = serve().request("GET", path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-request-id"]


def test_deep_json_is_refused_and_not_recursed_into(serve: Serve) -> None:
    """A depth of 100,000, in arrays or objects, ends in 400 by the parser's own bound."""
    api = serve()
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * 100_000 + "1" + closing * 100_000
        body = f'{{"messages": {deep}}}'
        answer = api.request(
            "POST", "/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
        )
        assert code(answer) == (400, "invalid_json")
    # What real requests nest is far below the bound.
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(30):
        schema = {"type": "object", "properties": {"a": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert api.chat(response_format=form).status_code == 200
