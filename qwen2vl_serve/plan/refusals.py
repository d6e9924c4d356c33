"""Quantised checkpoints that vLLM 0.32 refuses, on any device or on a CPU, told before it loads.

Tests hold every line against vLLM's own refusal.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_serve.plan.architectures import Quantisation


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is refused, and what to do; ``field`` is the profile's."""

    field: str
    found: str
    mend: str


def refusal(packing: Quantisation, dtype: str, *, on_cards: bool) -> Refusal | None:
    """Say why vLLM cannot serve weights packed like this under ``dtype``; None when it can.

    Sources: ``_verify_quantization`` in ``config/model.py``, and in ``quantization``
    ``__init__.py``, ``auto_awq.py``, ``auto_gptq.py`` and ``utils/marlin_utils.py``.
    """
    if packing.method not in READ:
        return Refusal(
            "model.model",
            f"weights packed by {packing.method[:40]!r}, which vLLM 0.32 does not read",
            "take an AWQ or GPTQ-Int4 checkpoint",
        )
    method = packing.method.removeprefix("auto_").removesuffix("_marlin")
    if method not in ("awq", "gptq"):
        return None
    name = method.upper()
    if dtype in ("float32", "float"):
        return Refusal(
            "model.dtype",
            f"{dtype}, and {name} is computed in half or bfloat16",
            "set model.dtype=half",
        )
    found = _awq(packing) if method == "awq" else _gptq(packing)
    if found is None and not on_cards and packing.bits != 4:
        found = f"{name} of {packing.bits} bits; vLLM's CPU kernels read 4"
    if found is None:
        return None
    return Refusal("model.model", found, "take an AWQ or GPTQ-Int4 checkpoint")


def mismatch(asked: str | None, packing: Quantisation | None, *, on_cards: bool) -> Refusal | None:
    """Say why weights packed like this are not what ``model.quantization`` asks for.

    Unpacked weights can be packed at load only; packed ones have to be asked for by their own
    name or, on cards, by that of their kernels. Sources: ``_verify_quantization`` in
    ``config/model.py``, ``override_quantization_method`` of ``quantization/auto_awq.py`` and
    ``auto_gptq.py``, ``get_quant_config`` in ``model_loader/weight_utils.py``.
    """
    if asked is None or (packing is None and asked in PACKED_AT_LOAD):
        return None
    if packing is None:
        found = f"{asked}, and the checkpoint's config.json says of no packing"
    else:
        method = packing.method
        names = [method]
        if method == "gptq" or (method == "awq" and on_cards):
            names += [f"{method}_marlin", f"auto_{method}"]
        elif method == "auto-round":  # ``quantization/inc/inc.py``
            names += ["inc"]
        # Of ModelOpt's, config.json does not always tell which.
        if asked in names or (method.startswith("modelopt") and asked.startswith("modelopt")):
            return None
        found = f"{asked}, and the checkpoint is packed by {method}"
    return Refusal("model.quantization", found, "leave it out")


PACKED_AT_LOAD = (
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8",
    "int8_per_channel_weight_only",
)  # fmt: skip
"""Methods that need no packed checkpoint (``_ONLINE_SHORTHANDS`` in ``config/quantization.py``)."""
READ = (
    *PACKED_AT_LOAD, "auto-round", "auto_awq", "auto_gptq", "awq", "awq_marlin",
    "compressed-tensors", "deepseek_v4_fp8", "experts_int8", "gpt_oss_mxfp4", "gptq",
    "gptq_marlin", "humming", "inc", "modelopt", "modelopt_fp4", "modelopt_mixed",
    "modelopt_mxfp8", "moe_wna16", "mxfp4", "nvfp4_per_token", "online", "quark", "torchao",
)  # fmt: skip
"""Methods that a checkpoint may be packed by: bitsandbytes, GGUF and HQQ are none of them."""


def _awq(packing: Quantisation) -> str | None:
    return None if packing.bits == 4 else f"AWQ of {packing.bits} bits; vLLM 0.32 reads 4"


def _gptq(packing: Quantisation) -> str | None:
    if packing.bits not in (4, 8):
        return f"GPTQ of {packing.bits} bits; vLLM 0.32 reads 4 and 8"
    if packing.zeros:
        return "asymmetric GPTQ (sym: false); vLLM 0.32 reads symmetric"
    if packing.ordered and packing.group is not None:
        return f"GPTQ in groups of {packing.group} with desc_act, which vLLM 0.32 no longer reads"
    return None
