"""Run by a test in a process of its own: what vLLM's CPU platform says of quantised layers."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod

GPTQ = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ = {"bits": 4, "group_size": 64, "zero_point": True}
ASKED: dict[str, dict[str, Any]] = {
    "gptq 4": GPTQ,
    "gptq 8": GPTQ | {"bits": 8},
    "gptq 3": GPTQ | {"bits": 3},
    "gptq asymmetric": GPTQ | {"sym": False},
    "gptq ordered": GPTQ | {"desc_act": True},
    "awq 4": AWQ,
    "awq 8": AWQ | {"bits": 8},
}


def says(name: str) -> str:
    """The refusal of a layer that is packed like this, nothing where it is taken."""
    try:
        if name.startswith("awq"):
            AutoAWQConfig.from_config(ASKED[name])
        else:
            AutoGPTQLinearMethod(AutoGPTQConfig.from_config(ASKED[name]))
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def methods() -> list[str]:
    """Names that a checkpoint's ``quant_method`` may have and vLLM reads, of all that there are."""
    # After vLLM: before it, transformers takes packages for usable that are not.
    from transformers.utils.quantization_config import QuantizationMethod

    methods = quantization.QUANTIZATION_METHODS
    known = {name: quantization.get_quantization_config(name) for name in methods}
    names = {*known, *(method.value for method in QuantizationMethod)}
    refused = set(quantization.DEPRECATED_QUANTIZATION_METHODS)

    def taken(name: str) -> bool:
        settings = GPTQ | {"quant_method": name}
        told = (one.override_quantization_method(settings, None) for one in known.values())
        method = next(filter(None, told), name)
        return method in known and method not in refused

    return sorted(filter(taken, names))


def main() -> None:
    for name in ASKED:
        print("SAYS", name, says(name), sep="\t")
    dtypes = AutoAWQConfig.get_supported_act_dtypes() + AutoGPTQConfig.get_supported_act_dtypes()
    print("SAYS", "dtypes", dtypes, sep="\t")
    print("SAYS", "methods", *methods(), sep="\t")


if __name__ == "__main__":
    main()
