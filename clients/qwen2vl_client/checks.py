"""What is the same over any transport: addresses, keys, timeouts, errors and answers in JSON."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import ssl
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwen2vl_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    InvalidArgumentError,
    ServerNotReachedError,
    status_error_class,
)
from qwen2vl_client.retry import retry_after_of
from qwen2vl_client.steps import Call, Reply

CONNECT_TIMEOUT = 10.0
LAST_BYTES_TIMEOUT = 0.25
"""How long the end of a complete stream is waited for, so that its connection is used again."""

_LONGEST_TIMEOUT = 1e8
"""Sockets refuse what their clock cannot hold."""

POOL = 32
"""Connections that are kept open."""


def checked_base_url(base_url: str) -> str:
    """Return ``base_url`` without a final slash, with ``/v1`` where it has no path."""
    if not isinstance(base_url, str):
        raise InvalidArgumentError(
            f"base_url={base_url!r} must be a string like http://127.0.0.1:8000/v1, "
            f"not {type(base_url).__name__}"
        )
    try:
        parts = urlsplit(base_url.strip())
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an IPv6 address without its bracket
        usable = False
    if not usable or parts.query or parts.fragment:
        raise InvalidArgumentError(
            f"base_url={base_url!r} is no address like http://127.0.0.1:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise InvalidArgumentError("base_url holds a user name; give the key as api_key")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def checked_api_key(api_key: str | None) -> str | None:
    """Return the key, or None for an empty one; never repeats it in an error."""
    if api_key is not None and not isinstance(api_key, str):
        raise InvalidArgumentError(f"api_key must be a string, not {type(api_key).__name__}")
    if not api_key:
        return None
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise InvalidArgumentError(
            "api_key holds a space, a line end or a character outside ASCII; such a key cannot "
            "be sent in a header (was it read from a file with its newline?)"
        )
    return api_key


def checked_timeout(timeout: float) -> float:
    """Return the timeout in seconds if it is a positive number; infinity is three years."""
    if isinstance(timeout, bool) or not isinstance(timeout, Real) or not timeout > 0:
        raise InvalidArgumentError(f"timeout={timeout!r} must be a number of seconds above 0")
    return min(float(timeout), _LONGEST_TIMEOUT)


def trusted(verify: bool | str) -> ssl.SSLContext | bool:
    """Return what ``verify`` says, a file's or folder's certificates read.

    ``InvalidArgumentError`` where they cannot be.
    """
    if isinstance(verify, bool):
        return verify
    try:
        if not verify:
            raise ValueError("the name is empty")
        if Path(verify).is_dir():
            return ssl.create_default_context(capath=verify)
        return ssl.create_default_context(cafile=verify)
    except (OSError, ValueError) as error:  # ssl's own is an OSError
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidArgumentError(
            f"verify={verify!r} is no file of certificates (PEM) that can be read: {reason}"
        ) from error


def status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    """Return the typed error for an answer other than 200."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    fields: Mapping[str, Any] = {}
    message = None
    if isinstance(value, Mapping):
        error = value.get("error")
        if isinstance(error, Mapping):
            fields = error
            message = error.get("message")
        else:
            message = error or value.get("detail") or value.get("message")
    if not message and 300 <= status < 400:
        message = (
            f"the server redirects to {headers.get('location', 'nowhere')!r}; redirects are not "
            "followed: if you trust that address give it as base_url"
        )
    if not message:
        text = " ".join(body[:400].decode("utf-8", errors="replace").split())
        message = text or http.client.responses.get(status, "no explanation")
    return status_error_class(status)(
        str(message),
        status=status,
        code=_text(fields.get("code")),
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
        request_id=headers.get("x-request-id"),
        retry_after=retry_after_of(headers),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def url_of(base_url: str, call: Call) -> str:
    """Return the whole address of a call."""
    if call.from_root:
        parts = urlsplit(base_url)
        return f"{parts.scheme}://{parts.netloc}{call.path}"
    return base_url + call.path


def whole_reply(raw: bytes, headers: Mapping[str, str], url: str) -> Reply:
    """Return the JSON object of an answer; ``APIResponseError`` where it is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise APIResponseError(
            f"{url} answered with something other than a JSON object: "
            f"{raw[:120]!r}; is this the address of the API (it ends in /v1)?"
        )
    return Reply(value, {name.lower(): text for name, text in headers.items()})


def timed_out(base_url: str, timeout: float) -> APITimeoutError:
    """Return the error for an answer that did not come in time."""
    # Not retried: the server is at work on it, and a second copy would slow both down.
    return APITimeoutError(
        f"{base_url} did not answer within timeout={timeout:g} s; raise the timeout or lower "
        "max_tokens",
        retryable=False,
    )


def no_connection(base_url: str, timeout: float) -> ServerNotReachedError:
    """Return the error for a connection that did not come about in time."""
    return ServerNotReachedError(
        f"cannot reach {base_url}: no connection within {min(timeout, CONNECT_TIMEOUT):g} s"
    )


def untrusted(base_url: str, reason: str) -> APIConnectionError:
    """Return the error for a server whose certificate no known authority has signed."""
    return APIConnectionError(
        f"cannot reach {base_url} safely: {reason}; for a certificate of your own give its file as "
        "verify= (at the command line: --verify)",
        retryable=False,
    )


def server_timings(headers: Mapping[str, str]) -> dict[str, float]:
    """Return the durations of a ``Server-Timing`` header (W3C) in seconds, by name."""
    found: dict[str, float] = {}
    for entry in headers.get("server-timing", "").split(","):
        name, *fields = (part.strip() for part in entry.split(";"))
        for one in fields:
            key, _, value = one.partition("=")
            if key.strip().lower() == "dur":
                with contextlib.suppress(ValueError):
                    found[name] = float(value.strip().strip('"')) / 1000
    return found


def is_loopback(base_url: str) -> bool:
    """Tell whether an address is this machine's own, which a proxy cannot reach."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
