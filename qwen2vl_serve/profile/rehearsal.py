"""A profile rehearsed: what a deployment can get wrong, tried before a card is rented."""

from __future__ import annotations

from typing import Any

from qwen2vl_serve.profile.adapters import AdaptersSection
from qwen2vl_serve.profile.cpus import one_cpu_each
from qwen2vl_serve.profile.loading import load_profile
from qwen2vl_serve.profile.profile import DEMO_PROFILE, Profile
from qwen2vl_serve.profile.sections import HardwareSection

# Over all workers; the demo model needs about 4 KiB a token.
_KV_BYTES = 1024**3
_LORA_ARGUMENTS = (
    "enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras", "fully_sharded_loras",
    "enable_tower_connector_lora",
)  # fmt: skip
# What a rehearsal keeps of the profile's media section beside the counts.
_MEDIA_SAFETY = (
    "max_image_pixels",
    "max_video_bytes",
    "max_video_frames",
    "max_video_pixels",
    "video_decode_seconds",
    "max_download_bytes",
    "download_seconds",
    "proxy",
    "allowed_ports",
    "allowed_domains",
    "denied_domains",
    "allowed_networks",
    "allowed_local_paths",
    "formats",
    "max_pdf_pages",
    "max_decoding_bytes",
    "max_held_bytes",
    "pdf_cache_bytes",
)


def rehearsal(profile: Profile) -> Profile:
    """The same topology, limits, address and keys with the demo model on CPU workers.

    Pixel bounds and number format are the demo model's own, and what only cards or this
    profile's checkpoint know (quantisation, revision, memory shares) is dropped.
    """
    demo = load_profile(DEMO_PROFILE)
    engine = profile.engine.model_copy(
        update={
            "enforce_eager": True,
            "compilation_config": None,
            "kv_cache_memory_bytes": _KV_BYTES // profile.workers,
            **dict.fromkeys(
                (
                    "gpu_memory_utilization",
                    "kv_cache_dtype",
                    "block_size",
                    "cpu_offload_gb",
                    "disable_custom_all_reduce",
                    "distributed_executor_backend",
                    *_LORA_ARGUMENTS,
                )
            ),
        }
    )
    media = demo.media.model_copy(
        update={
            "limit_mm_per_prompt": profile.media.limit_mm_per_prompt,
            "media_io_kwargs": profile.media.media_io_kwargs,
            **{name: getattr(profile.media, name) for name in _MEDIA_SAFETY},
        }
    )
    bind = one_cpu_each(profile.workers) if profile.workers > 1 else None
    rehearsed = profile.model_copy(
        update={
            "model": demo.model.model_copy(
                update={
                    "served_model_name": profile.model.served_names,
                    "hf_overrides": _allow_length(engine.max_model_len),
                }
            ),
            "hardware": HardwareSection(device="cpu", cpu_threads_bind=bind),
            "engine": engine,
            "adapters": AdaptersSection(),  # they are the model's, and the demo is another
            "media": media,
            # A folder belongs to one server, and this is another.
            "files": profile.files.model_copy(update={"folder": None}),
            "batches": profile.batches.model_copy(update={"folder": None}),
        }
    )
    return Profile.model_validate(rehearsed.model_dump()).named(profile.name)


def _allow_length(max_model_len: int | None) -> dict[str, Any]:
    """Let the demo model run at another context length than it was made for.

    Its rotary positions are computed, not stored, so that any length is sound.
    """
    if max_model_len is None:
        return {}
    return {"text_config": {"max_position_embeddings": max_model_len}}
