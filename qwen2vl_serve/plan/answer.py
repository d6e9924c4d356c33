"""A plan with everything that is told about it: requests, pictures, remedies; also as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

from qwen2vl_serve.machine.hardware import GIB, Card, Host
from qwen2vl_serve.plan.assessment import Assessment, StagePlan, Verdict, host_bytes
from qwen2vl_serve.plan.capacity import Capacity, capacity
from qwen2vl_serve.plan.cards import (
    decoder_attention,
    recorded_memory,
    recorded_name,
    vision_attention,
)
from qwen2vl_serve.plan.legality import RAY
from qwen2vl_serve.plan.memory import Range
from qwen2vl_serve.plan.remedies import Remedy, changed, find_remedies
from qwen2vl_serve.plan.request import COMMON_PICTURES, Cost, Request, cost_of, picture_tokens
from qwen2vl_serve.profile import Profile, load_profile, profile_names

PARTS = ("weights", "vision", "activations", "buffers", "graphs", "other")


@dataclass(frozen=True, slots=True)
class Answer:
    """All that ``plan`` tells. ``pictures`` are (width, height, visual tokens)."""

    plan: Assessment
    request: Request
    cost: Cost
    full: Capacity
    typical: Capacity
    pictures: tuple[tuple[int, int, int], ...]
    remedies: tuple[Remedy, ...]

    @property
    def fits(self) -> bool:
        """Whether the profile starts, also where everything takes the most that is expected."""
        return self.plan.verdict is Verdict.FITS


def answer(plan: Assessment, request: Request, host: Host | None = None) -> Answer:
    """Work out what a plan means for requests, and what would mend it.

    Raises:
        PreflightError: a typical request that the profile refuses.
    """
    cost = cost_of(request, plan.profile)
    shown = COMMON_PICTURES if plan.profile.media.limit_mm_per_prompt.image else ()
    pictures = tuple((w, h, picture_tokens(w, h, plan.profile)) for w, h in shown)
    return Answer(
        plan=plan,
        request=request,
        cost=cost,
        full=capacity(plan, plan.deployment.max_model_len),
        typical=capacity(plan, cost.total),
        pictures=pictures,
        remedies=find_remedies(plan, host),
    )


def fixed(plan: Assessment) -> Profile:
    """Return the plan's profile, meant for the cards that it was planned on.

    One that ships, and was not changed, stays as it is. Of cards that differ, the fields name the
    smallest. Over several machines workers are started by Ray, without which each machine would
    look for all of their cards in itself.
    """
    profile = plan.profile
    if not plan.deployment.on_cards:
        return profile
    used, each = plan.used_cards, plan.machines.cards_each
    if len(used) > each:
        profile = changed(profile, {"engine.distributed_executor_backend": RAY})
    if _ships(profile):
        return profile
    smallest = min(used, key=lambda card: card.memory_gib)
    kinds = Counter(card.name for card in used)
    cards = " + ".join(f"{count} × {name}" for name, count in kinds.items())
    machines = f" on {-(-len(used) // each)} machines" if len(used) > each else ""
    model = profile.model.model.rstrip("/").rpartition("/")[2]
    origin = f", from profile {profile.name}" if profile.name else ""
    return changed(
        profile,
        {
            "description": f"{model} planned for {cards}{machines}{origin}",
            "hardware.device": "cuda",
            "hardware.cards": profile.workers,
            "hardware.card": recorded_name(smallest),
            "hardware.card_memory_gib": recorded_memory(smallest.memory_gib),
        },
    )


def _ships(profile: Profile) -> bool:
    return profile.name in profile_names() and profile == load_profile(profile.name)


def as_yaml(profile: Profile, *, escaped: bool = False) -> str:
    """Write a profile as ``load_profile`` reads it, without what is default and what is secret.

    ``escaped`` writes all that is not ASCII as YAML's escapes.
    """
    media = profile.media
    # Pydantic does not leave out a default of None that has a serializer for all else.
    proxy = {"proxy"} if media.proxy is None or media.proxy_is_secret else set()
    storage = {"quota_storage"} if profile.server.quota_storage_is_secret else set()
    secret = {"server": {"api_keys", *storage}, "media": proxy}
    values = profile.model_dump(mode="json", exclude_defaults=True, exclude=secret)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=not escaped, width=100)
    if media.proxy_is_secret:
        text += "# media.proxy has a password and is not written here; add it\n"
    if storage:
        text += "# server.quota_storage has a password and is not written here; add it\n"
    if profile.server.api_keys:
        text += "# server.api_keys are not written here; add them, or use server.api_key_file\n"
    return text


def as_json(told: Answer) -> dict[str, Any]:
    """Return the answer as plain values; sizes in GiB, ranges as low, likely and high."""
    plan, model = told.plan, told.plan.deployment.architecture
    deployment = plan.deployment
    packing = model.quantisation
    return {
        "verdict": plan.verdict.value,
        "fits": told.fits,
        "profile": plan.profile.name or None,
        "model": {
            "name": plan.profile.model.model,
            "parameters": model.parameters,
            "vision_parameters": model.vision_parameters,
            "dtype": deployment.dtype,
            "quantization": packing.method if packing else None,
            "stored_gib": _gib(model.stored_bytes) if model.stored_bytes else None,
        },
        "cards": [_card(card) for card in plan.machines.cards],
        "nodes": plan.nodes,
        "engine": {
            "tensor_parallel_size": deployment.tensor_parallel,
            "pipeline_parallel_size": deployment.stages,
            "data_parallel_size": deployment.replicas,
            "max_model_len": deployment.max_model_len,
            "max_num_seqs": deployment.max_num_seqs,
            "max_num_batched_tokens": deployment.max_num_batched_tokens,
            "gpu_memory_utilization": deployment.utilisation,
            "kv_cache_dtype": deployment.kv_dtype,
            "block_size": deployment.block,
            **_attention(plan),
        },
        "stages": [_stage(plan, stage) for stage in plan.stages],
        "kv_cache": {
            "bytes_per_token": deployment.kv_bytes_per_token() * deployment.tensor_parallel,
            "sized_by": deployment.kv_cache_field,
            "tokens": _tokens(plan.kv_tokens),
            "longest_request": _tokens(plan.longest),
        },
        **({} if deployment.on_cards else {"host_gib": _gib(host_bytes(deployment, plan.stages))}),
        "requests": {
            "max_model_len": _capacity(told.full),
            "typical": {
                "visual_tokens": told.cost.visual,
                "text_tokens": told.cost.text,
                "answer_tokens": told.cost.answer,
                **_capacity(told.typical),
            },
        },
        "pictures": [
            {"width": width, "height": height, "visual_tokens": tokens}
            for width, height, tokens in told.pictures
        ],
        "findings": [
            {"field": one.field, "text": one.text, "fatal": one.fatal} for one in plan.findings
        ],
        "remedies": [_remedy(remedy) for remedy in told.remedies],
    }


def _attention(plan: Assessment) -> dict[str, Any]:
    if not plan.deployment.on_cards:
        return {"attention": "CPU_ATTN", "vision_attention": "TORCH_SDPA"}
    return {
        "attention": decoder_attention(plan.capability, plan.deployment.kv_dtype),
        "vision_attention": vision_attention(plan.capability),
    }


def _stage(plan: Assessment, stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.index,
        "layers": stage.layers,
        "gpus": list(stage.cards),
        "total_gib": _gib(stage.total),
        "share_gib": _gib(stage.share),
        "weights_gib": round(stage.weights_gib, 4),
        "parts_gib": {name: _range(getattr(stage.parts, name)) for name in PARTS},
        "kv_cache_gib": _range(stage.cache.size),
        "kv_bytes_per_token": plan.deployment.kv_bytes_per_token(stage.layers),
        "kv_needed_gib": _gib(stage.needed),
        "outside_share_gib": _range(stage.outside),
    }


def _remedy(remedy: Remedy) -> dict[str, Any]:
    return {
        "set": {name: value for change in remedy.changes for name, value in change.values.items()},
        "costs": [change.cost for change in remedy.changes],
        "kv_tokens": _tokens(remedy.plan.kv_tokens),
        "verdict": remedy.plan.verdict.value,
    }


def _card(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "memory_gib": round(card.memory_gib, 2),
        "capability": "{}.{}".format(*card.capability),
    }


def _capacity(found: Capacity) -> dict[str, Any]:
    return {"tokens": found.tokens, "at_once": found.together, "by_cache": round(found.by_cache, 2)}


def _range(size: Range) -> dict[str, float]:
    return {name: _gib(getattr(size, name)) for name in ("low", "likely", "high")}


def _tokens(size: Range) -> dict[str, int]:
    return {name: int(getattr(size, name)) for name in ("low", "likely", "high")}


def _gib(size: float) -> float:
    return round(size / GIB, 4)
