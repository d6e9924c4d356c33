"""A checkpoint's config.json, read into an ``Architecture``.

Qwen2-VL and Qwen2.5-VL are what this server serves; Qwen2 and Qwen3 text models and Qwen3-VL are
read as well, so that their memory can be planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2vl_serve.plan.architectures import Architecture, Quantisation, Text, Vision
from qwen2vl_serve.profile.yaml import shown

_QK_NORM = ("qwen3", "qwen3_vl", "qwen3_vl_text")
_NO_MROPE = ("qwen2", "qwen3")
_KNOWN = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_vl")
_DTYPES = {"bfloat16", "float16", "float32"}
_PACKING = ("quantization_config", "compression_config")


def read_architecture(name: str, config: dict[str, Any]) -> Architecture | None:
    """Return the model that a config.json describes; None where it is of another family.

    Raises:
        ValueError: a size that is missing or none; the text names it and its value.
    """
    kind = str(config.get("model_type"))
    if kind not in _KNOWN:
        return None
    text = _object(config, "text_config") or config
    language = _text(kind, config, text)
    vision = None
    if kind not in _NO_MROPE:
        vision = _vision(kind, _object(config, "vision_config"), language.hidden)
    packing = quantisation_of(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "bfloat16")
    dtype = dtype.removeprefix("torch.")
    return Architecture(
        name, language, vision, packing, dtype if dtype in _DTYPES else "bfloat16", kind
    )


def unpacked(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without what it says of packing."""
    left = {name: value for name, value in config.items() if name not in _PACKING}
    if text := _object(config, "text_config"):
        left["text_config"] = unpacked(text)
    return left


def quantisation_of(config: dict[str, Any]) -> Quantisation | None:
    """Read ``quantization_config``, of the whole model or else of its text model.

    Source: ``get_quantization_config`` in vLLM's ``model_arch_config_convertor.py``.

    Raises:
        ValueError: numbers that are none; the text names them.
    """
    parts = (config, _object(config, "text_config"))
    places = (_object(part, name) for part in parts for name in _PACKING)
    settings = next((place for place in places if place), {})
    method = str(settings.get("quant_method") or "").lower()
    method = method.replace("compressed_tensors", "compressed-tensors")
    if not method:
        return None
    group = _number(settings, "group_size")
    bits = _number(settings, "bits") or _number(settings, "w_bit")
    skipped = [*_parts(settings, "ignore"), *_parts(settings, "modules_to_not_convert")]
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        first = next(iter(groups.values())) if isinstance(groups, dict) and groups else {}
        weights = _object(first, "weights")
        bits = _number(weights, "num_bits") or 8
        group = _number(weights, "group_size")
    if "fp8" in method:
        bits = 8
    zeros = method == "awq" and settings.get("zero_point", True) is not False
    if method.startswith("gptq"):
        zeros = settings.get("sym", True) is False
    # AutoAWQ and AutoGPTQ pack the text model alone; other tools pack what they do not skip, and
    # AutoRound what it names.
    named = settings.get("block_name_to_quantize") or settings.get("to_quant_block_names")
    vision = (
        method not in ("awq", "gptq", "gptq_marlin", "awq_marlin")
        and not any("visual" in part for part in skipped)
        and (not named or "visual" in str(named))
    )
    ordered = settings.get("desc_act") is True
    return Quantisation(method, bits or 4, group if group > 0 else None, zeros, vision, ordered)


def _text(kind: str, config: dict[str, Any], text: dict[str, Any]) -> Text:
    heads = _size(text, "num_attention_heads")
    hidden = _size(text, "hidden_size")
    # One of them is enough (``Qwen2VLConfig`` in transformers).
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    return Text(
        hidden=hidden,
        intermediate=_size(text, "intermediate_size"),
        layers=_size(text, "num_hidden_layers", most=_MOST_LAYERS),
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads", heads),
        head_dim=_size(text, "head_dim", hidden // heads),
        vocabulary=_size(text, "vocab_size"),
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
        ValueError: numbers that are none; the text names them.
    """
    positions = _size(text, "max_position_embeddings", known)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping) or "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return positions
    original = _size(rope, "original_max_position_embeddings", positions)
    return max(1, int(original * _factor(rope, "factor", 1)))


def _vision(kind: str, vision: dict[str, Any], hidden: int) -> Vision:
    """Fill what is left out with the defaults of transformers' configuration classes."""
    if kind == "qwen3_vl":
        return Vision(
            depth=_size(vision, "depth", 27, most=_MOST_LAYERS),
            embed=_size(vision, "hidden_size", 1152),
            heads=_size(vision, "num_heads", 16),
            intermediate=_size(vision, "intermediate_size", 4304),
            out=_size(vision, "out_hidden_size", hidden),
            gated=False,
            patch=_size(vision, "patch_size", 16, most=_MOST_SIDE),
            positions=_size(vision, "num_position_embeddings", 2304),
            deep_mergers=len(_parts(vision, "deepstack_visual_indexes")) or 3,
        )
    gated = kind == "qwen2_5_vl"
    # Qwen2-VL's hidden_size is the text model's; its own width is embed_dim.
    embed = _size(vision, "hidden_size" if gated else "embed_dim", 1280)
    if gated:
        intermediate = _size(vision, "intermediate_size", 3420)
    else:
        intermediate = max(1, int(embed * _factor(vision, "mlp_ratio", 4)))
    return Vision(
        depth=_size(vision, "depth", 32, most=_MOST_LAYERS),
        embed=embed,
        heads=_size(vision, "num_heads", 16),
        intermediate=intermediate,
        out=_size(vision, "out_hidden_size", hidden) if gated else hidden,
        gated=gated,
        patch=_size(vision, "patch_size", _size(vision, "spatial_patch_size", 14), most=_MOST_SIDE),
        merge=_size(vision, "spatial_merge_size", 2, most=_MOST_SIDE),
        frames=_size(vision, "temporal_patch_size", 2, most=_MOST_SIDE),
        channels=_size(vision, "in_channels", _size(vision, "in_chans", 3), most=_MOST_SIDE),
    )


# Beyond what any model has; a sum over so many is no plan of anything.
_MOST_SIZE, _MOST_LAYERS, _MOST_SIDE, _MOST_FACTOR = 10**8, 10_000, 1000, 1000


def _size(
    settings: Mapping[str, Any], name: str, unsaid: int | None = None, *, most: int = _MOST_SIZE
) -> int:
    """Return a whole number from 1 on, ``unsaid`` where it is left out.

    Raises:
        ValueError: another value, or none although there is no default.
    """
    value = settings.get(name)
    if value is None and unsaid:
        return unsaid
    if value is None:
        raise ValueError(f"{name} is missing")
    # transformers refuses "128" and 128.0, too.
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def _factor(settings: Mapping[str, Any], name: str, unsaid: float) -> float:
    value = settings.get(name)
    if value is None:
        return unsaid
    if not isinstance(value, int | float) or not 0 < value <= _MOST_FACTOR:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def _number(settings: Mapping[str, Any], name: str) -> int:
    """Return a whole number, 0 where it is left out."""
    value = settings.get(name)
    if value is None:
        return 0
    try:
        number = int(value)
        whole = number == float(value) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{name} is {shown(value)}")
    return number


def _parts(settings: Mapping[str, Any], name: str) -> list[str]:
    value = settings.get(name) or ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {shown(value)}")
    return [str(part) for part in value]


def _object(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, Mapping) else None
    return value if isinstance(value, dict) else {}
