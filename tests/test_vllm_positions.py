"""The time that videos may span, against vLLM's own rotary tables."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER

pytest.importorskip("vllm")

MROPE = {"mrope_section": [16, 24, 24], "rope_theta": 1e6}
ROPES = [
    MROPE | {"type": "mrope"},  # as published
    MROPE | {"rope_type": "default"},
    MROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1000},
    MROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500},
]


def later(rope: dict[str, Any]) -> Any:
    """The configuration of a small Qwen2.5-VL, as transformers has it."""
    transformers: Any = importlib.import_module("transformers")
    text = {"max_position_embeddings": 3000, "rope_parameters": rope}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config={"tokens_per_second": 2})


@pytest.mark.parametrize("rope", ROPES, ids=["published", "default", "yarn by 2", "yarn by 4"])
def test_the_table_is_as_long_as_vllms(rope: dict[str, Any]) -> None:
    """Whatever stretches it: vLLM makes one from the same configuration."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from qwen2vl_serve.vllm_engine.positions import most_seconds, table_length

    config = later(rope)
    text = config.get_text_config()
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(128, text.max_position_embeddings, rope_parameters=text.rope_parameters)
    assert table_length(config) == len(table.cos_sin_cache)
    assert most_seconds(config, 500) == (len(table.cos_sin_cache) - 500) / 2


def test_models_without_time_have_no_bound() -> None:
    """Qwen2-VL counts frames, which are tokens; a model without a tower sees none."""
    from qwen2vl_serve.vllm_engine.positions import most_seconds

    transformers: Any = importlib.import_module("transformers")
    assert math.isinf(most_seconds(transformers.AutoConfig.from_pretrained(MODEL_FOLDER), 4096))
    assert math.isinf(most_seconds(SimpleNamespace(), 4096))
