"""What is held of adapters in vLLM's engine, over a client that counts what it is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2vl_serve.engine import Adapter
from qwen2vl_serve.errors import InvalidValue, ModelNotFound, TooManyItems
from qwen2vl_serve.vllm_engine.adapters import Adapters, places


class Client:
    """vLLM's calls for adapters; ``refuses`` are the paths that it fails on."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.refuses: set[str] = set()

    async def add_lora(self, request: Any) -> bool:
        await asyncio.sleep(0)
        self.loaded[request.lora_int_id] = request.lora_name
        if request.lora_path in self.refuses:
            raise ValueError("vLLM's words")
        return True

    async def remove_lora(self, number: int) -> bool:
        await asyncio.sleep(0)
        return self.loaded.pop(number, None) is not None


def adapter(digest: str = "d1", path: str = "/a") -> Adapter:
    return Adapter(Path(path), 8, None, 1, 0, digest)


def made(room: int = 2) -> tuple[Adapters, Client]:
    client = Client()
    models = SimpleNamespace(lora_requests={}, base_model_paths=[SimpleNamespace(name="base")])
    return Adapters(client, models, 4096, room), client  # type: ignore[arg-type]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_loaded_and_unloaded() -> None:
    """It has the model as parent, and its window; once unloaded the engine holds nothing of it."""

    async def scenario() -> None:
        adapters, client = made()
        model = await adapters.load("ocr", adapter())
        assert (model.id, model.parent, model.max_model_len) == ("ocr", "base", 4096)
        # The content is part of the name that vLLM's caches go by.
        assert list(client.loaded.values()) == ["ocr@d1"]
        await adapters.unload("ocr")
        await settled()
        assert not client.loaded
        assert not adapters.served
        with pytest.raises(ModelNotFound):
            await adapters.unload("ocr")

    asyncio.run(scenario())


def test_one_that_is_used_stays_until_its_last_answer() -> None:
    """No new request gets it once it is unloaded; its room is free only after the last answer."""

    async def scenario() -> None:
        adapters, client = made(room=1)
        await adapters.load("ocr", adapter())
        with adapters.used("ocr") as first, adapters.used("ocr") as second:
            assert first is second
            await adapters.unload("ocr")
            assert not adapters.served
            with adapters.used("ocr") as late:
                assert late is None
            await settled()
            assert list(client.loaded.values()) == ["ocr@d1"]
            with pytest.raises(TooManyItems, match="1 of them until their answers have ended"):
                await adapters.load("other", adapter("d2"))
        await settled()
        assert not client.loaded
        await adapters.load("other", adapter("d2"))

    asyncio.run(scenario())


def test_one_that_is_replaced_serves_those_who_began_with_it() -> None:
    """New requests get the new content at once; the old goes when its last answer has ended."""

    async def scenario() -> None:
        adapters, client = made()
        await adapters.load("ocr", adapter("d1"))
        with adapters.used("ocr") as before:
            await adapters.load("ocr", adapter("d2"))
            with adapters.used("ocr") as after:
                assert before is not None
                assert after is not None
                assert (before.lora_name, after.lora_name) == ("ocr@d1", "ocr@d2")
                assert before.lora_int_id != after.lora_int_id
            assert [one.id for one in adapters.served] == ["ocr"]
        await settled()
        assert list(client.loaded.values()) == ["ocr@d2"]

    asyncio.run(scenario())


def test_one_that_vllm_refuses_leaves_nothing_behind() -> None:
    """vLLM itself keeps a half-loaded adapter in its lists when it fails on the way."""

    async def scenario() -> None:
        adapters, client = made(room=1)
        client.refuses.add("/bad")
        with pytest.raises(InvalidValue, match="vLLM's words"):
            await adapters.load("bad", adapter(path="/bad"))
        assert not client.loaded
        assert not adapters.served
        await adapters.load("good", adapter())

    asyncio.run(scenario())


def test_one_that_vllm_does_not_remove_keeps_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """It may still be in the engine, which would evict another for the next; the log says so."""

    async def scenario() -> None:
        adapters, client = made(room=1)
        await adapters.load("ocr", adapter())
        client.remove_lora = failing  # type: ignore[method-assign]
        await adapters.unload("ocr")
        await settled()
        with pytest.raises(TooManyItems):
            await adapters.load("other", adapter("d2"))

    async def failing(number: int) -> bool:
        raise RuntimeError("vLLM's words")

    asyncio.run(scenario())
    assert "vLLM did not remove the adapter ocr: its place stays taken" in caplog.text
    assert "vLLM's words" in caplog.text


def test_loads_at_the_same_time_share_the_room() -> None:
    """Of five at once with room for two, three are refused, so that vLLM evicts none."""

    async def scenario() -> None:
        adapters, client = made(room=2)
        loads = [adapters.load(f"a{n}", adapter(f"d{n}")) for n in range(5)]
        done = await asyncio.gather(*loads, return_exceptions=True)
        assert sum(isinstance(one, TooManyItems) for one in done) == 3
        assert len(client.loaded) == 2

    asyncio.run(scenario())


def test_on_a_cpu_a_place_stays_empty() -> None:
    """There vLLM computes with the last place for requests that name no adapter."""
    assert places(3) == {"max_loras": 4, "max_cpu_loras": 4}
    assert places(0) == {}
