"""The parts of a model that vLLM 0.32 applies a LoRA to, by their names, and their sizes.

Names: transformers renamed the parts in 4.52 (``model.layers`` → ``model.language_model.layers``,
``visual`` → ``model.visual``); adapters of both times are met. vLLM's ``Qwen2VLForConditional-
Generation`` declares no embedding modules, so that neither ``lm_head`` nor ``embed_tokens`` is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2vl_serve.checkpoints.checkpoint import text_config

_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.)"
    r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)"
)
_VISION = re.compile(r"(?:model\.)?visual\.(?:blocks\.(\d+)|merger)\.(attn|mlp)\.(\w+)")

Size = tuple[int, int]
"""Inputs and outputs of a linear layer."""


@dataclass(frozen=True)
class Sizes:
    """A model's linear layers: how many blocks, and the size of each layer by its short name."""

    layers: int
    text: Mapping[str, Size]
    depth: int
    vision: Mapping[str, Size]
    merger: Mapping[str, Size]

    def of(self, name: str) -> Size | None:
        """Return the size of a part by its whole name; None for one that is not adapted."""
        if found := _TEXT.fullmatch(name):
            return self.text.get(found[2]) if int(found[1]) < self.layers else None
        if found := _VISION.fullmatch(name):
            number, inner, short = found.groups()
            if number is None:
                return self.merger.get(f"{inner}.{short}")
            return self.vision.get(f"{inner}.{short}") if int(number) < self.depth else None
        return None


def sizes_of(config: Mapping[str, Any]) -> Sizes | None:
    """Read the sizes from a config.json; None when it does not name them."""
    try:
        return _sizes_of(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _sizes_of(config: Mapping[str, Any]) -> Sizes:
    text, vision = text_config(dict(config)), dict(config.get("vision_config") or {})
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    width = int(text.get("head_dim") or hidden // heads)
    inner = int(text["intermediate_size"])
    queries, keys = heads * width, int(text.get("num_key_value_heads") or heads) * width
    gated = config.get("model_type") == "qwen2_5_vl"
    embed = int(vision.get("hidden_size" if gated else "embed_dim") or 1280)
    merge = embed * int(vision.get("spatial_merge_size") or 2) ** 2
    if gated:
        wide = int(vision.get("intermediate_size") or 3420)
        mlp = {"gate_proj": (embed, wide), "up_proj": (embed, wide), "down_proj": (wide, embed)}
    else:
        wide = embed * int(vision.get("mlp_ratio") or 4)
        mlp = {"fc1": (embed, wide), "fc2": (wide, embed)}
    return Sizes(
        layers=int(text["num_hidden_layers"]),
        text={
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        },
        depth=int(vision.get("depth") or 32),
        vision={
            "attn.qkv": (embed, 3 * embed),
            "attn.proj": (embed, embed),
            **{f"mlp.{name}": size for name, size in mlp.items()},
        },
        merger={"mlp.0": (merge, merge), "mlp.2": (merge, hidden)},
    )
