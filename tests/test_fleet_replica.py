"""Replicas and gateway without Ray between them: our application asked by messages."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.errors import EngineUnavailable
from qwen2vl_serve.fleet import replica
from qwen2vl_serve.fleet.asking import Ask, Messages
from qwen2vl_serve.fleet.gateway import Gateway
from qwen2vl_serve.fleet.replica import Replica
from qwen2vl_serve.profile import load_profile

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replica writes into its process's environment is no other test's."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def chat(words: str, **fields: Any) -> Ask:
    body = {"messages": [{"role": "user", "content": words}], **fields}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
        "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    return Ask("", scope, json.dumps(body).encode())


@asynccontextmanager
async def started(folder: Path, name: str = "one", *settings: str) -> AsyncIterator[Replica]:
    profile = load_profile("demo", [f"files.folder={folder}", *settings])
    one = Replica(profile, name, "tests.fleet_engine")
    await one.start()
    try:
        yield one
    finally:
        await one.close()


def with_replica(folder: Path, do: Callable[[Replica], Awaitable[None]]) -> None:
    async def run() -> None:
        async with started(folder) as one:
            await do(one)

    asyncio.run(run())


def test_it_starts_its_engine_beside_others_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs it is bound to none of them: vLLM's choice would be the same for each."""
    variable = "VLLM_CPU_OMP_THREADS_BIND"
    os.environ.pop(variable, None)
    monkeypatch.setattr("qwen2vl_serve.machine.installed.vllm_build", lambda: "cpu")

    async def do(_: Replica) -> None:
        assert os.environ[variable] == "nobind"

    with_replica(tmp_path, do)


def test_an_answer_comes_as_messages_with_the_replicas_name(tmp_path: Path) -> None:
    """First status 200 with ``x-qwen2vl-replica``, then the body of a chat's answer."""

    async def do(one: Replica) -> None:
        said = [message async for batch in one.answer(chat("Hello")) for message in batch]
        assert said[0]["status"] == 200
        assert dict(said[0]["headers"])[b"x-qwen2vl-replica"] == b"one"
        answer = json.loads(b"".join(message["body"] for message in said[1:]))
        assert answer["choices"][0]["message"]["content"].startswith("miss")

    with_replica(tmp_path, do)


def test_closing_an_answer_ends_its_generation(tmp_path: Path) -> None:
    """As a client's leaving does: nothing runs on, and the log has 499."""

    async def do(one: Replica) -> None:
        async with aclosing(one.answer(chat("long", stream=True))) as batches:
            await anext(batches)
        assert one.app is not None
        api = one.app.state.api
        assert (api.engine.running, len(api.calls)) == (0, 0)
        assert b'status="499"} 1.0' in api.metrics.text()

    with_replica(tmp_path, do)


def test_a_lost_engine_fails_the_check_and_ends_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that Ray starts another; streams end with the error, new requests are refused."""
    monkeypatch.setattr(replica, "WATCH_SECONDS", 0.02)

    async def do(one: Replica) -> None:
        assert one.app is not None
        await one.check()
        async with aclosing(one.answer(chat("long", stream=True))) as batches:
            await anext(batches)
            one.app.state.api.engine.dead = True
            rest = [message async for batch in batches for message in batch]
        assert b"engine_unavailable" in rest[-1]["body"]
        with pytest.raises(EngineUnavailable):
            await one.check()
        said = [message async for batch in one.answer(chat("Hello")) for message in batch]
        assert said[0]["status"] == 503

    with_replica(tmp_path, do)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_hung_engine_fails_the_check_where_it_is_to_be_replaced(
    tmp_path: Path, *, replaced: bool
) -> None:
    """By ``server.exit_on_hang``; without it only readiness turns red, until the engine moves."""

    async def run() -> None:
        async with started(tmp_path, "one", f"server.exit_on_hang={replaced}".lower()) as one:
            assert one.app is not None
            pulse = one.app.state.api.pulse
            pulse.stalled = 1e9
            ready = {**chat("").scope, "method": "GET", "path": "/health/ready"}
            if replaced:
                with pytest.raises(EngineUnavailable):
                    await one.check()
            else:
                await one.check()
            said = [m async for batch in one.answer(Ask("", ready, b"")) for m in batch]
            assert said[0]["status"] == 503

    asyncio.run(run())


def test_its_processes_meet_in_a_folder_that_goes_with_it(tmp_path: Path) -> None:
    """As one server's: each start would leave sockets in the folder for temporary files."""
    os.environ.pop("VLLM_RPC_BASE_PATH", None)
    sockets: list[Path] = []

    async def do(_: Replica) -> None:
        sockets.append(Path(os.environ["VLLM_RPC_BASE_PATH"]))
        assert sockets[0].is_dir()

    with_replica(tmp_path, do)
    assert not sockets[0].exists()


def test_the_gateway_shows_the_figures_of_all(tmp_path: Path) -> None:
    """Two replicas, each asked by name, and the gateway's own."""

    async def run() -> None:
        async with started(tmp_path, "one") as one, started(tmp_path, "two") as two:
            there = {"one": one, "two": two}

            async def answers(ask: Ask) -> AsyncGenerator[Messages, None]:
                async with aclosing(there[ask.replica or "one"].answer(ask)) as batches:
                    async for batch in batches:
                        yield batch

            gateway = Gateway(load_profile("demo"), Keys(), answers, lambda: list(there))
            transport = httpx.ASGITransport(app=gateway.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                assert (await http.post(CHAT, json=HELLO)).status_code == 200
                page = (await http.get("/metrics")).text
        for name in ("one", "two", "gateway"):
            assert f'qwen2vl_requests_in_flight{{replica="{name}"}}' in page

    asyncio.run(run())
