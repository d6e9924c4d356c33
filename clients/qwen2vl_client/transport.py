"""HTTP: one pooled session, typed errors, retries, timeouts.

Redirects are not followed: they could carry the key and the pictures to another host.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from qwen2vl_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    InvalidArgumentError,
    ServerNotReachedError,
    status_error_class,
)
from qwen2vl_client.retry import RetryPolicy, parse_retry_after

CONNECT_TIMEOUT = 10.0
_PIECE = 65536
_POOL = 32
_LAST_BYTES_TIMEOUT = 0.25


@dataclass(frozen=True)
class Reply:
    """A whole JSON answer."""

    json: dict[str, Any]
    request_id: str | None


class Transport:
    """Sends requests below ``base_url``; may be used by several threads at once."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout: float,
        retry: RetryPolicy,
        verify: bool | str,
        user_agent: str,
    ) -> None:
        self.base_url = checked_base_url(base_url)
        self._timeout = checked_timeout(timeout)
        self._retry = retry
        self._session = requests.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=_POOL)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        # With an auth object in place requests does not look for a password in ~/.netrc.
        self._session.auth = _Bearer(checked_api_key(api_key))
        # Given with each request: as the session's it would yield to REQUESTS_CA_BUNDLE.
        self._verify = verify
        self._session.headers["User-Agent"] = user_agent
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # A proxy from the environment cannot reach this machine's own loopback.
        host = urlsplit(self.base_url).hostname or ""
        self._proxies = {"no_proxy": host} if _is_loopback(host) else None

    def close(self) -> None:
        """Close the pooled connections."""
        self._session.close()

    def get(self, path: str, timeout: float | None = None) -> Reply:
        """Return the JSON answer to a GET."""
        return self._retry.run(lambda: self._whole("GET", path, None, timeout))

    def post(self, path: str, body: bytes, timeout: float | None = None) -> Reply:
        """Return the JSON answer to a POST of a JSON body."""
        return self._retry.run(lambda: self._whole("POST", path, body, timeout))

    def open_stream(self, path: str, body: bytes, timeout: float | None = None) -> ByteStream:
        """POST a JSON body and return the answer's bytes as they arrive.

        Retries end here: once the answer has begun nothing is sent again.
        """
        return self._retry.run(lambda: self._open("POST", path, body, timeout, "identity"))

    def _whole(self, method: str, path: str, body: bytes | None, timeout: float | None) -> Reply:
        with self._open(method, path, body, timeout) as answer:
            raw = answer.read_all()
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise APIResponseError(
                f"{self.base_url}{path} answered with something other than a JSON object: "
                f"{raw[:120]!r}; is this the address of the API (it ends in /v1)?"
            )
        return Reply(value, answer.request_id)

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        encoding: str = "gzip, deflate",
    ) -> ByteStream:
        limit = self._timeout if timeout is None else checked_timeout(timeout)
        url = self.base_url + path
        headers = {"Accept-Encoding": encoding}
        if body is not None:
            headers["Content-Type"] = "application/json"
        started = time.monotonic()
        try:
            response = self._session.request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=(min(limit, CONNECT_TIMEOUT), limit),
                stream=True,
                allow_redirects=False,
                proxies=self._proxies,
                verify=self._verify,
            )
        except requests.RequestException as error:
            raise _connection_error(error, self.base_url, limit) from error
        answer = ByteStream(response, self.base_url, limit, started)
        if response.status_code != 200:
            with answer:
                raise status_error(response.status_code, response.headers, answer.read_error())
        return answer


