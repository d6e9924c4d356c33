"""What the clients of a soak send, and the one outcome that each request must have."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bench.fuzz.site import Script, Site
from bench.servers import HOST
from bench.traffic import drawn_jpeg

PATIENCE_SECONDS = 90.0
"""No answer may take longer, whatever happens to the server."""

LEAVES_SECONDS = 5.0
"""A client that leaves in the answer leaves without one after so long."""

DOWN_SECONDS = 0.3
"""A client that reached no server tries again after so long."""

PICTURES = 200

WEIGHTS = {
    "text": 5, "stream": 6, "picture": 4, "picture stream": 3, "explain": 2, "upload": 2,
    "stalled": 1, "leaves": 4,
}  # fmt: skip
"""Which share of the requests is of which kind."""

STALLS = "stalls"


@dataclass(frozen=True)
class Outcome:
    """How one request ended, as its client saw it.

    ``end``: ``answered`` (whole), ``error`` (in OpenAI's shape, with ``status`` and ``code``),
    ``broken off`` (a stream that ends in an error), ``closed`` (no whole answer), ``left`` (by the
    client) or ``wrong`` with the reason in ``code``. Times on the monotonic clock.
    """

    id: str
    kind: str
    end: str
    status: int
    code: str
    begun: float
    ended: float


@dataclass
class Crowd:
    """Clients that ask at random until told to stop; ``outcomes`` has every request once."""

    port: int
    site: Site
    seed: int = 0
    max_tokens: int = 24
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, clients: int) -> None:
        """Let so many clients begin."""
        self.site.scripts[STALLS] = Script((), ending="hang")
        for number in range(clients):
            thread = threading.Thread(target=self._client, args=[number], daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> bool:
        """Let every client finish what it has begun; False if one does not come back."""
        self.stopped.set()
        end = time.monotonic() + PATIENCE_SECONDS + 10
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")  # noqa: S311  (not for secrets)
        while not self.stopped.is_set():
            kind = rng.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
            for outcome in self._asked(rng, kind):
                self.outcomes.append(outcome)
                if outcome.end == "closed" and outcome.status == 0:
                    self.stopped.wait(DOWN_SECONDS)
            self.stopped.wait(rng.expovariate(10))

    def _asked(self, rng: random.Random, kind: str) -> list[Outcome]:
        if kind == "upload":
            return self._upload(rng)
        path = "/v1/chat/completions" + ("/explain" if kind == "explain" else "")
        body = self._body(rng, kind)
        if kind == "leaves":
            return [self.leave(rng, path, body)]
        return [self._send(kind, ("POST", path), body)]

    def _body(self, rng: random.Random, kind: str) -> bytes:
        asked: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0}
        picture = f"data:image/jpeg;base64,{_picture(rng.randrange(PICTURES))}"
        url = f"http://{HOST}:{self.site.port}/{STALLS}/a.png" if kind == "stalled" else picture
        content: list[dict[str, Any]] = [{"type": "text", "text": f"What is {rng.random()}?"}]
        seen = {"picture": 1.0, "picture stream": 1.0, "stalled": 1.0, "explain": 0.5}
        if rng.random() < seen.get(kind, 0.3 if kind == "leaves" else 0.0):
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked["messages"] = [{"role": "user", "content": content}]
        if kind.endswith("stream") or (kind == "leaves" and rng.random() < 0.6):
            asked["stream"] = True
        return json.dumps(asked).encode()

    def _upload(self, rng: random.Random) -> list[Outcome]:
        """Upload a picture, ask about it and delete it: three requests, as far as they go."""
        data = base64.b64decode(_picture(rng.randrange(PICTURES)))
        form = (
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
            + data
            + b"\r\n--x--\r\n"
        )
        found: list[bytes] = []
        first = self._send(
            "upload",
            ("POST", "/v1/files"),
            form,
            "multipart/form-data; boundary=x",
            take=found.append,
        )
        if first.end != "answered":
            return [first]
        file = json.loads(found[0])["id"]
        part = {"type": "image_url", "image_url": {"file_id": file}}
        asked = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
        body = json.dumps(asked).encode()
        return [
            first,
            self._send("by id", ("POST", "/v1/chat/completions"), body),
            self._send("delete", ("DELETE", f"/v1/files/{file}"), b""),
        ]

    def _send(
        self,
        kind: str,
        ask: tuple[str, str],
        body: bytes,
        content_type: str = "application/json",
        *,
        take: Callable[[bytes], object] = lambda _: None,
    ) -> Outcome:
        name = f"soak-{self.seed}-{next(self._numbers)}"
        begun = time.monotonic()
        method, path = ask
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE_SECONDS)
        headers = {"Content-Type": content_type, "X-Request-Id": name, "Connection": "close"}
        status, end, code = 0, "closed", ""
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            status = answer.status
            data = answer.read()
            end, code = judged(status, answer.headers.get_content_type(), data)
            take(data)
        except TimeoutError:
            end, code = "wrong", f"no answer within {PATIENCE_SECONDS:.0f} s"
        except (OSError, http.client.HTTPException) as error:
            code = type(error).__name__
        finally:
            connection.close()
        return Outcome(name, kind, end, status, code, begun, time.monotonic())

    def leave(self, rng: random.Random, path: str, body: bytes) -> Outcome:
        """Begin a request and leave: before it is whole, while it is answered, or in the stream."""
        name = f"soak-{self.seed}-{next(self._numbers)}"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        begun = time.monotonic()
        way = rng.choice(("nothing", "head", "body", "at once", "soon", "in the answer"))
        whole = {"nothing": b"", "head": head[: rng.randrange(len(head))]}.get(way, head + body)
        if way == "body":
            whole = whole[: len(head) + rng.randrange(len(body))]
        end = "left"
        try:
            with socket.create_connection((HOST, self.port), timeout=LEAVES_SECONDS) as line:
                line.sendall(whole)
                if way == "soon":
                    time.sleep(rng.random() * 0.3)
                elif way == "in the answer":
                    with suppress(TimeoutError):  # it leaves before the answer begins
                        line.recv(rng.randrange(1, 2000))
        except OSError:
            end = "closed"
        return Outcome(name, f"leaves ({way})", end, 0, "", begun, time.monotonic())


def judged(status: int, kind: str, body: bytes) -> tuple[str, str]:
    """Return (end, code or reason) of an answer whose bytes are all there."""
    if status == 200 and kind == "text/event-stream":
        return _stream(body)
    try:
        said = json.loads(body)
        if status == 200:
            whole = "choices" in said or "prompt_tokens" in said or said.get("object") == "file"
            return ("answered", "") if whole else ("wrong", f"200 with {body[:200]!r}")
        code = said["error"]["code"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "wrong", f"HTTP {status} with {body[:200]!r}"
    if status >= 500 and status != 503:
        return "wrong", f"HTTP {status} {code}"
    return "error", str(code)


def _stream(body: bytes) -> tuple[str, str]:
    """Judge a stream: it ends in ``[DONE]`` or in an error, never in both, never in neither."""
    events = [one[6:] for one in body.split(b"\n\n") if one.startswith(b"data: ")]
    done = [number for number, one in enumerate(events) if one == b"[DONE]"]
    broken = [number for number, one in enumerate(events) if one.startswith(b'{"error"')]
    if len(done) + len(broken) != 1:
        return "wrong", f"a stream with {len(done)} [DONE] and {len(broken)} errors"
    if (done + broken)[0] != len(events) - 1:
        return "wrong", "a stream that goes on after its end"
    if done:
        return "answered", ""
    return "broken off", str(json.loads(events[-1])["error"]["code"])


@cache
def _picture(number: int) -> str:
    return base64.b64encode(drawn_jpeg(number)).decode()
