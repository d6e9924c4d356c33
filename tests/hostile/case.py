"""A case, and how its answer is judged: is it safe, and is it what this project promises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from tests.hostile.target import Answer, Target

Body = dict[str, Any] | bytes
Lazy = Body | Callable[[], Body]
"""A body, or what makes it: large ones are made when their case is run."""


@dataclass(frozen=True)
class Outcome:
    """What was wrong, None where nothing was.

    ``unsafe``: another class of status than demanded, a hang, a leak, damage done. ``unlike``:
    safe, but another status, code or shape than this project promises.
    """

    unsafe: str | None = None
    unlike: str | None = None

    @property
    def wrong(self) -> str | None:
        return self.unsafe or self.unlike


GOOD = Outcome()


@dataclass(frozen=True)
class Case:
    """``run`` attacks and judges. ``ours`` marks what another server may well decide otherwise."""

    group: str
    name: str
    run: Callable[[Target], Outcome]
    ours: bool = False
    needs: str = ""
    """``fetching``: the server may fetch from the runner's site. ``key``: it has keys.
    ``limits``: it has the settings of ``servers.SETTINGS``. ``no tools``: they are off."""

    @property
    def id(self) -> str:
        return f"{self.group} {self.name}"


def asked(content: object = "Hello", **fields: Any) -> dict[str, Any]:
    """Return a request of one user message for one token."""
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}


def image(url: object, **fields: Any) -> dict[str, Any]:
    """Return a picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def shown(*parts: Any, text: str = "x", **fields: Any) -> dict[str, Any]:
    """Return a request about parts."""
    return asked([*parts, {"type": "text", "text": text}], **fields)


@dataclass(frozen=True)
class Refusal:
    """A 4xx; of ours also ``status``, one of ``codes``, ``param`` and ``words`` in the message."""

    status: int = 400
    codes: tuple[str, ...] = ()
    param: str | None = None
    words: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def judge(self, request: bytes, answer: Answer) -> Outcome:
        if not 400 <= answer.status < 500:
            return Outcome(f"{answer.told}, not a refusal")
        if told := leak(answer, request):
            return Outcome(f"the answer tells {told!r}")
        if told := manners(answer, request):
            return Outcome(unlike=f"the answer tells {told!r}")
        return Outcome(unlike=self._unlike(answer))

    def _unlike(self, answer: Answer) -> str | None:
        try:
            error = json.loads(answer.body)["error"]
            shaped = set(error) == {"message", "type", "param", "code"}
        except (ValueError, TypeError, KeyError):
            return f"{answer.told}: not in OpenAI's shape"
        wrong = None
        if answer.status != self.status:
            wrong = f"status {answer.status}, not {self.status}: {error}"
        elif not shaped or error["type"] != "invalid_request_error":
            wrong = f"not in OpenAI's shape: {error}"
        elif error["code"] not in self.codes:
            wrong = f"code {error['code']!r}, not {' or '.join(self.codes)}: {error['message']}"
        elif self.param is not None and error["param"] != self.param:
            wrong = f"param {error['param']!r}, not {self.param!r}"
        elif missing := [word for word in self.words if word not in error["message"]]:
            wrong = f"the message lacks {missing}: {error['message']}"
        elif "x-request-id" not in answer.headers:
            wrong = "no x-request-id"
        elif missing := [one for one in self.headers if answer.headers.get(one[0]) != one[1]]:
            wrong = f"no header {missing}"
        return wrong


# What tells of the machine, of who is behind it, or of memory.
_TELLTALE = re.compile(
    rb"Traceback|File \"|site-packages|/tmp/|/usr/|/home/|/proc/|/etc/|/root/|\.py\b|object at 0x|"
    rb"Errno|127\.0\.0\.\d|\b10\.0\.0\.1|169\.254\.\d|Connect call failed|Cannot connect to host"
)
# What tells which libraries are at work: bad manners, and no more.
_LIBRARY = re.compile(
    rb"\bPIL\b|[Pp]illow\b|libpng|libjpeg|OpenCV|cv2|[Ff][Ff]mpeg|libav|aiohttp|urllib3|pydantic|"
    rb"starlette|uvicorn|NoneType|UnidentifiedImage\w*|Client\w+Error|JSONDecodeError|BytesIO|"
    rb"(?:Value|Type|Key|Index|OS|IO|Runtime|Assertion|Attribute)Error|codec can't"
)
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{60,}")
_LONG = 120


def leak(answer: Answer, request: bytes) -> str | None:
    """Return what an error tells of machine and network that its client has not said himself."""
    return _first(_TELLTALE, answer.body, request) or _first(_BASE64, answer.body, request)


def manners(answer: Answer, request: bytes) -> str | None:
    """Return what else an error should not tell: a library's words, much of the request again."""
    for found in _BASE64.finditer(answer.body):
        if len(found.group()) >= _LONG:
            return found.group()[:20].decode() + "…"
    return _first(_LIBRARY, answer.body, request)


def _first(pattern: re.Pattern[bytes], text: bytes, request: bytes) -> str | None:
    own = request + unquote_to_bytes(request)
    for found in pattern.finditer(text):
        if found.group() not in own:
            return found.group()[:60].decode("latin-1")
    return None


def refused(
    group: str,
    name: str,
    body: Lazy,
    *codes: str,
    ours: bool = False,
    needs: str = "",
    path: str = "/v1/chat/completions",
    **wanted: Any,
) -> Case:
    """Return a case: this body is refused."""

    def run(target: Target) -> Outcome:
        answer, request = target.chat(made(body), path)
        return refusal.judge(request, answer)

    refusal = Refusal(codes=codes, **wanted)
    return Case(group, name, run, ours, needs)


def served(
    group: str,
    name: str,
    body: Lazy,
    told: Callable[[dict[str, Any]], str | None] = lambda answer: None,
) -> Case:
    """Return a case: this body, odd as it is, is answered, and ``told`` finds nothing wrong."""

    def run(target: Target) -> Outcome:
        answer, _ = target.chat(made(body))
        if answer.status != 200:
            return Outcome(f"{answer.told}, not an answer: {answer.body[:200]!r}")
        try:
            found = json.loads(answer.body)
            found["choices"][0]["message"]
        except (ValueError, KeyError, IndexError):
            return Outcome("no answer in OpenAI's shape")
        return Outcome(told(found))

    return Case(group, name, run)


def made(body: Lazy) -> Body:
    """Return the body itself."""
    return body() if callable(body) else body
