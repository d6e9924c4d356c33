"""A LoRA adapter that is to be served with the model."""

from __future__ import annotations

from typing import Any

from qwen2vl_serve import checkpoint
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import SetupError


def adapter(world: World) -> Finding:
    """See that a LoRA is whole, and that it trains nothing that vLLM leaves out."""
    folder = world.adapter
    if folder is None:
        return ok("none named")
    try:
        settings = checkpoint.read_json(
            folder / "adapter_config.json", "name the folder that PEFT or ms-swift wrote"
        )
        names = checkpoint.tensor_names(folder / "adapter_model.safetensors")
    except SetupError as error:
        return refused(error, "vLLM could not load the adapter")
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        return fatal(
            f"{folder}: is a {kind}, not a plain LoRA",
            "vLLM loads only LoRA",
            "merge it into the model (model.merge_and_unload() of PEFT) and serve the result",
        )
    visual = sorted(name for name in names if ".visual." in name)
    if visual or any("visual" in target for target in _targets(settings)):
        where = f"{len(visual)} of its {len(names)} tensors" if visual else "its target_modules"
        return warning(
            f"{folder}: {where} belong to visual.*, as {visual[0]}"
            if visual
            else f"{folder}: {where} name visual.*",
            "vLLM applies adapters to the language model only: the trained vision part is left "
            "out without a word, and answers differ from training",
            "merge it into the model (model.merge_and_unload() of PEFT), or train with the "
            "vision tower frozen (ms-swift: --freeze_vit true)",
        )
    return ok(f"{len(names)} tensors, none of the vision tower")


def _targets(settings: dict[str, Any]) -> list[str]:
    """List ``target_modules``, which is a list of names or one pattern.

    The pattern of ms-swift names the tower to exclude it: ``^(?!visual)``.
    """
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        return [] if "?!" in targets else [targets]
    return [str(target) for target in targets] if isinstance(targets, list) else []
