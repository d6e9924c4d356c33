"""A checkpoint's config.json, read into an ``Architecture``.

Qwen2-VL and Qwen2.5-VL are what this server serves; Qwen2 and Qwen3 text models and Qwen3-VL are
read as well, so that their memory can be planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2vl_serve.plan.architectures import Architecture, Quantisation, Text, Vision

_QK_NORM = ("qwen3", "qwen3_vl", "qwen3_vl_text")
_NO_MROPE = ("qwen2", "qwen3")
_KNOWN = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")
_DTYPES = {"bfloat16", "float16", "float32"}


def read_architecture(name: str, config: dict[str, Any]) -> Architecture | None:
    """Return the model that a config.json describes; None where it does not name the sizes."""
    kind = str(config.get("model_type"))
    if kind not in _KNOWN:
        return None
    text = _object(config, "text_config") or config
    try:
        language = _text(kind, config, text)
        vision = None
        if kind not in _NO_MROPE:
            vision = _vision(kind, _object(config, "vision_config"), language.hidden)
        packing = quantisation_of(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    dtype = dtype.removeprefix("torch.")
    return Architecture(
        name, language, vision, packing, dtype if dtype in _DTYPES else "bfloat16", kind
    )


def quantisation_of(config: dict[str, Any]) -> Quantisation | None:
    """Read ``quantization_config``.

    Raises:
        ValueError: numbers that are none.
    """
    settings = _object(config, "quantization_config")
    method = str(settings.get("quant_method") or "").lower()
    if not method:
        return None
    group = int(settings.get("group_size") or 0)
    bits = int(settings.get("bits") or settings.get("w_bit") or 0)
    skipped = [str(part) for part in settings.get("ignore") or ()]
    skipped += [str(part) for part in settings.get("modules_to_not_convert") or ()]
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        first = next(iter(groups.values())) if isinstance(groups, dict) and groups else {}
        weights = _object(first, "weights")
        bits = int(weights.get("num_bits") or 8)
        group = int(weights.get("group_size") or 0)
    if "fp8" in method:
        bits = 8
    zeros = method == "awq" and settings.get("zero_point", True) is not False
    if method.startswith("gptq"):
        zeros = settings.get("sym", True) is False
    # AutoAWQ and AutoGPTQ pack the text model alone; other tools pack what they do not skip.
    vision = method not in ("awq", "gptq", "gptq_marlin", "awq_marlin") and not any(
        "visual" in part for part in skipped
    )
    ordered = settings.get("desc_act") is True
    return Quantisation(method, bits or 4, group if group > 0 else None, zeros, vision, ordered)


def _text(kind: str, config: dict[str, Any], text: dict[str, Any]) -> Text:
    heads = int(text["num_attention_heads"])
    hidden = int(text["hidden_size"])
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return Text(
        hidden=hidden,
        intermediate=int(text["intermediate_size"]),
        layers=int(text["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        vocabulary=int(text["vocab_size"]),
        tied=bool(tied),
        positions=positions_of(text, 32_768),
        qkv_bias=kind not in _QK_NORM,
        qk_norm=kind in _QK_NORM,
        mrope=kind not in _NO_MROPE,
    )


def positions_of(text: Mapping[str, Any], known: int) -> int:
    """Return the longest context that settings of a text model allow, ``known`` where unsaid.

    Source: ``_get_and_verify_max_len`` in vLLM's ``config/model.py``: YaRN multiplies the original.

    Raises:
        TypeError, ValueError: numbers that are none.
    """
    positions = int(text.get("max_position_embeddings") or known)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return int(float(original) * float(rope.get("factor") or 1))


def _vision(kind: str, vision: dict[str, Any], hidden: int) -> Vision:
    """Fill what is left out with the defaults of transformers' configuration classes."""
    if kind == "qwen3_vl":
        return Vision(
            depth=int(vision.get("depth") or 27),
            embed=int(vision.get("hidden_size") or 1152),
            heads=int(vision.get("num_heads") or 16),
            intermediate=int(vision.get("intermediate_size") or 4304),
            out=int(vision.get("out_hidden_size") or hidden),
            gated=False,
            patch=int(vision.get("patch_size") or 16),
            positions=int(vision.get("num_position_embeddings") or 2304),
            deep_mergers=len(vision.get("deepstack_visual_indexes") or (8, 16, 24)),
        )
    gated = kind == "qwen2_5_vl"
    # Qwen2-VL's hidden_size is the text model's; its own width is embed_dim.
    embed = int((vision.get("hidden_size") if gated else vision.get("embed_dim")) or 1280)
    if gated:
        intermediate = int(vision.get("intermediate_size") or 3420)
    else:
        intermediate = int(embed * float(vision.get("mlp_ratio") or 4))
    return Vision(
        depth=int(vision.get("depth") or 32),
        embed=embed,
        heads=int(vision.get("num_heads") or 16),
        intermediate=intermediate,
        out=int(vision.get("out_hidden_size") or hidden) if gated else hidden,
        gated=gated,
        patch=int(vision.get("patch_size") or vision.get("spatial_patch_size") or 14),
        merge=int(vision.get("spatial_merge_size") or 2),
        frames=int(vision.get("temporal_patch_size") or 2),
        channels=int(vision.get("in_channels") or vision.get("in_chans") or 3),
    )


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
