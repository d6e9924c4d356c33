"""HTTP over httpx (the extra ``async``): as ``transport``, awaited.

Redirects are not followed: they could carry the key and the pictures to another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

try:
    import httpx
except ImportError as error:  # pragma: no cover  (the tests' environment has it)
    raise ImportError('AsyncClient needs httpx: pip install "httpx>=0.27,<1"') from error

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


class AsyncTransport:
    """Performs flows below ``base_url``, for the tasks of one event loop."""

    def __init__(
        self, base_url: str, api_key: str | None, *, timeout: float, verify: bool | str
    ) -> None:
        self.base_url = checked_base_url(base_url)
        self._timeout = checked_timeout(timeout)
        headers = {"User-Agent": f"qwen2vl-client/{__version__} httpx/{httpx.__version__}"}
        key = checked_api_key(api_key)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        context = trusted(verify)
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                verify=context,
                # A proxy from the environment cannot reach this machine's own loopback.
                trust_env=not is_loopback(self.base_url),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=POOL),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        except (ImportError, ValueError) as error:
            raise InvalidArgumentError(
                f"a proxy of the environment cannot be used: {error}"
            ) from error
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def close(self) -> None:
        """Close the pooled connections."""
        await self._client.aclose()

    async def run(self, flow: Flow[T]) -> T:
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
                outcome = await self._perform(step)
            except ClientError as caught:
                error = caught

    async def _perform(self, step: Step) -> Any:
        match step:
            case Wait():
                return await asyncio.sleep(step.seconds)
            case Alone():
                lock = self._locks.setdefault(step.key, asyncio.Lock())
                async with lock:
                    return await self.run(step.flow)
            case Call(streamed=True):
                # Uncompressed: a compressor holds pieces back.
                return await self._open(step, "identity")
            case Call():
                return await self._whole(step)

    async def _whole(self, call: Call) -> Reply:
        limit = self._limit(call)
        with _bounded(self.base_url, limit):
            async with asyncio.timeout(limit), await self._open(call, "gzip, deflate") as answer:
                raw = await answer.read_all()
        return whole_reply(raw, answer.headers, self.base_url + call.path)

    async def _open(self, call: Call, encoding: str) -> AsyncByteStream:
        limit = self._limit(call)
        headers = {"Accept-Encoding": encoding}
        if call.body is not None:
            headers["Content-Type"] = call.content_type
        try:
            request = self._client.build_request(
                call.method,
                url_of(self.base_url, call),
                content=call.body,
                headers=headers,
                timeout=httpx.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT), pool=None),
            )
            response = await self._client.send(request, stream=True, follow_redirects=False)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _connection_error(error, self.base_url, limit) from error
        answer = AsyncByteStream(response, self.base_url, limit)
        if response.status_code != 200:
            async with answer:
                body = await answer.read_error(limit)
            raise status_error(response.status_code, response.headers, body)
        return answer

    def _limit(self, call: Call) -> float:
        return self._timeout if call.timeout is None else checked_timeout(call.timeout)


class AsyncByteStream:
    """The body of an answer, piece by piece as the network delivers it; closable."""

    def __init__(self, response: httpx.Response, base_url: str, timeout: float) -> None:
        self._response = response
        self._pieces = response.aiter_bytes()
        self._base_url = base_url
        self._timeout = timeout
        self.closed = False
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def __aenter__(self) -> AsyncByteStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield pieces until the end; each may take up to the timeout to arrive."""
        while not self.closed:
            try:
                piece = await anext(self._pieces, b"")
            except (httpx.HTTPError, httpx.StreamError, OSError, RuntimeError) as error:
                if self.closed:  # by another task, which is no fault
                    return
                raise _connection_error(error, self._base_url, self._timeout) from error
            if not piece:
                return
            yield piece

    async def read_all(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self])

    async def read_error(self, timeout: float) -> bytes:
        """Return the body of an error, or what of it arrived: the status matters more."""
        body = bytearray()
        with contextlib.suppress(APIConnectionError, TimeoutError):
            async with asyncio.timeout(timeout):
                async for piece in self:
                    body += piece
        return bytes(body)

    async def finish(self) -> None:
        """Read the last bytes of a complete answer, so that its connection is used again.

        A server that sends nothing more and keeps the connection open is not waited for.
        """
        await self.read_error(LAST_BYTES_TIMEOUT)
        await self.close()

    async def close(self) -> None:
        """End the answer: the server sees the connection close and stops generating."""
        if self.closed:
            return
        self.closed = True
        await self._response.aclose()


@contextlib.contextmanager
def _bounded(base_url: str, limit: float) -> Iterator[None]:
    """Turn the end of ``asyncio.timeout`` into our error."""
    started = time.monotonic()
    try:
        yield
    except TimeoutError as error:
        # One that came sooner is not ours, but the operating system's.
        if time.monotonic() - started < limit:
            raise APIConnectionError(f"the connection to {base_url} broke off: {error}") from error
        raise timed_out(base_url, limit) from error


def _connection_error(error: Exception, base_url: str, timeout: float) -> ClientError:
    reason = _reason(error)
    match error:
        case httpx.ConnectTimeout():
            return no_connection(base_url, timeout)
        case httpx.TimeoutException():
            return timed_out(base_url, timeout)
        case httpx.ConnectError() if _caused_by_tls(error):
            return untrusted(base_url, reason)
        case httpx.ConnectError():
            return ServerNotReachedError(f"cannot reach {base_url}: {reason}")
        case httpx.InvalidURL() | httpx.UnsupportedProtocol() | httpx.LocalProtocolError():
            return InvalidArgumentError(f"cannot send to {base_url}: {error}")
        case _:
            return APIConnectionError(f"the connection to {base_url} broke off: {reason}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # Of the libraries' own errors the context as well; behind another's may stand an error
        # that the caller was handling when it called us.
        library = type(error).__module__.startswith("http")
        error = error.__cause__ or (error.__context__ if library else None)


def _caused_by_tls(error: Exception) -> bool:
    return any(isinstance(link, ssl.SSLError) for link in _chain(error))


def _reason(error: Exception) -> str:
    """Return the operating system's word for what went wrong, not the library's wrapping."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.strerror:
            told = link.strerror.startswith("Connect call failed")  # asyncio's, with an address
            return os.strerror(link.errno) if told and link.errno else link.strerror
    return str(error) or type(error).__name__
