"""The server's own log lines: one a request, for eyes or as JSON, and nothing secret in them.

The standard library's ``logging``: a line is one dictionary and one formatter, for which structlog
would be a further dependency and another configuration beside the one that vLLM already makes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic_core import to_json

from qwen2vl_serve.http.call import Call

Format = Literal["console", "json"]

_MOST_OF_A_LINE = 4000
"""Characters; of longer lines, which libraries write that quote what they were given, no more is
looked through: the time that takes grows with the square."""

_SECRETS = (
    # Tracebacks quote whatever a library was given: keys, files, addresses with signed queries.
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s'\",]+"), r"\1 …"),
    (re.compile(r"\bsk-[\w-]+"), "sk-…"),
    (re.compile(r"\b(\w{2,20}://)[^\s/@'\"]*@"), r"\1…@"),
    (re.compile(r"\b(\w{2,20}://[^\s?#'\"]*)[?#][^\s'\"]*"), r"\1?…"),
    (re.compile(r"(?i)\bdata:[^\s,'\"]*,[^\s'\"]*"), "data:…"),
)
# Base64 has digits and capitals, which tells it from long names in a traceback; paths are kept.
_BASE64 = "[A-Za-z0-9+/_=-]"
_LONG = re.compile(
    rf"""File "[^"]*"|(?<!{_BASE64})((?={_BASE64}*[0-9])(?={_BASE64}*[A-Z]){_BASE64}{{40,}})"""
)
_LONG_LINE = re.compile(rf"^(.{{{_MOST_OF_A_LINE}}}).+$", re.MULTILINE)


def fields(call: Call, method: str, route: str, status: int, seconds: float) -> dict[str, Any]:
    """Return what is told of a request; None where there is nothing to tell.

    The route's pattern stands for the path, of which a client writes the rest; ``model`` is the
    served name.
    """
    return {
        "id": call.id,
        "method": method if method in _METHODS else "other",
        "route": route,
        "status": status,
        "seconds": round(seconds, 4),
        "code": call.code,
        "model": call.model,
        "prompt_tokens": call.usage.prompt_tokens,
        "completion_tokens": call.usage.completion_tokens,
        "visual_tokens": call.visual_tokens or None,
        "queue_seconds": round(call.queued, 4) or None,
        "ttft_seconds": None if call.first_token is None else round(call.first_token, 4),
    }


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"})
# Of a console's line the words, where the value alone would not say what it is.
_WORDS = {
    "key": "key",
    "model": "model",
    "prompt_tokens": "in",
    "completion_tokens": "out",
    "visual_tokens": "visual",
    "queue_seconds": "queue",
    "ttft_seconds": "ttft",
}


class Console(logging.Formatter):
    """``15:04:05 ID POST /v1/chat/completions 200 0.532 s model=demo in=70 out=24 ttft=0.12``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, or several where there is a traceback."""
        clock = self.formatTime(record, "%H:%M:%S")
        request: dict[str, Any] | None = getattr(record, "request", None)
        if request is None:
            return f"{clock} {redacted(_message(self, record))}"
        head = "{id} {method} {route} {status} {seconds:.3f} s".format(**request)
        words = [f"{word}={request[name]}" for name, word in _WORDS.items() if request.get(name)]
        return " ".join([clock, head, *filter(None, [request["code"]]), *words])


class JSONLines(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``event`` and what belongs to it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        request: dict[str, Any] | None = getattr(record, "request", None)
        if request is None:
            return json_line(record.levelname.lower(), redacted(_message(self, record)))
        told = {name: value for name, value in request.items() if value is not None}
        return json_line(record.levelname.lower(), "request", told)


def json_line(level: str, event: str, more: dict[str, Any] | None = None) -> str:
    """Return a JSON object with the time that it is now."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return to_json({"time": now, "level": level, "event": event, **(more or {})}).decode()


def formatter(kind: Format) -> logging.Formatter:
    """Return the formatter for ``server.log_format``."""
    return JSONLines() if kind == "json" else Console()


def reporter(kind: Format, report: Callable[[str], None]) -> Callable[[str], None]:
    """Return ``report`` for lines that are for an operator's eyes, as JSON where that is wanted."""
    if kind == "console":
        return report
    return lambda line: report(json_line("info", " ".join(line.split())))


def redacted(text: str) -> str:
    """Return ``text`` without keys, queries of addresses, ``data:`` URLs and long base64.

    Of each line the first 4,000 characters are kept.
    """
    text = _LONG_LINE.sub(r"\1…", text)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return _LONG.sub(lambda found: "…" if found[1] else found[0], text)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    return (
        f"{message}\n{formatter.formatException(record.exc_info)}" if record.exc_info else message
    )
