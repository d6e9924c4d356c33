"""The log: one line a request with its figures, and nothing that was meant for nobody's eyes."""

from __future__ import annotations

import base64
import json
import logging
import re
import string
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2vl_serve.http.request_log import Console, JSONLines, redacted, reporter
from tests.fake_engine import FakeEngine
from tests.test_app import HELLO, Running, eventually, running

SECRET = st.text(string.ascii_letters + string.digits, min_size=16, max_size=40)


class Lines(logging.Handler):
    """What both formats would write of all that the package says."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.console: list[str] = []
        self.json: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.console.append(Console().format(record))
        self.json.append(JSONLines().format(record))


@pytest.fixture(scope="module")
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("qwen2vl_serve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    with running(keys=("sk-right",)) as one:
        yield one


PLACES = [
    "bearer", "basic", "other header", "query", "path", "method", "text", "field", "model", "url",
    "url of a private host", "credentials", "data", "broken data", "file", "upload", "stream",
    "crash", "crash in a stream", "not json", "role", "fragment",
]  # fmt: skip


def shows(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


def says(text: str, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text}]}


CHAT = "/v1/chat/completions"


def sent(place: str, secret: str) -> tuple[str, str, dict[str, str], Any]:
    """Method, path, headers and body of a request that holds ``secret`` at one place."""
    encoded = base64.b64encode(secret.encode() * 4).decode()
    in_headers = {
        "bearer": {"authorization": f"Bearer {secret}"},
        "basic": {"authorization": f"Basic {secret}"},
        "other header": {"x-secret": secret, "cookie": secret, "user-agent": secret},
    }
    in_path = {
        "query": ("POST", f"{CHAT}?api_key={secret}"),
        "path": ("GET", f"/v1/models/{secret}"),
        "method": ("DELETE", f"/{secret}"),
    }
    in_body: dict[str, Any] = {
        "text": says(secret),
        "field": {**HELLO, "user": secret, "metadata": {"a": secret}, "temperature": secret},
        "model": {**HELLO, "model": secret},
        "url": shows(f"http://host.invalid/a.jpg?X-Amz-Signature={secret}"),
        "url of a private host": shows(f"http://127.0.0.1/{secret}.jpg?sig={secret}"),
        "credentials": shows(f"http://user:{secret}@host.invalid/a.jpg"),
        "fragment": shows(f"https://host.invalid/a.jpg#{secret}"),
        "data": shows(f"data:image/png;base64,{encoded}"),
        "broken data": shows(f"data:image/png;base64,{secret}!!"),
        "file": shows(f"file:///{secret}"),
        "upload": shows(f"upload:{secret}"),
        "stream": {**says(secret), "stream": True},
        "crash in a stream": {**HELLO, "stream": True},
        "role": says("x", role=secret),
    }
    method, path = in_path.get(place, ("POST", CHAT))
    headers = {"authorization": "Bearer sk-right", "content-type": "application/json"}
    data = f"{{{secret}" if place == "not json" else json.dumps(in_body.get(place, HELLO))
    return method, path, headers | in_headers.get(place, {}), data


def send(api: Running, place: str, secret: str) -> None:
    encoded = base64.b64encode(secret.encode() * 4).decode()
    if place.startswith("crash"):
        api.engine.fail_at = 1
        api.engine.failure = RuntimeError(
            f"Authorization: Bearer {secret} sk-{secret} https://u:{secret}@h/a?sig={secret} "
            f"https://h/a#{secret} data:image/png;base64,{encoded}"
        )
    method, path, headers, data = sent(place, secret)
    try:
        requests.request(
            method,
            api.root + path,
            data=data,
            headers=headers,
            timeout=60,
        )
    except requests.exceptions.ChunkedEncodingError:
        assert place == "crash in a stream"
    finally:
        api.engine.failure = None


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(secret=SECRET)
@pytest.mark.parametrize("place", PLACES)
def test_no_secret_of_a_request_reaches_the_log(
    api: Running, lines: Lines, place: str, secret: str
) -> None:
    """Wherever it stands, and whatever fails: every line of both formats is without it."""
    lines.console.clear()
    lines.json.clear()
    send(api, place, secret)
    eventually(lambda: any('"event":"request"' in line for line in lines.json))
    written = "\n".join(lines.console + lines.json)
    encoded = base64.b64encode(secret.encode() * 4).decode()
    assert secret not in written
    assert encoded[:24] not in written


def test_a_crash_is_still_told(api: Running, lines: Lines) -> None:
    """The traceback is there, under the request's id."""
    lines.console.clear()
    api.engine.failure, api.engine.fail_at = RuntimeError("what went wrong"), 0
    headers = {"authorization": "Bearer sk-right", "x-request-id": "mine"}
    assert api.chat(headers=headers).status_code == 500
    api.engine.failure = None
    eventually(lambda: len(lines.console) >= 2)
    told = "\n".join(lines.console)
    assert "request mine failed" in told
    assert "RuntimeError: what went wrong" in told
    assert re.search(r"mine POST /v1/chat/completions 500 \d\.\d+ s internal_error", told)


