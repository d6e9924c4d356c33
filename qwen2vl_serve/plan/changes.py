"""Changes to a profile: mends of what is forbidden, and steps that save memory.

Each yields the changes that it knows for a plan, the mildest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan.architectures import quantised_twin
from qwen2vl_serve.plan.assessment import Assessment
from qwen2vl_serve.plan.cards import KV_CACHE_VARIABLE
from qwen2vl_serve.plan.legality import fp8_cache
from qwen2vl_serve.vision import FACTOR

# A context that holds less than a largest picture with some text, or than this, is of no use.
_LEAST_TEXT, _LEAST_LENGTH = 512, 2048
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """Fields of the profile with their new values, in place of ``before``, and what that costs."""

    values: Values
    before: Values
    cost: str

    def __str__(self) -> str:
        return ", ".join(
            f"{name}: {_shown(self.before[name])} → {_shown(value)}"
            for name, value in self.values.items()
        )


Step = Callable[[Assessment], Iterator[Change]]


def _change(plan: Assessment, cost: str, values: Values) -> Change:
    content = plan.profile.model_dump()
    before = {name: _value(content, name) for name in values}
    differing = {name: value for name, value in values.items() if value != before[name]}
    return Change(differing, {name: before[name] for name in differing}, cost)


def _value(content: Mapping[str, Any], name: str) -> Any:
    value: Any = content
    for part in name.split("."):
        value = value[part]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value)


def _half(plan: Assessment) -> Iterator[Change]:
    """Half precision, where cards have no bfloat16 or a packing is not computed in 32 bit."""
    if any(problem.field == "model.dtype" for problem in plan.problems):
        yield _change(
            plan, "half precision has a smaller range; overflow shows as '!!!!'",
            {"model.dtype": "half"},
        )  # fmt: skip


def _other_cache(plan: Assessment) -> Iterator[Change]:
    if plan.deployment.kv_dtype not in ("auto", "float16"):
        yield _change(
            plan, "the cache in the model's own precision", {"engine.kv_cache_dtype": None}
        )


def _as_packed(plan: Assessment) -> Iterator[Change]:
    if any(problem.field == "model.quantization" for problem in plan.problems):
        yield _change(plan, "weights as the checkpoint has them", {"model.quantization": None})


def _known_length(plan: Assessment) -> Iterator[Change]:
    positions = plan.deployment.architecture.text.positions
    if plan.deployment.max_model_len > positions:
        yield _change(
            plan, "the most that the model was made for", {"engine.max_model_len": positions}
        )


def _share(plan: Assessment) -> Iterator[Change]:
    """A share of the card that CUDA's context leaves free; of the host, one that is free."""
    if not any(problem.field == "engine.gpu_memory_utilization" for problem in plan.problems):
        return
    if not plan.deployment.on_cards:
        for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
            if share < plan.deployment.utilisation:
                yield _change(plan, "a smaller KV cache", {"engine.gpu_memory_utilization": share})
    else:
        free = min(
            (min(card.free_gib, card.memory_gib) - 0.6) / card.memory_gib
            for card in plan.used_cards
        )
        if free > 0.1:
            value = math.floor(free * 100) / 100
            yield _change(plan, "a smaller KV cache", {"engine.gpu_memory_utilization": value})


def _smaller_cache(plan: Assessment) -> Iterator[Change]:
    """Halves of the size that the profile sets, where that is not free; one request fits."""
    size, least = _own_cache(plan), max(stage.needed for stage in plan.stages)
    if size is None or all(
        problem.field != plan.deployment.kv_cache_field for problem in plan.problems
    ):
        return
    while size // 2 >= least:
        size //= 2
        yield _cache(plan, size, "a smaller KV cache")


def _divides(plan: Assessment) -> Iterator[Change]:
    deployment = plan.deployment
    workers = deployment.tensor_parallel * deployment.stages
    cards = len(plan.machines.cards) // deployment.replicas
    most = min(workers, cards) if cards else workers
    for count in range(most, 0, -1):
        yield from _splits(plan, count)


def _splits(plan: Assessment, count: int) -> Iterator[Change]:
    """Ways to split over ``count`` cards, the fewest stages first."""
    shape = plan.deployment.architecture.shape()
    each = plan.machines.cards_each or count
    engine = plan.profile.engine
    for tensor in sorted(shape.legal(split_vision=plan.deployment.split_vision), reverse=True):
        stages, rest = divmod(count, tensor)
        if rest or tensor > each or not 1 <= stages <= shape.layers:
            continue
        if (tensor, stages) == (engine.tensor_parallel_size, engine.pipeline_parallel_size):
            continue
        values: dict[str, Any] = {
            "engine.tensor_parallel_size": tensor,
            "engine.pipeline_parallel_size": stages,
        }
        if plan.profile.hardware.cards is not None:
            values["hardware.cards"] = count * plan.deployment.replicas
        yield _change(plan, _cost_of_split(tensor, stages), values)


def _cost_of_split(tensor: int, stages: int) -> str:
    cards = f"{tensor * stages} card{'s' * (tensor * stages > 1)}"
    waits = [f"tensor {tensor}: every layer waits for the links"] if tensor > 1 else []
    waits += [f"pipeline {stages}: one request takes as long as on one stage"] if stages > 1 else []
    return "; ".join([f"{cards} in use", *waits])


def _no_video(plan: Assessment) -> Iterator[Change]:
    if plan.profile.media.limit_mm_per_prompt.video:
        yield _change(plan, "videos are refused", {"media.limit_mm_per_prompt.video": 0})


