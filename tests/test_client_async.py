"""AsyncClient: the same calls as Client, awaited, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qwen2vl_client
from qwen2vl_client import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    InvalidArgumentError,
    RateLimitError,
    ServerError,
    ServerNotReachedError,
    Usage,
)
from qwen2vl_client.async_files import AsyncFiles
from qwen2vl_client.async_stream import AsyncTextStream
from qwen2vl_client.files import Files
from qwen2vl_client.stream import TextStream

from tests import stub_server as stub
from tests.test_client_transport import certificate  # noqa: F401  (a fixture)

CLIENTS = Path(qwen2vl_client.__file__).parents[1]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    for name in ("QWEN2VL_BASE_URL", "QWEN2VL_API_KEY", *proxies):
        monkeypatch.delenv(name, raising=False)


@contextlib.asynccontextmanager
async def asking(
    *script: stub.Step, timeout: float = 60, max_retries: int = 2, api_key: str | None = None
) -> AsyncIterator[tuple[AsyncClient, stub.Stub]]:
    with stub.running(*script) as server:
        async with AsyncClient(
            server.url, api_key, "stub-model", timeout=timeout, max_retries=max_retries
        ) as client:
            yield client, server


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test's coroutine on an event loop of its own."""

    def run(*given: Any, **named: Any) -> None:
        asyncio.run(test(*given, **named))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def shape(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
    """Public names of a class, with the parameters of its methods."""
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, member in inspect.getmembers(kind):
        if name.startswith("_") and name != "__init__":
            continue
        parameters = inspect.signature(member).parameters.values() if callable(member) else ()
        found[name] = [(one.name, one.kind, one.default) for one in parameters]
    return found


@pytest.mark.parametrize(
    ("blocking", "awaiting"),
    [(Client, AsyncClient), (Files, AsyncFiles), (TextStream, AsyncTextStream)],
)
def test_both_have_the_same_methods_and_parameters(blocking: type, awaiting: type) -> None:
    """Names, kinds and defaults; ``Flows`` behind both are one."""
    theirs, ours = shape(blocking), shape(awaiting)
    if blocking is not Client:  # their constructors take the transport itself
        del theirs["__init__"], ours["__init__"]
    assert ours == theirs
    assert len(ours) >= 3


def test_every_field_of_the_server_has_a_typed_keyword() -> None:
    """A type checker finds all but messages, model and stream in ``ChatFields``."""
    from qwen2vl_serve.protocol.chat import ChatRequest

    named = set(qwen2vl_client.ChatFields.__annotations__)
    assert set(ChatRequest.model_fields) - {"messages", "model", "stream"} <= named


def test_without_httpx_the_rest_works_and_the_name_says_what_is_missing() -> None:
    """The base needs requests only."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['httpx'] = None\n"
        "import qwen2vl_client\n"
        "try: qwen2vl_client.AsyncClient\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(CLIENTS)], capture_output=True, text=True, check=True
    )
    assert "AsyncClient needs httpx" in done.stdout
    assert 'pip install "httpx' in done.stdout


@awaited
async def test_a_call_is_the_one_that_client_makes() -> None:
    """The two send the same body and read the same answer."""
    async with asking(stub.completion("一个红色的圆。"), api_key="sk-1") as (client, server):
        with Client(server.url, "sk-1", "stub-model") as other:
            theirs = await asyncio.to_thread(other.chat, "x", images=b"\xff\xd8\xffjpeg", seed=7)
        ours = await client.chat("x", images=b"\xff\xd8\xffjpeg", seed=7)
        first, second = server.requests
    assert first.body == second.body
    assert second.headers["authorization"] == "Bearer sk-1"
    assert second.headers["content-type"] == "application/json"
    assert "sk-1" not in repr(client)
    assert replace(ours, seconds=theirs.seconds) == theirs, "timings are not compared"
    assert ours.raw == theirs.raw
    assert (ours.text, ours.usage) == ("一个红色的圆。", Usage(30, 5, 35))
    assert ours.request_id == stub.REQUEST_ID
    assert 0 < ours.timings.total < 60


@awaited
async def test_many_tasks_share_a_client_and_ask_for_the_model_once() -> None:
    """Fifty calls at once, and ``client.model`` after them, cost one GET of the list."""
    with stub.running(stub.completion()) as server:
        async with AsyncClient(server.url) as client:
            answers = await asyncio.gather(*(client.chat("x") for _ in range(50)))
            assert await client.model == "stub-model"
    assert len(answers) == 50
    assert sum(request.method == "GET" for request in server.requests) == 1


@awaited
async def test_one_connection_serves_many_calls() -> None:
    """Whole answers, errors and streams leave their connection to the next call."""
    script = [
        stub.completion(),
        stub.failure(400),
        stub.events(stub.whole_stream("a")),
        stub.completion(),
    ]
    async with asking(*script) as (client, server):
        await client.chat("1")
        with pytest.raises(BadRequestError):
            await client.chat("2")
        stream = await client.stream("3")
        assert [text async for text in stream] == ["a"]
        await client.chat("4")
    assert len({request.connection for request in server.requests}) == 1


@awaited
async def test_a_stream_is_read_as_it_comes_and_kept_whole() -> None:
    """``answer`` raises until the end, then has text, usage and times; ``on_complete`` gets it."""
    chunks: list[str] = []
    async with asking(stub.events(stub.whole_stream("红", "色"), pause=0.02)) as (client, _):
        async with await client.stream("x", on_complete=lambda a: chunks.append(a.text)) as stream:
            with pytest.raises(APIResponseError, match="not ended"):
                stream.answer  # noqa: B018  (the property raises)
            assert [text async for text in stream] == ["红", "色"]
        assert stream.answer.text == stream.text == "红色" == chunks[0]
        timings = stream.answer.timings
    assert stream.answer.usage == Usage(30, 5, 35)
    assert timings.first_token is not None
    assert 0 < timings.first_token < timings.total


@awaited
async def test_leaving_closing_and_cancelling_end_the_generation() -> None:
    """In each way the server sees the connection close."""

    async def leave(client: AsyncClient) -> None:
        async for _ in await client.stream("x"):
            break

    async def close(client: AsyncClient) -> None:
        stream = await client.stream("x")
        closing: list[asyncio.Future[None]] = []
        async for _ in stream:
            if not closing:
                closing.append(asyncio.ensure_future(stream.close()))
        await closing[0]

    async def cancel(client: AsyncClient) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async with await client.stream("x") as stream:
                async for _ in stream:
                    begun.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    for way in (leave, close, cancel):
        async with asking(stub.endless_events) as (client, server):
            await way(client)
            assert await asyncio.to_thread(server.client_left.wait, 60), way.__name__


@awaited
async def test_closing_wakes_a_task_that_waits_for_the_next_piece() -> None:
    """Its loop ends without an error and with the text so far, though the server sends no more."""
    async with asking(stub.stalled_events) as (client, _):
        stream = await client.stream("x")

        read: list[str] = []

        async def reads() -> None:
            async for text in stream:
                read.append(text)  # noqa: PERF401  # others look at it meanwhile

        reading = asyncio.create_task(reads())
        async with asyncio.timeout(60):
            while not read:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await stream.close()
        await asyncio.wait_for(reading, 50)
        assert read == ["word"]


@awaited
async def test_a_stream_that_breaks_off_is_an_error() -> None:
    """The loop raises ``APIConnectionError``; ``text`` keeps what had come before."""
    async with asking(stub.events([stub.chunk("a")], ends=False)) as (client, _):
        stream = await client.stream("x")
        with pytest.raises(APIConnectionError):
            [text async for text in stream]
        assert stream.text == "a"


@awaited
async def test_a_passing_fault_is_tried_again_and_retry_after_waited_for() -> None:
    """A 503 with ``Retry-After: 1`` is repeated after 1 s at the soonest, a lost connection too."""
    script = [stub.failure(503, retry_after="1"), stub.drop, stub.completion("at last")]
    async with asking(*script) as (client, server):
        assert (await client.chat("x")).text == "at last"
    times = [request.at for request in server.requests]
    assert times[1] - times[0] >= 1


@awaited
async def test_errors_have_the_types_of_the_blocking_client() -> None:
    """With code, param and request id; a body that is cut and a redirect are errors as well."""
    cases = [(400, BadRequestError), (401, AuthenticationError), (429, RateLimitError)]
    for status, kind in cases:
        async with asking(stub.failure(status), max_retries=0) as (client, _):
            with pytest.raises(kind) as caught:
                await client.chat("x")
        assert (caught.value.code, caught.value.param) == ("some_code", "messages")
        assert caught.value.request_id == stub.REQUEST_ID
    async with asking(stub.cut_body, max_retries=0) as (client, _):
        with pytest.raises(APIConnectionError, match="broke off"):
            await client.chat("x")
    async with asking(stub.answer(307, {}, location="http://x/"), max_retries=0) as (client, _):
        with pytest.raises(Exception, match="redirects are not followed"):
            await client.chat("x")


@awaited
async def test_nothing_listening_is_told_in_plain_words() -> None:
    """The system's own words; ``health`` and ``ready`` are False and do not raise."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port}/v1", model="m", max_retries=0) as client:
        with pytest.raises(ServerNotReachedError, match="Connection refused"):
            await client.chat("x")
        assert not await client.health()
        assert not await client.ready()


@awaited
async def test_the_timeout_bounds_an_attempt_as_a_whole_and_is_not_retried() -> None:
    """Silence and an answer that drips both end at ``timeout``; a second copy would add load."""
    for step in (stub.silent(600), stub.dripping(0.05)):
        async with asking(step) as (client, server):
            started = time.monotonic()
            with pytest.raises(APITimeoutError, match=r"timeout=0\.4 s"):
                await client.chat("x", timeout=0.4)
            assert time.monotonic() - started > 0.3
        assert len(server.requests) <= 1, "none where the machine stood still"


@awaited
async def test_an_authority_of_one_s_own_can_be_named(certificate: Path) -> None:  # noqa: F811
    """``verify`` takes its file; without it the call fails and the error names ``verify=``."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with stub.running(stub.completion("safe"), tls=context) as server:
        async with AsyncClient(server.url, model="m", verify=str(certificate)) as client:
            assert (await client.chat("x")).text == "safe"
        async with AsyncClient(server.url, model="m") as client:
            with pytest.raises(APIConnectionError, match="verify="):
                await client.chat("x")


@awaited
async def test_health_tells_and_does_not_raise() -> None:
    """True for a 200, False for a 503 that is not tried again; asked at the server's root."""
    async with asking(stub.answer(200, {"status": "live"}), stub.failure(503)) as (client, server):
        assert await client.health()
        assert not await client.ready()
    assert [request.path for request in server.requests] == ["/health/live", "/health/ready"]


@awaited
async def test_a_call_that_cannot_be_sent_is_refused_here() -> None:
    """Nothing to ask, a NaN, ``ftp://``, a missing certificate: our own error, and no request."""
    async with asking(stub.completion()) as (client, server):
        with pytest.raises(InvalidArgumentError):
            await client.chat()
        with pytest.raises(InvalidArgumentError):
            await client.chat("x", temperature=float("nan"))
        for given in ({"image": "a.jpg"}, {"messages": "hi"}, {"messages": ["hi"]}):
            with pytest.raises(InvalidArgumentError, match=r"use images=|messages"):
                await client.chat("x", **given)  # type: ignore[arg-type]
    assert server.requests == []
    with pytest.raises(InvalidArgumentError):
        AsyncClient("ftp://x")
    with pytest.raises(InvalidArgumentError):
        AsyncClient("https://x", verify="/missing.pem")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_told(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx finds it in the environment, and needs one more package for SOCKS."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(InvalidArgumentError, match="a proxy of the environment"):
        AsyncClient("http://example.org/v1")


@awaited
async def test_a_server_error_ends_the_retries() -> None:
    """With ``max_retries=1`` a 500 is asked for twice, then raised as ``ServerError``."""
    async with asking(stub.failure(500), max_retries=1) as (client, server):
        with pytest.raises(ServerError):
            await client.chat("x")
    assert len(server.requests) == 2
