"""One plan: what a profile needs on given cards, and whether it fits. No search for remedies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwen2vl_serve.machine.hardware import GIB, Card, Host
from qwen2vl_serve.plan import memory
from qwen2vl_serve.plan.adapters import adapter_room
from qwen2vl_serve.plan.architectures import Architecture
from qwen2vl_serve.plan.cards import KV_CACHE_VARIABLE, Machines
from qwen2vl_serve.plan.deployment import Deployment, deployment
from qwen2vl_serve.plan.legality import RAY, Finding, findings
from qwen2vl_serve.plan.memory import Cache, Parts, Range
from qwen2vl_serve.plan.processes import process_bytes, shares_bytes
from qwen2vl_serve.plan.weights import StageWeights, stage_weights, without
from qwen2vl_serve.profile import Profile


class Verdict(StrEnum):
    """Whether a profile starts.

    FITS holds where everything takes the most that is expected as well, TIGHT where it takes the
    least, NO not even there.
    """

    FITS = "fits"
    TIGHT = "tight"
    NO = "does not fit"


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline stage; every card of it holds the same.

    ``share`` is what vLLM may use of a card in bytes, ``total`` what the smallest card has, and
    ``needed`` the cache that one request of ``max_model_len`` tokens needs.
    """

    index: int
    layers: int
    cards: tuple[int, ...]
    total: float
    share: float
    parts: Parts
    cache: Cache
    needed: int
    outside: Range

    @property
    def weights_gib(self) -> float:
        """Weights on each card in GiB, vision encoder included, as vLLM reports them."""
        return (self.parts.weights.likely + self.parts.vision.likely) / GIB

    @property
    def free(self) -> float:
        """Bytes outside vLLM's share that CUDA's context is not expected to take."""
        return max(0.0, self.total - self.share - self.outside.likely)


@dataclass(frozen=True, slots=True)
class Assessment:
    """What is known about one profile on one set of cards.

    ``source`` is the model as it is stored, ``deployment.architecture`` as it is loaded.
    """

    profile: Profile
    source: Architecture
    machines: Machines
    deployment: Deployment
    verdict: Verdict
    findings: tuple[Finding, ...]
    stages: tuple[StagePlan, ...]
    kv_tokens: Range

    @property
    def weights_gib(self) -> tuple[float, ...]:
        """Weights of a card in GiB, by pipeline stage."""
        return tuple(stage.weights_gib for stage in self.stages)

    @property
    def used_cards(self) -> tuple[Card, ...]:
        """The cards that the workers take."""
        return self.machines.used(self.deployment.cards)

    @property
    def nodes(self) -> int | None:
        """Machines that hold the cards; None for those of a Ray cluster that nobody named."""
        unnamed = self.machines.nodes == 1 and self.deployment.backend == RAY
        return None if unnamed else self.machines.nodes

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the oldest card in use, which decides for all; on cards alone."""
        return min(card.capability for card in self.used_cards)

    @property
    def longest(self) -> Range:
        """Longest request in tokens that the cache, the profile and the model admit."""
        block = self.deployment.block
        most = min(self.deployment.max_model_len, self.deployment.architecture.text.positions)
        low, likely, high = (
            max(0.0, min(tokens - block, most))
            for tokens in (self.kv_tokens.low, self.kv_tokens.likely, self.kv_tokens.high)
        )
        return Range(low, likely, high)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings that forbid a start."""
        return tuple(finding for finding in self.findings if finding.fatal)


