"""What to change so that a profile fits: the nearest profiles that do, the least harmful first.

Every remedy is planned again before it is offered. A single change that is enough goes before
several; within one kind of change the mildest that is enough is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2vl_serve.hardware import Host
from qwen2vl_serve.plan.architectures import Architecture, published, quantised_twin
from qwen2vl_serve.plan.assessment import Assessment, Verdict, assess
from qwen2vl_serve.plan.cards import Machines
from qwen2vl_serve.plan.deployment import BFLOAT16_CAPABILITY
from qwen2vl_serve.plan.legality import fp8_cache
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.vision import FACTOR

MOST_REMEDIES = 5
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


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that together make the profile fit, and the plan that shows it."""

    changes: tuple[Change, ...]
    plan: Assessment


@dataclass(frozen=True, slots=True)
class _Search:
    machines: Machines
    host: Host | None

    def plan(self, profile: Profile, architecture: Architecture) -> Assessment:
        return assess(profile, architecture, self.machines, self.host)


Step = Callable[[Assessment], Iterator[Change]]


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    step: Step
    change: Change


def find_remedies(plan: Assessment, host: Host | None = None) -> tuple[Remedy, ...]:
    """Return up to five remedies, none where the plan fits or nothing helps."""
    if plan.verdict is Verdict.FITS:
        return ()
    search = _Search(plan.machines, host)
    repaired, repairs = _repair(search, plan)
    if repaired.verdict is Verdict.FITS:
        return (Remedy(repairs, repaired),)
    found: list[Remedy] = []
    for steps in _combinations():
        remedy = _try(search, repaired, steps)
        if remedy is not None and not any(_covers(known, remedy) for known in found):
            found.append(remedy)
        if len(found) == MOST_REMEDIES:
            break
    return tuple(Remedy((*repairs, *one.changes), one.plan) for one in found)


def changed(profile: Profile, values: Values) -> Profile:
    """Return ``profile`` with dotted fields replaced.

    Raises:
        pydantic.ValidationError: values that do not go together.
    """
    content = profile.model_dump()
    for name, value in values.items():
        *outer, field = name.split(".")
        target = content
        for part in outer:
            target = target[part]
        target[field] = value
    return Profile.model_validate(content).named(profile.name)


def _combinations() -> Iterator[tuple[Step, ...]]:
    """Single steps, then all gentle ones together, then these beside each that costs more."""
    yield from ((step,) for step in (*_GENTLE, *_HARD))
    yield _GENTLE
    for count in range(1, len(_HARD) + 1):
        for hard in itertools.combinations(_HARD, count):
            if count > 1:
                yield hard
            yield (*hard, *_GENTLE)


def _try(search: _Search, plan: Assessment, steps: tuple[Step, ...]) -> Remedy | None:
    """Take each step as far as is needed, then take back what turned out not to be."""
    taken: list[_Taken] = []
    current = plan
    for step in steps:
        strongest = None
        for change in step(current):
            tried = _apply(search, current, change)
            if tried is None:
                continue
            strongest = change, tried
            if tried.verdict is Verdict.FITS:
                break
        if strongest is None:
            continue
        taken.append(_Taken(step, strongest[0]))
        current = strongest[1]
        if current.verdict is Verdict.FITS:
            return _relaxed(search, plan, taken)
    return None


def _relaxed(search: _Search, plan: Assessment, taken: list[_Taken]) -> Remedy:
    """Drop or soften what is not needed for the whole, from the most harmful change down."""
    kept = list(taken)
    for one in reversed(taken[:-1]):
        rest = [other for other in kept if other is not one]
        base = _replayed(search, plan, rest)
        if base.verdict is Verdict.FITS:
            kept = rest
            continue
        for change in one.step(base):
            milder = _apply(search, base, change)
            if milder is not None and milder.verdict is Verdict.FITS:
                kept[kept.index(one)] = _Taken(one.step, change)
                break
    return Remedy(tuple(one.change for one in kept), _replayed(search, plan, kept))


def _replayed(search: _Search, plan: Assessment, taken: list[_Taken]) -> Assessment:
    for one in taken:
        plan = _apply(search, plan, one.change) or plan
    return plan


