"""A LoRA adapter that is to be served with the model."""

from __future__ import annotations

from pathlib import Path

from qwen2vl_serve import checkpoint
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import PreflightError, SetupError


def adapter(world: World) -> Finding:
    """See that a LoRA is whole, and that it trains nothing that vLLM leaves out."""
    folder = world.adapter
    if folder is None:
        return ok("none named")
    try:
        settings = checkpoint.read_json(
            folder / "adapter_config.json", "name the folder that PEFT or ms-swift wrote"
        )
        names = _tensor_names(folder)
    except SetupError as error:
        return refused(error, "vLLM could not load the adapter")
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        return fatal(
            f"{folder}: is a {kind}, not a plain LoRA",
            "vLLM loads only LoRA",
            "merge it into the model (model.merge_and_unload() of PEFT) and serve the result",
        )
    visual = sorted(name for name in names if "visual." in name)
    if visual:
        return warning(
            f"{folder}: {len(visual)} of {len(names)} trained parts belong to visual.*, as "
            f"{visual[0]}",
            "vLLM applies adapters to the language model only: the trained vision part is left "
            "out without a word, and answers differ from training",
            "merge it into the model (model.merge_and_unload() of PEFT), or train with the "
            "vision tower frozen (ms-swift: --freeze_vit true)",
        )
    return ok(f"{len(names)} trained parts, none of the vision tower")


def _tensor_names(folder: Path) -> frozenset[str]:
    """Return the names of an adapter's tensors; only safetensors are looked into."""
    weights = folder / "adapter_model.safetensors"
    if not weights.exists() and (folder / "adapter_model.bin").is_file():
        raise PreflightError(
            f"{folder}: adapter_model.bin is a pickle, which may run code when it is loaded; "
            "save the adapter again with safe_serialization=True"
        )
    return checkpoint.tensor_names(weights)
