"""How far in time a model can place the frames of videos."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from vllm.model_executor.layers.rotary_embedding import get_rope


def most_seconds(config: Any, window: int) -> float:
    """Return how many seconds all videos of a request may span; infinite where no time is counted.

    Qwen2.5-VL has ``tokens_per_second`` positions for each. ``config`` is transformers', ``window``
    the tokens of the longest request: what is said has positions of its own.
    """
    each = getattr(getattr(config, "vision_config", None), "tokens_per_second", None)
    return math.inf if each is None else float((table_length(config) - window) / each)


def table_length(config: Any) -> int:
    """Return the positions of vLLM's rotary table; one beyond is the engine's end.

    Source: ``get_rope`` and ``MRotaryEmbedding`` of vLLM 0.32.
    """
    text = config.get_text_config()
    factor = signature(get_rope).parameters["mrope_positions_factor"].default
    rope = text.rope_parameters
    if rope["rope_type"] == "yarn":
        return int(rope["original_max_position_embeddings"] * factor * rope["factor"])
    return int(text.max_position_embeddings * factor)