def _covers(known: Remedy, other: Remedy) -> bool:
    """Whether ``other`` changes all that ``known`` does, and more."""

    def fields(remedy: Remedy) -> set[str]:
        return {name for change in remedy.changes for name in change.values}

    return fields(known) <= fields(other)


def _apply(search: _Search, plan: Assessment, change: Change) -> Assessment | None:
    """Plan with ``change``; None where it makes no valid profile."""
    try:
        profile = changed(plan.profile, change.values)
    except ValueError:  # pydantic's, from fields that contradict each other
        return None
    architecture = plan.source
    if "model.model" in change.values:
        other = published(profile.model.model)
        if other is None:
            return None
        architecture = other
    return search.plan(profile, architecture)


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


# --- repairs of what is not allowed -------------------------------------------------------------


def _repair(search: _Search, plan: Assessment) -> tuple[Assessment, tuple[Change, ...]]:
    """Mend what is fatal and has one mend, whatever the memory."""
    made: list[Change] = []
    for mend in (_half, _other_cache, _known_length, _share, _divides):
        for change in mend(plan):
            tried = _apply(search, plan, change)
            if tried is not None and len(tried.problems) < len(plan.problems):
                made.append(change)
                plan = tried
                break
    return plan, tuple(made)


def _half(plan: Assessment) -> Iterator[Change]:
    cards = plan.machines.cards
    if plan.deployment.dtype == "bfloat16" and _oldest(cards) < BFLOAT16_CAPABILITY:
        yield _change(
            plan, "half precision has a smaller range; overflow shows as '!!!!'",
            {"model.dtype": "half"},
        )  # fmt: skip


def _other_cache(plan: Assessment) -> Iterator[Change]:
    if plan.deployment.kv_dtype not in ("auto", "float16"):
        yield _change(
            plan, "the cache in the model's own precision", {"engine.kv_cache_dtype": None}
        )


def _known_length(plan: Assessment) -> Iterator[Change]:
    positions = plan.deployment.architecture.text.positions
    if plan.deployment.max_model_len > positions:
        yield _change(
            plan, "the most that the model was made for", {"engine.max_model_len": positions}
        )


def _share(plan: Assessment) -> Iterator[Change]:
    """A share of the card that CUDA's context leaves free."""
    if any(problem.field == "engine.gpu_memory_utilization" for problem in plan.problems):
        free = min(
            (min(card.free_gib, card.memory_gib) - 0.6) / card.memory_gib
            for card in plan.machines.cards
        )
        if free > 0.1:
            value = math.floor(free * 100) / 100
            yield _change(plan, "a smaller KV cache", {"engine.gpu_memory_utilization": value})


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
            values["hardware.cards"] = count
        if stages > 1 and engine.enforce_eager:
            values["engine.enforce_eager"] = None
        yield _change(plan, _cost_of_split(tensor, stages), values)


def _cost_of_split(tensor: int, stages: int) -> str:
    cards = f"{tensor * stages} card{'s' * (tensor * stages > 1)}"
    waits = [f"tensor {tensor}: every layer waits for the links"] if tensor > 1 else []
    waits += [f"pipeline {stages}: one request takes as long as on one stage"] if stages > 1 else []
    return "; ".join([f"{cards} in use", *waits])


# --- the steps, in the order of harm -------------------------------------------------------------


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


def _larger_share(plan: Assessment) -> Iterator[Change]:
    now = plan.deployment.utilisation
    for share in (0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94):
        if share > now and plan.deployment.kv_cache_bytes is None:
            left = 100 * (1 - share)
            yield _change(
                plan, f"{left:.0f} % of a card remain to other programs and CUDA",
                {"engine.gpu_memory_utilization": share},
            )  # fmt: skip


def _short_cache(plan: Assessment) -> Iterator[Change]:
    deployment = plan.deployment
    allowed = deployment.on_cards and fp8_cache(_oldest(plan.machines.cards))
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


def _oldest(cards: tuple[Any, ...]) -> tuple[int, int]:
    return min((card.capability for card in cards), default=(99, 0))


_GENTLE: tuple[Step, ...] = (
    _no_video,
    _smaller_pictures,
    _shorter,
    _fewer_at_once,
    _smaller_steps,
    _larger_share,
)
_HARD: tuple[Step, ...] = (_short_cache, _quantised, _more_cards)