def assess(
    profile: Profile, architecture: Architecture, machines: Machines, host: Host | None = None
) -> Assessment:
    """Plan ``profile`` with a model of known sizes; without cards, for the CPU of ``host``."""
    on_cards = bool(machines.cards) and profile.hardware.device != "cpu"
    plan = deployment(profile, architecture, machines, on_cards=on_cards)
    found = list(findings(plan, machines))
    with_vision = plan.picture is not None
    held = stage_weights(
        plan.architecture,
        tensor_parallel=plan.tensor_parallel,
        stages=min(plan.stages, plan.architecture.text.layers),
        dtype_bytes=plan.dtype_bytes,
        split_vision=plan.split_vision,
        with_vision=with_vision,
        adapters=adapter_room(profile),
    )
    if on_cards:
        found += _offloaded(plan, held)
        stages = tuple(_on_card(plan, machines, held, index) for index in range(len(held)))
        found += [finding for stage in stages for finding in _room(plan, machines, stage)][:1]
    else:
        stages = tuple(_on_cpu(plan, held, index, host) for index in range(len(held)))
        found += _host_room(plan, stages, host)
    tokens = Range(
        min(stage.cache.tokens.low for stage in stages),
        min(stage.cache.tokens.likely for stage in stages),
        min(stage.cache.tokens.high for stage in stages),
    )
    verdict = _verdict(stages)
    if any(finding.fatal for finding in found):
        verdict = Verdict.NO
    return Assessment(profile, architecture, machines, plan, verdict, tuple(found), stages, tokens)


def _verdict(stages: tuple[StagePlan, ...]) -> Verdict:
    if all(stage.cache.size.low >= stage.needed for stage in stages):
        return Verdict.FITS
    if all(stage.cache.size.high >= stage.needed for stage in stages):
        return Verdict.TIGHT
    return Verdict.NO


def _on_card(
    plan: Deployment, machines: Machines, held: tuple[StageWeights, ...], index: int
) -> StagePlan:
    numbers = _card_numbers(plan, index)
    total = min(card.memory_gib for card in _present(machines, numbers)) * GIB
    weights = without(held[index], plan.offload_bytes)
    parts = memory.parts(plan, weights, first=index == 0, last=index == len(held) - 1)
    share = memory.requested_bytes(total, plan.utilisation)
    outside = memory.context_bytes(plan.cards)
    if plan.kv_cache_bytes is None:
        size = memory.cache_bytes(share, parts.total)
    else:
        # vLLM then profiles nothing, and takes the memory or fails.
        size = memory.exactly(plan.kv_cache_bytes)
    return _stage(
        plan, weights, index, numbers,
        total=total, share=share, parts=parts, size=size, outside=outside,
    )  # fmt: skip


def _on_cpu(
    plan: Deployment, held: tuple[StageWeights, ...], index: int, host: Host | None
) -> StagePlan:
    """A worker on the CPU: its KV cache is what is asked for, or its share of the memory.

    Source: ``determine_available_memory`` in ``v1/worker/cpu_worker.py``.
    """
    total = host.memory_gib * GIB if host else 0.0
    weights = held[index]
    parts = memory.parts(plan, weights, first=index == 0, last=index == len(held) - 1)
    share = float(memory.requested_bytes(total, plan.utilisation))
    if plan.kv_cache_bytes is not None:
        size = memory.exactly(plan.kv_cache_bytes)
        share = min(total, parts.total.likely + plan.kv_cache_bytes) if total else share
    else:
        size = memory.cache_bytes(share, parts.total + _PROCESS)
    return _stage(
        plan, weights, index, (),
        total=total, share=share, parts=parts, size=size, outside=Range(),
    )  # fmt: skip


# A worker's Python, torch and libraries in the host's memory, as vLLM counts them.
_PROCESS = Range(0.6 * GIB, 1.0 * GIB, 2.0 * GIB)


def _stage(
    plan: Deployment,
    weights: StageWeights,
    index: int,
    numbers: tuple[int, ...],
    *,
    total: float,
    share: float,
    parts: Parts,
    size: Range,
    outside: Range,
) -> StagePlan:
    each = plan.kv_bytes_per_token(weights.layers)
    held = [memory.tokens_held(bound, each, plan.block) for bound in (size.low, size.likely)]
    most = memory.tokens_held(size.high, each, plan.block)
    cache = Cache(size, Range(held[0], held[1], most))
    needed = memory.needed_bytes(plan.max_model_len, each, plan.block)
    return StagePlan(index, weights.layers, numbers, total, share, parts, cache, needed, outside)


