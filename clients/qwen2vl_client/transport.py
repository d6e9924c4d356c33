"""HTTP over requests: one pooled session, typed errors, timeouts.

Redirects are not followed: they could carry the key and the pictures to another host.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import weakref
from collections.abc import Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError

from qwen2vl_client.checks import (
    CONNECT_TIMEOUT,
    LAST_BYTES_TIMEOUT,
    POOL,
    checked_api_key,
    checked_base_url,
    checked_timeout,
    is_loopback,
    no_connection,
    status_error,
    timed_out,
    trusted,
    untrusted,
    url_of,
    whole_reply,
)
from qwen2vl_client.errors import (
    APIConnectionError,
    ClientError,
    InvalidArgumentError,
    ServerNotReachedError,
)
from qwen2vl_client.steps import Alone, Call, Flow, Reply, Step, T, Wait
from qwen2vl_client.version import __version__

_PIECE = 65536


class Transport:
    """Performs flows below ``base_url``; may be used by several threads at once."""

    def __init__(
        self, base_url: str, api_key: str | None, *, timeout: float, verify: bool | str
    ) -> None:
        self.base_url = checked_base_url(base_url)
        self._timeout = checked_timeout(timeout)
        self._session = requests.Session()
        adapter = _Adapter(pool_connections=1, pool_maxsize=POOL)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        # With an auth object in place requests does not look for a password in ~/.netrc.
        self._session.auth = _Bearer(checked_api_key(api_key))
        # Given with each request: as the session's it would yield to REQUESTS_CA_BUNDLE.
        trusted(verify)  # what cannot be read is told now, and not in requests' own words
        self._verify = verify
        self._session.headers["User-Agent"] = (
            f"qwen2vl-client/{__version__} requests/{requests.__version__}"
        )
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # A proxy from the environment cannot reach this machine's own loopback.
        host = urlsplit(self.base_url).hostname or ""
        self._proxies = {"no_proxy": host} if is_loopback(self.base_url) else None
        self._locks: weakref.WeakValueDictionary[str, threading.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._locking = threading.Lock()

    def close(self) -> None:
        """Close the pooled connections."""
        self._session.close()

    def run(self, flow: Flow[T]) -> T:
        """Perform the flow's steps and return its result."""
        outcome: Any = None
        error: ClientError | None = None
        while True:
            try:
                step = flow.send(outcome) if error is None else flow.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = error = None
            try:
                outcome = self._perform(step)
            except ClientError as caught:
                error = caught

    def _perform(self, step: Step) -> Any:
        match step:
            case Wait():
                return time.sleep(step.seconds)
            case Alone():
                with self._locking:
                    lock = self._locks.setdefault(step.key, threading.Lock())
                with lock:
                    return self.run(step.flow)
            case Call(streamed=True):
                # Uncompressed: a compressor holds pieces back.
                return self._open(step, "identity")
            case Call():
                return self._whole(step)

    def _whole(self, call: Call) -> Reply:
        with self._open(call, "gzip, deflate") as answer:
            return whole_reply(answer.read_all(), answer.headers, self.base_url + call.path)

    def _open(self, call: Call, encoding: str) -> ByteStream:
        limit = self._timeout if call.timeout is None else checked_timeout(call.timeout)
        headers = {"Accept-Encoding": encoding}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        started = time.monotonic()
        try:
            response = self._session.request(
                call.method,
                url_of(self.base_url, call),
                data=call.body,
                headers=headers,
                timeout=limit,
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
        self.headers = {name.lower(): value for name, value in response.headers.items()}

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
        return b"".join(self._in_time())

    def read_error(self) -> bytes:
        """Return the body of an error, or what of it arrived: the status matters more."""
        body = bytearray()
        with contextlib.suppress(APIConnectionError):
            for piece in self._in_time():
                body += piece
        return bytes(body)

    def _in_time(self) -> Iterator[bytes]:
        for piece in self:
            yield piece
            if time.monotonic() - self._started > self._timeout:
                raise timed_out(self._base_url, self._timeout)

    def finish(self) -> None:
        """Read the last bytes of a complete answer, so that its connection is used again.

        A server that sends nothing more and keeps the connection open is not waited for.
        """
        sock = getattr(self._response.raw.connection, "sock", None)
        if sock is not None:
            sock.settimeout(LAST_BYTES_TIMEOUT)
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


class _Connection(HTTPConnection):
    """Has ``CONNECT_TIMEOUT`` for connecting, and the request's own timeout for sending.

    urllib3 sends all of a body within the timeout for connecting, too short for a large picture
    on a slow line.
    """

    def connect(self) -> None:
        limit = self.timeout
        self.timeout = CONNECT_TIMEOUT if limit is None else min(limit, CONNECT_TIMEOUT)
        try:
            super().connect()
        except TimeoutError as error:  # of TLS; urllib3 takes it for an answer that did not come
            raise ConnectTimeoutError(self, str(error)) from error
        finally:
            self.timeout = limit
        self.sock.settimeout(limit)


class _SecureConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    """Makes connections of our own, directly and through a proxy."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # which has connections of its own
            manager.pool_classes_by_scheme = _POOLS
        return manager


_POOLS = {"http": _Pool, "https": _SecurePool}


class _Bearer(AuthBase):
    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def _connection_error(error: Exception, base_url: str, timeout: float) -> Exception:
    if _caused_by(error, urllib3.exceptions.ReadTimeoutError) or _ended_while_sending(error):
        return timed_out(base_url, timeout)
    if isinstance(error, requests.ConnectTimeout):
        return no_connection(base_url, timeout)
    if isinstance(error, requests.exceptions.SSLError):
        return untrusted(base_url, _reason(error))
    if _caused_by(error, urllib3.exceptions.NewConnectionError):
        return ServerNotReachedError(f"cannot reach {base_url}: {_reason(error)}")
    if isinstance(error, requests.RequestException) and not isinstance(
        error, requests.ConnectionError
    ):
        return InvalidArgumentError(f"cannot send to {base_url}: {error}")
    return APIConnectionError(f"the connection to {base_url} broke off: {_reason(error)}")


def _ended_while_sending(error: Exception) -> bool:
    """Tell whether the timeout ended while the body was sent; the system's own has a number."""
    return _caused_by(error, urllib3.exceptions.ProtocolError) and any(
        isinstance(link, TimeoutError) and link.errno is None for link in _chain(error)
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
