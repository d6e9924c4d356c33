"""A profile as arithmetic needs it: every default that vLLM would fill in, filled in.

Sources: vLLM 0.32's ``engine/arg_utils.py`` (``get_batch_defaults``), ``config/cache.py``,
``multimodal/encoder_budget.py`` and ``models/qwen2_vl.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

from qwen2vl_serve.machine.hardware import GIB, Card
from qwen2vl_serve.plan.architectures import Architecture, with_online_fp8
from qwen2vl_serve.plan.cards import KV_CACHE_VARIABLE, Machines
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.vision import FRAME_FACTOR, PixelBudget, smart_resize

DEFAULT_UTILISATION = 0.92
CUDA_BLOCK, CPU_BLOCK = 16, 128
"""Tokens of one block of the KV cache where the profile is silent.

Source: ``config/cache.py``, ``platforms/cpu.py``.
"""
BFLOAT16_CAPABILITY = (8, 0)
_PROFILED_FRAMES = 14
NUMBER_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Picture:
    """What vLLM profiles the vision encoder with: ``items`` media of ``tokens`` each.

    ``budget`` is the size of the encoder's cache in tokens.
    """

    kind: str
    tokens: int
    items: int
    budget: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """One model on cards, with no default left open. Sizes in tokens and bytes.

    ``kv_cache_field`` is what gives the KV cache its size, a field of the profile or a variable of
    the environment; ``kv_cache_bytes`` is None where that is a share of the memory. ``flash`` tells
    that pictures are attended to by FlashAttention, which needs no copies; ``quantization`` is what
    the profile says of the weights' packing; ``graphs`` are the batch sizes, rising, that CUDA
    graphs are captured for; ``backend`` is what the profile says starts the workers.
    """

    architecture: Architecture
    dtype: str
    tensor_parallel: int
    stages: int
    replicas: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    utilisation: float
    kv_bytes_each: int
    kv_dtype: str
    block: int
    split_vision: bool
    picture: Picture | None
    kv_cache_bytes: int | None
    kv_cache_field: str
    offload_bytes: float
    graphs: tuple[int, ...]
    flash: bool
    on_cards: bool
    worker_in_core: bool
    quantization: str | None
    backend: str | None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of weights and activations."""
        return NUMBER_BYTES[self.dtype]

    @property
    def cards(self) -> int:
        """Cards that are used: TP × PP × DP."""
        return self.tensor_parallel * self.stages * self.replicas

    def kv_bytes_per_token(self, layers: int | None = None) -> int:
        """KV cache of one token on one card with ``layers`` layers, by default of all.

        Two times layers × KV heads × head size; beyond one rank a KV head each, heads are copied.
        Source: ``FullAttentionSpec.page_size_bytes`` in ``v1/kv_cache_interface.py``.
        """
        text = self.architecture.text
        heads = max(1, text.kv_heads // self.tensor_parallel)
        return 2 * (layers or text.layers) * heads * text.head_dim * self.kv_bytes_each


def deployment(
    profile: Profile, architecture: Architecture, machines: Machines, *, on_cards: bool
) -> Deployment:
    """Fill in vLLM's defaults for ``profile`` on ``machines``, which may have no cards."""
    cards = machines.used(profile.workers)
    engine = profile.engine
    if profile.model.quantization is not None and architecture.quantisation is None:
        method = profile.model.quantization
        if method.startswith("fp8") or method == "mxfp8":
            architecture = with_online_fp8(architecture, method)
    old = on_cards and any(card.capability < BFLOAT16_CAPABILITY for card in cards)
    dtype = _dtype(profile.model.dtype, architecture.dtype, without_bfloat16=old)
    tensor, stages = engine.tensor_parallel_size, engine.pipeline_parallel_size
    length = engine.max_model_len or architecture.text.positions
    tokens, seqs = batch_defaults(cards, workers=tensor * stages, on_cards=on_cards)
    asked_seqs = engine.max_num_seqs
    batched = engine.max_num_batched_tokens or min((asked_seqs or seqs) * length, tokens)
    sequences = asked_seqs or min(seqs, batched)
    kv_field, kv_bytes = cache_size(profile, machines.cpu_cache_gib, on_cards=on_cards)
    kv_dtype = engine.kv_cache_dtype or "auto"
    graphs: tuple[int, ...] = ()
    if on_cards and not engine.enforce_eager:
        graphs = _graphs(engine.compilation_config or {}, cards, sequences, batched)
    return Deployment(
        architecture=architecture,
        dtype=dtype,
        tensor_parallel=tensor,
        stages=stages,
        replicas=engine.data_parallel_size,
        max_model_len=length,
        max_num_seqs=sequences,
        max_num_batched_tokens=batched,
        utilisation=engine.gpu_memory_utilization or DEFAULT_UTILISATION,
        kv_bytes_each=_kv_bytes(kv_dtype, dtype),
        kv_dtype=kv_dtype,
        block=engine.block_size or (CUDA_BLOCK if on_cards else CPU_BLOCK),
        split_vision=engine.mm_encoder_tp_mode != "data",
        picture=_largest(profile, architecture, length, batched, sequences),
        kv_cache_bytes=kv_bytes,
        kv_cache_field=kv_field,
        offload_bytes=(engine.cpu_offload_gb or 0) * GIB,
        graphs=graphs,
        flash=on_cards and not old,
        on_cards=on_cards,
        worker_in_core=profile.worker_in_core,
        quantization=profile.model.quantization,
        backend=engine.distributed_executor_backend,
    )


def cache_size(profile: Profile, told_gib: int | None, *, on_cards: bool) -> tuple[str, int | None]:
    """Name what gives a worker's KV cache its size, with the bytes; None for a share of the memory.

    On the CPU the environment's ``told_gib`` go before the profile's, and either before the
    engine's argument; on cards that argument alone counts (``platforms/cpu.py``).
    """
    if not on_cards and told_gib is not None:
        return KV_CACHE_VARIABLE, told_gib * GIB
    if not on_cards and profile.hardware.cpu_kvcache_gib is not None:
        return "hardware.cpu_kvcache_gib", profile.hardware.cpu_kvcache_gib * GIB
    if (size := profile.engine.kv_cache_memory_bytes) is not None:
        return "engine.kv_cache_memory_bytes", size
    return "engine.gpu_memory_utilization", None


def batch_defaults(cards: Sequence[Card], *, workers: int, on_cards: bool) -> tuple[int, int]:
    """Return vLLM's default ``max_num_batched_tokens`` and ``max_num_seqs`` for its API server.

    Source: ``get_batch_defaults`` in ``engine/arg_utils.py``; vLLM looks at the first card.
    """
    if not on_cards:
        return 2048 * workers, 128 * workers
    memory = cards[0].memory_gib if cards else 0
    if memory >= 160:
        return 16384, 1024
    if memory >= 70 and "a100" not in cards[0].name.lower():
        return 8192, 1024
    return 2048, 256


@lru_cache(maxsize=64)
def largest_picture(pixels: int, factor: int) -> tuple[int, int]:
    """Return height and width in squares of ``factor`` of the picture with the most tokens.

    Within ``pixels`` and of at most 1 : 200. Source: ``get_image_size_with_most_features`` in
    ``models/qwen2_vl.py``.
    """
    for tokens in range(max(1, pixels // factor**2), 0, -1):
        short = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        if tokens // short / short <= 200:
            return short, tokens // short
    return 1, 1


def _dtype(wanted: str, stored: str, *, without_bfloat16: bool) -> str:
    """Return the number format; source: ``_resolve_auto_dtype`` in ``config/model.py``."""
    if wanted == "auto":
        return "float16" if without_bfloat16 or stored == "float16" else "bfloat16"
    return {"half": "float16", "float": "float32"}.get(wanted, wanted)


def _kv_bytes(kv_dtype: str, dtype: str) -> int:
    if kv_dtype.startswith("fp8"):
        return 1
    return NUMBER_BYTES[dtype if kv_dtype == "auto" else kv_dtype]


def _largest(
    profile: Profile, architecture: Architecture, length: int, batched: int, sequences: int
) -> Picture | None:
    """Return what the encoder is profiled with; None where all media are turned off.

    A video is at most 14 frames of the largest size that still fit into ``max_model_len``; the
    kind with the most tokens is taken, as often as the encoder's budget holds it. Sources:
    ``MultiModalBudget`` in ``multimodal/encoder_budget.py``, ``get_max_video_tokens``.
    """
    vision, media = architecture.vision, profile.media
    limits = media.limit_mm_per_prompt
    if vision is None:
        return None
    kinds: dict[str, tuple[int, int]] = {}
    factor = vision.factor
    rows, columns = largest_picture(media.most_pixels, factor)
    if limits.image:
        kinds["image"] = rows * columns, limits.image
    if limits.video:
        frames_of = media.videos_kwargs
        bounds = PixelBudget(frames_of.least_pixels, frames_of.most_pixels)
        height, width = smart_resize(rows * factor, columns * factor, bounds, factor)
        frame = height // factor * (width // factor)
        frames = 1
        while frames < _PROFILED_FRAMES and -(-(frames + 1) // FRAME_FACTOR) * frame <= length:
            frames += 1
        kinds["video"] = -(-frames // FRAME_FACTOR) * frame, limits.video
    if not kinds:
        return None
    budget = max(batched, *(tokens for tokens, _ in kinds.values()))
    kind = max(kinds, key=lambda name: (kinds[name][0], name))
    tokens, limit = kinds[kind]
    of_prompt = max(1, min(limit, length // tokens))
    items = max(1, min(budget // tokens, sequences * of_prompt))
    return Picture(kind, tokens, items, budget)


def _graphs(
    settings: Mapping[str, object], cards: Sequence[Card], sequences: int, batched: int
) -> tuple[int, ...]:
    """Return the batch sizes that graphs are captured for under a ``compilation_config``.

    Source: ``_set_cudagraph_sizes`` in ``config/vllm.py``. What vLLM refuses to read is not
    counted with.
    """
    mode = settings.get("cudagraph_mode")
    if mode is not None and str(mode).upper() in ("NONE", "0"):
        return ()
    told = settings.get("cudagraph_capture_sizes")
    if isinstance(told, list | tuple) and told and all(_is_size(one) for one in told):
        return tuple(sorted({size for size in told if size <= batched}))
    most = settings.get("max_cudagraph_capture_size")
    if not _is_size(most):
        most = 1024 if cards and cards[0].capability[0] == 10 else 512
    return tuple(capture_sizes(min(2 * sequences, most, batched)))


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def capture_sizes(most: int) -> list[int]:
    """List the batch sizes that graphs are captured for, up to ``most``, unless told otherwise.

    Source: ``_set_cudagraph_sizes`` in ``config/vllm.py``.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    return [size for size in sizes if size <= most]