def _smaller_pictures(plan: Assessment) -> Iterator[Change]:
    media = plan.profile.media
    if plan.deployment.picture is None:
        return
    for tokens in (12288, 8192, 4096, 2560, 1280, 1024, 768, 512, 256):
        pixels = tokens * FACTOR**2
        if media.min_pixels <= pixels < media.most_pixels:
            values: dict[str, Any] = {"media.max_pixels": min(pixels, media.max_pixels)}
            if media.client_max_pixels is not None:
                values["media.client_max_pixels"] = pixels
            yield _change(plan, f"pictures of at most {tokens} tokens: small print suffers", values)


def _shorter(plan: Assessment) -> Iterator[Change]:
    """The longest context that fits, or halves of the present one; a picture and some text fit."""
    length, longest = plan.deployment.max_model_len, int(plan.longest.low) // 16 * 16
    picture = plan.deployment.picture.tokens if plan.deployment.picture else 0
    least = max(picture + _LEAST_TEXT, _LEAST_LENGTH)
    for size in sorted({longest, 65536, 32768, 16384, 8192, 4096, least}, reverse=True):
        if not least <= size < length:
            continue
        yield _change(
            plan, f"prompt and answer together end at {size} tokens",
            {"engine.max_model_len": size},
        )  # fmt: skip


def _fewer_at_once(plan: Assessment) -> Iterator[Change]:
    for seqs in (256, 128, 64, 32, 16, 8, 4):
        if seqs < plan.deployment.max_num_seqs:
            yield _change(
                plan, f"at most {seqs} requests are computed together; others wait",
                {"engine.max_num_seqs": seqs},
            )  # fmt: skip


def _smaller_steps(plan: Assessment) -> Iterator[Change]:
    for tokens in (8192, 4096, 2048, 1024, 512):
        batched = plan.deployment.max_num_batched_tokens
        if plan.deployment.max_num_seqs <= tokens < batched:
            yield _change(
                plan, "long prompts take more steps: a later first token",
                {"engine.max_num_batched_tokens": tokens},
            )  # fmt: skip


def _larger_cache(plan: Assessment) -> Iterator[Change]:
    """The cache that one request of ``max_model_len`` needs, where the profile gives it a size."""
    needed, held = max(stage.needed for stage in plan.stages), _own_cache(plan)
    if held is None or held >= needed:
        return
    cost = f"{needed / GIB:.2f} GiB for a single request of all {plan.deployment.max_model_len}"
    yield _cache(plan, needed, f"{cost} tokens")


def _own_cache(plan: Assessment) -> int | None:
    """The bytes that the profile gives a KV cache; None where something else does."""
    ours = plan.deployment.kv_cache_field != KV_CACHE_VARIABLE
    return plan.deployment.kv_cache_bytes if ours else None


def _cache(plan: Assessment, size: int, cost: str) -> Change:
    """A KV cache of ``size`` bytes or, in the CPU's field, of whole GiB that hold them."""
    field = plan.deployment.kv_cache_field
    in_gib = field == "hardware.cpu_kvcache_gib"
    return _change(plan, cost, {field: math.ceil(size / GIB) if in_gib else size})


def _larger_share(plan: Assessment) -> Iterator[Change]:
    """A larger share of a card, which leaves CUDA the most that it is expected to take."""
    if plan.deployment.kv_cache_bytes is not None:
        return
    for share in (0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94):
        spared = all(stage.outside.high <= (1 - share) * stage.total for stage in plan.stages)
        if share > plan.deployment.utilisation and spared:
            left = 100 * (1 - share)
            yield _change(
                plan, f"{left:.0f} % of a card remain to other programs and CUDA",
                {"engine.gpu_memory_utilization": share},
            )  # fmt: skip


def _short_cache(plan: Assessment) -> Iterator[Change]:
    deployment = plan.deployment
    allowed = deployment.on_cards and fp8_cache(plan.capability)
    if allowed and deployment.kv_bytes_each > 1:
        yield _change(
                plan, "the KV cache in 8 bit: answers change a little",
                {"engine.kv_cache_dtype": "fp8"},
            )  # fmt: skip


def _quantised(plan: Assessment) -> Iterator[Change]:
    twin = quantised_twin(plan.source)
    if twin is not None and plan.deployment.on_cards:
        yield _change(
            plan, "weights in 4 bit: somewhat worse answers, and another download",
            {
                "model.model": twin,
                "model.served_model_name": plan.profile.model.served_names,
                "model.dtype": "half",
                "model.quantization": None,
                "model.revision": None,
            },
        )  # fmt: skip


def _more_cards(plan: Assessment) -> Iterator[Change]:
    workers = plan.deployment.tensor_parallel * plan.deployment.stages
    cards = len(plan.machines.cards) // plan.deployment.replicas
    ways = [way for count in range(workers + 1, cards + 1) for way in _splits(plan, count)]
    # One stage after another only where one alone is not enough: latency is that of all.
    yield from sorted(
        ways,
        key=lambda way: way.values.get(
            "engine.pipeline_parallel_size", plan.profile.engine.pipeline_parallel_size
        ),
    )


MENDS: tuple[Step, ...] = (
    _half,
    _other_cache,
    _as_packed,
    _known_length,
    _share,
    _smaller_cache,
    _divides,
)
GENTLE: tuple[Step, ...] = (
    _no_video,
    _smaller_pictures,
    _larger_share,
    _shorter,
    _fewer_at_once,
    _smaller_steps,
    _larger_cache,
)
HARD: tuple[Step, ...] = (_short_cache, _quantised, _more_cards)