def test_a_line_holds_the_requests_figures(lines: Lines) -> None:
    """Key name, model, tokens, times, status: in JSON by name, on a console in short."""

    def named(app: Any) -> Any:
        async def with_key(scope: Any, receive: Any, send: Any) -> None:
            scope["state"] = {"key": "front-desk"}
            await app(scope, receive, send)

        return with_key

    with running(FakeEngine(pause=0.01), wrapped=named) as api:
        lines.console.clear()
        lines.json.clear()
        assert api.chat({**HELLO, "stream": True}).text
        eventually(lambda: len(lines.json) >= 1)
    (line,), (words,) = lines.json, lines.console
    told = json.loads(line)
    wanted = {
        "level": "info", "event": "request", "method": "POST", "route": "/v1/chat/completions",
        "status": 200, "model": "demo", "prompt_tokens": 1, "completion_tokens": 3,
        "key": "front-desk",
    }  # fmt: skip
    assert told.items() >= wanted.items()
    assert 0 < told["ttft_seconds"] <= told["seconds"]
    assert re.match(
        r"\d\d:\d\d:\d\d [0-9a-f]{32} POST /v1/chat/completions 200 \d+\.\d{3} s ", words
    )
    assert "key=front-desk model=demo in=1 out=3 ttft=" in words


@given(st.text())
def test_any_text_can_be_a_line(text: str) -> None:
    """Line breaks do not make a second entry; what no encoding knows does not stop the log."""
    lines: list[str] = []
    reporter("json", lines.append)(text.encode("utf-8", "replace").decode())
    (line,) = lines
    assert "\n" not in line
    assert json.loads(line)["level"] == "info"


def test_ordinary_words_stay() -> None:
    """Only what can be a secret is taken out."""
    text = (
        'File "/usr/lib/python3/dist-packages/Uvicorn/protocols/http/httptools_impl.py", line 3 in '
        "build_async_engine_client_from_engine_args, see https://host/path for 300 bytes"
    )
    assert redacted(text) == text
    encoded = base64.b64encode(bytes(range(90))).decode()
    assert redacted(encoded) == "…"
    for before in ("x: ", "(", "é", "图片"):
        assert redacted(f"{before}{encoded}.") == f"{before}…."


@pytest.mark.parametrize("piece", ["a", "data:", "ab://", "A1-", "=", "sk-"])
def test_what_a_client_writes_never_holds_up_the_log(piece: str) -> None:
    """A quarter of a million characters that match almost: seconds at most, where it was hours."""
    begun = time.process_time()
    told = redacted(f"before\n{piece * (250_000 // len(piece))}\nafter")
    assert time.process_time() - begun < 10
    assert told.startswith("before\n")
    assert told.endswith("…\nafter")
    assert len(told) < 5_000