class ByteStream:
    """The body of an answer, piece by piece as the network delivers it; closable."""

    def __init__(
        self, response: requests.Response, base_url: str, timeout: float, started: float
    ) -> None:
        self._response = response
        self._base_url = base_url
        self._timeout = timeout
        self._started = started
        self._reading = threading.RLock()
        self.closed = False
        self.request_id: str | None = response.headers.get("x-request-id")

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        """Yield pieces until the end; each may take up to the timeout to arrive."""
        while not self.closed:
            try:
                with self._reading:
                    # read1 returns what is there; read would wait until a whole block is.
                    piece = self._response.raw.read1(_PIECE, decode_content=True)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if self.closed:  # by another thread, which is no fault
                    return
                raise _connection_error(error, self._base_url, self._timeout) from error
            if not piece:
                return
            yield piece

    def read_all(self) -> bytes:
        """Return the whole body; the timeout bounds the request as a whole."""
        body = bytearray()
        for piece in self:
            body += piece
            if time.monotonic() - self._started > self._timeout:
                raise _timed_out(self._base_url, self._timeout)
        return bytes(body)

    def read_error(self) -> bytes:
        """Return the body of an error, or what of it arrived: the status matters more."""
        try:
            return self.read_all()
        except APIConnectionError:
            return b""

    def finish(self) -> None:
        """Read the last bytes of a complete answer, so that its connection is used again.

        A server that sends nothing more and keeps the connection open is not waited for.
        """
        sock = getattr(self._response.raw.connection, "sock", None)
        if sock is not None:
            sock.settimeout(_LAST_BYTES_TIMEOUT)
        with contextlib.suppress(APIConnectionError):
            for _ in self:
                pass
        self.close()

    def close(self) -> None:
        """End the answer: the server sees the connection close and stops generating."""
        if self.closed:
            return
        self.closed = True
        # Wakes a thread that waits for the next piece. Closing under its feet instead would
        # tear http.client's state apart, so that waits until the thread has left.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._response.raw.shutdown()
        with self._reading:
            self._response.close()


class _Bearer(AuthBase):
    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def checked_base_url(base_url: str) -> str:
    """Return ``base_url`` without a final slash, with ``/v1`` where it has no path."""
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
    if not api_key:
        return None
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise InvalidArgumentError(
            "api_key holds a space, a line end or a character outside ASCII; such a key cannot "
            "be sent in a header (was it read from a file with its newline?)"
        )
    return api_key


def checked_timeout(timeout: float) -> float:
    """Return the timeout in seconds if it is a positive number."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise InvalidArgumentError(f"timeout={timeout!r} must be a number of seconds above 0")
    return float(timeout)


def status_error(status: int, headers: Mapping[str, str], body: bytes) -> APIStatusError:
    """Return the typed error for an answer other than 200."""
    try:
        value = json.loads(body)
    except ValueError:
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
        retry_after=parse_retry_after(headers.get("retry-after"), headers.get("date")),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _connection_error(error: Exception, base_url: str, timeout: float) -> Exception:
    if _caused_by(error, urllib3.exceptions.ReadTimeoutError):
        return _timed_out(base_url, timeout)
    if isinstance(error, requests.ConnectTimeout):
        return ServerNotReachedError(
            f"cannot reach {base_url}: no connection within {min(timeout, CONNECT_TIMEOUT):g} s"
        )
    if isinstance(error, requests.exceptions.SSLError):
        return APIConnectionError(
            f"cannot reach {base_url} safely: {_reason(error)}; for a certificate of your own "
            "give its file as verify=",
            retryable=False,
        )
    if _caused_by(error, urllib3.exceptions.NewConnectionError):
        return ServerNotReachedError(f"cannot reach {base_url}: {_reason(error)}")
    if isinstance(error, requests.RequestException) and not isinstance(
        error, requests.ConnectionError
    ):
        return InvalidArgumentError(f"cannot send to {base_url}: {error}")
    return APIConnectionError(f"the connection to {base_url} broke off: {_reason(error)}")


def _timed_out(base_url: str, timeout: float) -> APITimeoutError:
    # Not retried: the server is at work on it, and a second copy would slow both down.
    return APITimeoutError(
        f"{base_url} did not answer within timeout={timeout:g} s; raise the timeout or lower "
        "max_tokens",
        retryable=False,
    )


def _caused_by(error: Exception, kind: type[Exception]) -> bool:
    return any(isinstance(link, kind) for link in _chain(error))


def _reason(error: Exception) -> str:
    """Return the operating system's word for what went wrong, not the library's wrapping."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        if isinstance(link, http.client.HTTPException):
            return str(link) or type(link).__name__
    return str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the library's errors and the first that is not one, which caused them.

    Not further: behind it may stand an error that the caller was handling when it called us.
    """
    while error is not None:
        yield error
        if not isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
            return
        error = error.__cause__ or error.__context__


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
