"""What is done around vLLM's start, without an engine."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal.media.base import MediaWithBytes
from vllm.renderers.registry import renderer_from_config

from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.vllm_engine.request import Pixels
from qwen2vl_serve.vllm_engine.start import _behind, freeze_boot
from tests.test_vllm_patches import drawn, lazy


def test_what_the_boot_left_lets_no_garbage_wait() -> None:
    """Beside a million objects of the boot, 150,000 in cycles are looked at, not kept.

    Python would otherwise wait for a quarter, and a server's memory seem to grow for half an hour.
    """
    boot: list[object] = [[] for _ in range(1_000_000)]
    try:
        freeze_boot()
        assert gc.get_freeze_count() > len(boot)
        before = gc.get_stats()[-1]["collections"]
        for _ in range(150_000):
            cycle: list[object] = []
            cycle.append(cycle)
        assert gc.get_stats()[-1]["collections"] > before
    finally:
        gc.unfreeze()


@pytest.fixture(scope="module")
def renderer() -> Any:
    """vLLM's renderer of the demo model once our serving stands behind it, without an engine."""
    profile = load_profile("demo")
    arguments = profile.engine_args()
    del arguments["data_parallel_size"]
    config = AsyncEngineArgs(**arguments).create_engine_config()
    client: Any = SimpleNamespace(
        renderer=renderer_from_config(config),
        model_config=config.model_config,
        vllm_config=config,
        input_processor=None,
        logger_manager=SimpleNamespace(stat_loggers=[]),
    )
    _behind(client, profile)
    yield client.renderer
    client.renderer.shutdown()


def test_the_engines_renderer_takes_pictures_as_they_are(
    renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is served is put in order without Pillow, as ``make_patches`` does it."""
    monkeypatch.setattr(Pixels, "im", property(lambda _: pytest.fail("asked Pillow")))
    prompt = renderer.tokenizer.encode("<|vision_start|><|image_pad|><|vision_end|>")
    picture = MediaWithBytes(lazy([drawn(1, 224, 196)])[0], b"")
    made = renderer._process_multimodal(prompt, {"image": [picture]}, {"image": ["a key"]}, None)
    assert len(made["prompt_token_ids"]) == 2 + 8 * 7


def test_the_last_token_is_known_without_asking(
    renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks for it at every request."""
    kind = type(renderer.tokenizer)
    expected = renderer.tokenizer.eos_token_id
    monkeypatch.setattr(
        kind, "eos_token_id", property(lambda _: pytest.fail("asked")), raising=False
    )
    assert renderer.get_eos_token_id() == expected
