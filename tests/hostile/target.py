"""A server under attack, known by its public interface only."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.hostile.case import Body, Outcome
from tests.hostile.sites import Sites

SECONDS = 60.0
"""No answer may take longer."""

SETTLED_SECONDS = 20.0
"""Within so long after a case nothing of it may be left."""

WARM_UP_SECONDS = 300.0

PATIENCE = 45.0
"""How long a client that is slow on purpose may be borne with."""

_GAUGES = re.compile(
    r"^(qwen2vl_requests_in_flight|qwen2vl_admission_in_flight|qwen2vl_media_held_bytes|"
    r"qwen2vl_body_held_bytes|vllm:num_requests_running|vllm:num_requests_waiting)"
    r"(?:\{[^}]*\})? (\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Answer:
    """What came back; ``status`` 0: the connection ended without an answer."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0

    @property
    def told(self) -> str:
        return f"status {self.status}" if self.status else "no answer"


@dataclass
class Target:
    """``url`` is its root or its /v1; ``alive`` tells whether its process is still the same."""

    url: str
    sites: Sites
    key: str = ""
    alive: Callable[[], bool] = lambda: True
    patience: float = PATIENCE
    unguarded: bool = False
    """Whether it has fetched from loopback: it is not led to anything beyond."""

    def __post_init__(self) -> None:
        place = urlsplit(self.url)
        self.secure = place.scheme == "https"
        self.host = place.hostname or ""
        self.port = place.port or (443 if self.secure else 80)
        self.born = _born(self.metrics())

    def connect(self, seconds: float = SECONDS) -> socket.socket:
        """Return a new connection."""
        line = socket.create_connection((self.host, self.port), seconds)
        if not self.secure:
            return line
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(line, server_hostname=self.host)

    def head(self, method: str, path: str, *lines: str, key: str | None = None) -> bytes:
        """Return a request line and headers, with the key, without the empty line behind."""
        key = self.key if key is None else key
        auth = [f"Authorization: Bearer {key}"] if key else []
        words = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}", *auth, *lines]
        return "\r\n".join([*words, ""]).encode("latin-1")

    def post(self, body: bytes, *lines: str, path: str = "/v1/chat/completions") -> bytes:
        """Return a whole request with a JSON body."""
        lines = lines or ("Content-Type: application/json",)
        return self.head("POST", path, *lines, f"Content-Length: {len(body)}") + b"\r\n" + body

    def chat(self, body: Body, path: str = "/v1/chat/completions") -> tuple[Answer, bytes]:
        """Send a body; return the answer and the request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = self.post(data, path=path)
        return self.send(request), request

    def send(self, *pieces: bytes, pause: float = 0.0) -> Answer:
        """Send bytes as they are; return the first answer.

        Raises:
            TimeoutError: none came in time.
        """
        begun = time.monotonic()
        with self.connect() as line:
            try:
                for piece in pieces:
                    line.sendall(piece)
                    time.sleep(pause)
            except (ConnectionError, ssl.SSLError):
                pass  # refused in the middle of it: the answer is there to be read
            return answer_of(line, pieces[0].partition(b" ")[0], begun)

    def get(self, path: str) -> Answer:
        """Ask for a path."""
        return self.send(self.head("GET", path, "Connection: close") + b"\r\n")

    def good(self) -> str | None:
        """Ask as a good client does; return what is wrong with the answer."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        try:
            answer, _ = self.chat(body)
        except OSError as error:
            return f"the next good request: {error or 'no answer'}"
        if answer.status != 200 or b'"choices"' not in answer.body:
            return f"the next good request: {answer.told} {answer.body[:200]!r}"
        return None

    def warm_up(self) -> None:
        """Have vLLM compile what it compiles at the first request for logprobs.

        On a busy machine that takes longer than any case may.
        """
        fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 2}
        body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
        with self.connect(WARM_UP_SECONDS) as line:
            line.sendall(self.post(json.dumps(body).encode()))
            answer_of(line, b"POST", 0.0)

    def metrics(self) -> str:
        """Return its figures for Prometheus; of a server without any, an error's text."""
        return self.get("/metrics").body.decode("utf-8", "replace")

    def busy(self) -> dict[str, float]:
        """Return the gauges that are not 0."""
        return _busy(self.metrics())

    def aftermath(self) -> str | None:
        """Return what a case has left behind."""
        if wrong := self.good():
            return wrong
        end = time.monotonic() + SETTLED_SECONDS
        while held := _busy(text := self.metrics()):
            if time.monotonic() > end:
                return f"still held: {held}"
            time.sleep(0.05)
        if not self.alive() or _born(text) != self.born:
            return "the server's process is another one"
        return None


def _busy(metrics: str) -> dict[str, float]:
    return {name: float(value) for name, value in _GAUGES.findall(metrics) if float(value)}


def _born(metrics: str) -> str:
    found = re.search(r"^process_start_time_seconds (\S+)", metrics, re.MULTILINE)
    return found[1] if found else ""


def answer_of(line: socket.socket, method: bytes, begun: float) -> Answer:
    """Read an answer."""
    try:
        answer = http.client.HTTPResponse(line, method=method.decode("latin-1"))
        answer.begin()
        body = answer.read()
    except (ConnectionError, http.client.HTTPException, ssl.SSLError):
        return Answer(0, seconds=time.monotonic() - begun)
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, headers, body, time.monotonic() - begun)


def attempt(target: Target, case: Any) -> Outcome:
    """Run a case and look at what it left behind."""
    try:
        outcome = case.run(target)
    except TimeoutError:
        outcome = Outcome(f"no answer within {SECONDS:.0f} s")
    except OSError as error:
        outcome = Outcome(f"the server cannot be reached: {error}")
    except (ValueError, LookupError, TypeError) as error:
        outcome = Outcome(f"an answer of another shape: {error!r}")
    if outcome.unsafe is None and (left := target.aftermath()) is not None:
        return Outcome(left)
    return outcome  # type: ignore[no-any-return]
