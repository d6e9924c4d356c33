"""The lines of a batch's files: requests as they are given, outcomes as they are written.

A request is ``{"custom_id": …, "method": "POST", "url": …, "body": {…}}``. A line of the output
file tells what came of one, its ``custom_id`` beside an id of its own.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from qwen2vl_serve.errors import APIError
from qwen2vl_serve.protocol.shown import shown
from qwen2vl_serve.protocol.validation import MOST_VALUES, is_crowded

ENDPOINT = "/v1/chat/completions"
"""The one route whose requests a batch may hold."""

MOST_ERRORS = 100
"""Faulty lines that are told of a batch; the rest waits for the next attempt."""

_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class Line:
    """Where a request stands in its file, in bytes, and what it is called."""

    custom_id: str
    start: int
    size: int

    def body(self, path: Path) -> bytes:
        """Return the request's body as a client would have sent it; raises ``OSError``."""
        with path.open("rb") as source:
            source.seek(self.start)
            return to_json(from_json(source.read(self.size))["body"])


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, counted from 1, or with the whole file."""

    code: str
    message: str
    param: str | None
    line: int | None

    def told(self) -> dict[str, Any]:
        """Return it in OpenAI's shape."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "line": self.line,
        }


def read(path: Path, most_lines: int, most_bytes: int) -> tuple[Sequence[Line], Sequence[Fault]]:
    """Return the requests of a file, and what is wrong with it, where anything is.

    A line holds at most ``most_bytes``. Bodies are looked at when their turn comes. Raises
    ``OSError``.
    """
    lines: list[Line] = []
    faults: list[Fault] = []
    known: dict[str, int] = {}
    for number, start, data in _numbered(path, most_bytes):
        fault = None
        if len(lines) >= most_lines:
            text = f"The file holds more than {most_lines} requests; split it."
            faults.append(Fault("too_many_items", text, None, number))
            break
        custom_id, fault = _understood(data, number, most_bytes)
        if fault is None and custom_id in known:
            text = f"custom_id is {custom_id[:60]!r}, as in line {known[custom_id]}."
            fault = Fault("duplicate_custom_id", text, "custom_id", number)
        if fault is not None:
            faults.append(fault)
            if len(faults) == MOST_ERRORS:
                break
            continue
        known[custom_id] = number
        lines.append(Line(custom_id, start, len(data)))
    if not lines and not faults:
        faults.append(Fault("empty_file", "The file holds no requests.", None, None))
    return lines, faults


def _numbered(path: Path, most_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield each line that is not blank, with its number and place; no more of it than needed.

    What marks the file as UTF-8 at its beginning, as editors on Windows do, is no part of a line.
    """
    with path.open("rb") as source:
        number = start = 0
        if source.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            start = len(codecs.BOM_UTF8)
        source.seek(start)
        while data := source.readline(most_bytes + 2):
            number += 1
            whole = data.rstrip(b"\r\n")
            if whole.strip():
                yield number, start, whole
            while data and not data.endswith(b"\n"):
                data = source.readline(1024 * 1024)
            start = source.tell()


def _understood(data: bytes, number: int, most_bytes: int) -> tuple[str, Fault | None]:
    """Return a line's ``custom_id``, or what is wrong with it."""
    try:
        return _custom_id(data, most_bytes), None
    except _Faulty as error:
        return "", Fault(error.code, error.message, error.param, number)


class _Faulty(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _custom_id(data: bytes, most_bytes: int) -> str:
    if len(data) > most_bytes:
        raise _Faulty("request_too_large", f"The line holds more than {most_bytes} bytes.")
    if is_crowded(data):
        raise _Faulty("invalid_json_line", f"The line holds more than {MOST_VALUES} values.")
    try:
        line = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        fault = str(error).replace("at line 1 column", "at column")  # the line is ours to count
        text = f"The line is not valid JSON in UTF-8: {fault[:200]}."
        raise _Faulty("invalid_json_line", text) from None
    if not isinstance(line, dict):
        raise _Faulty("invalid_json_line", "The line must be a JSON object.")
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        text = f"custom_id must be a string of 1 to 512 characters, not {shown(custom_id)}."
        raise _Faulty("invalid_value", text, "custom_id")
    if line.get("method") != "POST":
        text = f"method must be 'POST', not {shown(line.get('method'))}."
        raise _Faulty("invalid_value", text, "method")
    if line.get("url") != ENDPOINT:
        text = f"url must be {ENDPOINT!r}, not {shown(line.get('url'))}."
        raise _Faulty("invalid_url", text, "url")
    if not isinstance(body, dict):
        raise _Faulty("invalid_type", "body must be an object.", "body")
    if body.get("stream"):
        raise _Faulty("unsupported_parameter", "A batch has no streams.", "body.stream")
    if unknown := sorted(line.keys() - _KEYS):
        name = unknown[0][:60]
        text = f"{name!r} is not known here; a line has custom_id, method, url and body."
        raise _Faulty("unsupported_parameter", text, name)
    return custom_id


def answered(line_id: str, custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """Return the line of an answer, or of an error that the request got."""
    head = {"id": line_id, "custom_id": custom_id}
    start = {"status_code": status, "request_id": request_id}
    # The body is JSON already; made into values and back it would cost more than all the rest.
    response = to_json(start)[:-1] + b',"body":' + body + b"}"
    return to_json(head)[:-1] + b',"response":' + response + b',"error":null}\n'


def refused(line_id: str, custom_id: str, request_id: str, error: APIError) -> bytes:
    """Return the line of a request that was answered with ``error``."""
    return answered(line_id, custom_id, request_id, error.status, to_json(error.body()))


def unanswered(line_id: str, custom_id: str, code: str, message: str) -> bytes:
    """Return the line of a request that was never asked."""
    error = {"code": code, "message": message}
    return (
        to_json({"id": line_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"
    )
