"""The adapters that a profile asks for, and the engine arguments that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from qwen2vl_serve.adapters.lora import another_model, read_adapter
from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.engine import Adapter
from qwen2vl_serve.errors import PreflightError, SetupError
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.sections import EngineSection, LoRARank

RANKS: tuple[int, ...] = get_args(LoRARank)
LATER_RANK = 16
"""vLLM's default: what is kept for adapters that are not known yet."""
LATER_ADAPTERS = 8
MOST_AT_ONCE = 4


def model_config(profile: Profile) -> dict[str, Any] | None:
    """Return the model's config.json, None where it is not on this machine or cannot be used."""
    model = profile.model
    folder: Path | None = Path(model.path)
    if not Path(model.path).is_dir():
        folder = hubs.cached_folder(model.path, model.revision, model.download_dir)
    if folder is None:
        return None
    try:
        return checkpoint.read_config(folder, model.hf_overrides)
    except SetupError:
        return None  # preflight says so in its own words


def named_adapters(profile: Profile) -> dict[str, Adapter]:
    """Read the adapters of ``adapters.lora_modules``, in their order.

    Raises:
        PreflightError: one of them cannot be served with this model and these engine arguments.
    """
    if not profile.adapters.lora_modules:
        return {}
    config = model_config(profile)
    found = {}
    for name, folder in profile.adapters.folders.items():
        try:
            adapter = read_adapter(folder, config)
            check_room(adapter, profile, config)
        except PreflightError as error:
            raise PreflightError(f"adapters.lora_modules.{name}: {error}") from None
        found[name] = adapter
    return found


def check_room(adapter: Adapter, profile: Profile, config: Mapping[str, Any] | None = None) -> None:
    """Check an adapter against what the profile's engine arguments leave for it.

    Raises:
        PreflightError: it is of another model, its rank is too large, or its vision part would be
            left out.
    """
    engine = profile.engine
    if other := another_model(adapter, profile.model.path, config):
        raise PreflightError(
            f"{adapter.folder}: was trained on {other}, and the model is {profile.model.model}; "
            "serve it with its own"
        )
    most = engine.max_lora_rank or RANKS[-1]
    if adapter.rank > most:
        raise PreflightError(
            f"{adapter.folder}: has rank {adapter.rank}, and engine.max_lora_rank is {most}; "
            + (f"set {rank_for(adapter.rank)}" if adapter.rank <= RANKS[-1] else "train it smaller")
        )
    if adapter.vision_parts and engine.enable_tower_connector_lora is False:
        raise PreflightError(
            f"{adapter.folder}: {adapter.vision_parts} of its {adapter.parts} parts belong to the "
            "vision tower, which vLLM leaves out without a word while "
            "engine.enable_tower_connector_lora is false; set it to true"
        )


def rank_for(rank: int) -> int:
    """Return the least of vLLM's ``max_lora_rank`` that holds ``rank``."""
    return next(one for one in RANKS if one >= rank)


def with_adapters(profile: Profile, adapters: Mapping[str, Adapter]) -> Profile:
    """Return the profile with the engine arguments that follow from its adapters."""
    section, engine = profile.adapters, profile.engine
    if not section.wanted and not engine.enable_lora:
        return profile
    later = bool(section.allowed_paths) or not adapters
    rank = max([one.rank for one in adapters.values()] + [LATER_RANK] * later)
    at_once = engine.max_loras or min(max(1, len(adapters)), MOST_AT_ONCE)
    derived = {
        "enable_lora": True,
        "max_loras": at_once,
        "max_lora_rank": engine.max_lora_rank or rank_for(rank),
        "max_cpu_loras": engine.max_cpu_loras
        or max(at_once, len(adapters) + LATER_ADAPTERS * later),
        "enable_tower_connector_lora": engine.enable_tower_connector_lora
        or any(one.vision_parts for one in adapters.values()),
    }
    resolved: EngineSection = engine.model_copy(update=derived)
    return profile.model_copy(update={"engine": resolved}).named(profile.name)