def _card_numbers(plan: Deployment, index: int) -> tuple[int, ...]:
    """Return which cards hold a stage, over all replicas; there may be fewer of them."""
    each = plan.tensor_parallel * plan.stages
    return tuple(
        replica * each + index * plan.tensor_parallel + rank
        for replica in range(plan.replicas)
        for rank in range(plan.tensor_parallel)
    )


def _present(machines: Machines, numbers: tuple[int, ...]) -> list[Card]:
    """Return the cards of these numbers, the last one in place of those that are missing."""
    last = len(machines.cards) - 1
    return [machines.cards[min(number, last)] for number in numbers]


def _room(plan: Deployment, machines: Machines, stage: StagePlan) -> list[Finding]:
    """vLLM refuses to start where less than its share of a card is free.

    Source: ``request_memory`` in ``v1/worker/utils.py``.
    """
    card = min(_present(machines, stage.cards), key=lambda one: min(one.free_gib, one.memory_gib))
    free = max(0.0, min(card.free_gib, card.memory_gib) * GIB - stage.outside.low)
    taken = stage.share
    field = "engine.gpu_memory_utilization"
    if plan.kv_cache_bytes is not None:
        field = "engine.kv_cache_memory_bytes"
        taken = stage.parts.total.low + plan.kv_cache_bytes
    if taken <= free:
        return []
    return [
        Finding(
            field,
            f"{taken / GIB:.2f} GiB are asked for and {free / GIB:.2f} are free on {card.name} "
            "beside CUDA's own; lower it, or stop what else uses the card",
        )
    ]


def _offloaded(plan: Deployment, held: tuple[StageWeights, ...]) -> list[Finding]:
    """Weights that ``cpu_offload_gb`` keeps in the host's memory, where they are not free."""
    moved = max(min(plan.offload_bytes, weights.text.allocated) for weights in held)
    if not moved:
        return []
    return [
        Finding(
            "engine.cpu_offload_gb",
            f"{moved / GIB:.2f} GiB of weights for each card lie in the host's memory and are read "
            "from there at every step: answers are slow",
            fatal=False,
        )
    ]


def _host_room(plan: Deployment, stages: tuple[StagePlan, ...], host: Host | None) -> list[Finding]:
    """CPU workers need memory for themselves: what is asked for, or each its share of the whole.

    vLLM refuses where less than one share is free, and does not see that every worker takes one.
    Source: ``CPUWorker`` in ``v1/worker/cpu_worker.py``, of a machine with one memory node.
    """
    if host is None:
        return []
    taken = host_bytes(plan, stages)
    if taken <= host.available_gib * GIB:
        return []
    if plan.kv_cache_bytes is None:
        each = f"{plan.cards} × " if plan.cards > 1 else ""
        what = f"{each}{stages[0].share / GIB:.1f} GiB are a share of {plan.utilisation:g} of the "
        what += f"memory, {taken / GIB:.1f} with the server's processes"
        mend = "lower it, or set hardware.cpu_kvcache_gib"
    else:
        what = f"{taken / GIB:.1f} GiB for processes, weights and KV cache"
        mend = "lower it"
        mend += " or unset it" if plan.kv_cache_field == KV_CACHE_VARIABLE else ""
    free = f"{host.available_gib:.1f} GiB of memory are free"
    return [Finding(plan.kv_cache_field, f"{what}, and {free}; {mend}")]


def host_bytes(plan: Deployment, stages: tuple[StagePlan, ...]) -> float:
    """Return what a server on the CPU takes of the memory: processes, weights and KV cache."""
    if plan.kv_cache_bytes is None:
        return shares_bytes(stages[0].share, plan.cards, plan.replicas, in_core=plan.worker_in_core)
    return (
        process_bytes(plan.cards, plan.replicas, in_core=plan.worker_in_core)
        + host_weights(plan, stages)
        + plan.kv_cache_bytes * plan.cards
    )


def host_weights(plan: Deployment, stages: tuple[StagePlan, ...]) -> float:
    """Return the bytes of all workers' weights in the host's memory."""
    held = [stage.parts.weights.low + stage.parts.vision.low for stage in stages]
    return sum(held) * plan.tensor_parallel * plan.replicas
