"""The LoRA adapters that are to be served with the model."""

from __future__ import annotations

from pathlib import Path

from qwen2vl_serve.adapters.lora import read_adapter
from qwen2vl_serve.adapters.named import check_room
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.engine import Adapter
from qwen2vl_serve.errors import SetupError

WHY = "vLLM could not load the adapter, would leave parts of it out, or would end with it"


def adapter(world: World) -> Finding:
    """See that each LoRA is whole, of this model, and served with all its parts."""
    section = world.profile.adapters
    if section.allowed_paths and not world.profile.api_keys():
        return fatal(
            "adapters.allowed_paths: lets clients load adapters, and the server has no key "
            "of its operator",
            "nobody could load one: named keys are clients'",
            "set server.api_key_file, or leave the paths out",
        )
    for allowed in section.allowed_paths:
        if not Path(allowed).expanduser().is_dir():
            return warning(
                f"adapters.allowed_paths: there is no folder {allowed}",
                "nothing can be loaded from it",
                "make it, or correct the path",
            )
    folders = {f"adapters.lora_modules.{name}": path for name, path in section.folders.items()}
    if world.adapter is not None:
        folders["--adapter"] = world.adapter
    if not folders:
        return ok("none named")
    found = []
    for key, folder in folders.items():
        try:
            one = read_adapter(folder, world.config)
            check_room(one, world.profile, world.config)
        except SetupError as error:
            finding = refused(error, WHY)
            return fatal(f"{key}: {finding.found}", finding.why, finding.mend)
        found.append(one)
    return ok(", ".join(map(_told, found)))


def _told(one: Adapter) -> str:
    vision = f"{one.vision_parts or 'none'} of the vision tower"
    return f"{one.folder.name}: {one.parts} trained parts, {vision}"
