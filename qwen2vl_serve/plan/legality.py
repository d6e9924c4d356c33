"""What forbids a start whatever the memory: splits that do not divide, cards that cannot.

Each rule is one small function of ``RULES`` that yields what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.machine.hardware import GIB, Card
from qwen2vl_serve.plan.architectures import Architecture
from qwen2vl_serve.plan.cards import (
    KV_CACHE_VARIABLE,
    Machines,
    decoder_attention,
    vision_attention,
)
from qwen2vl_serve.plan.deployment import BFLOAT16_CAPABILITY, NUMBER_BYTES, Deployment
from qwen2vl_serve.plan.refusals import mismatch, refusal
from qwen2vl_serve.plan.weights import stored_bytes

BUILT_FOR, NATIVE_FP8 = (7, 5), (8, 9)
"""Oldest compute capability of vLLM's wheels, and of cards that compute in 8-bit floats."""
RAY = "ray"
"""What starts workers on several machines (``engine.distributed_executor_backend``)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a plan: ``fatal`` forbids the start, else it is good to know."""

    field: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


def findings(plan: Deployment, machines: Machines) -> tuple[Finding, ...]:
    """Return everything that the rules say, what is fatal first."""
    found = [finding for rule in RULES for finding in rule(plan, machines)]
    return tuple(sorted(found, key=lambda finding: not finding.fatal))


def _served(plan: Deployment, _: Machines) -> Iterator[Finding]:
    kind = plan.architecture.kind
    if kind not in checkpoint.SERVED_TYPES:
        yield Finding(
            "model.model",
            f"model_type {kind} can be planned but not served; this server serves "
            f"{' and '.join(checkpoint.SERVED_TYPES)}",
            fatal=False,
        )


def _assumed(plan: Deployment, _: Machines) -> Iterator[Finding]:
    if plan.architecture.assumed:
        yield Finding(
            "model.model",
            f"there is no folder {plan.architecture.name} here; planned with the sizes of Qwen's "
            "checkpoint of that name",
            fatal=False,
        )


def _tensor(plan: Deployment, _: Machines) -> Iterator[Finding]:
    shape = plan.architecture.shape()
    obstacle = shape.obstacle(plan.tensor_parallel, split_vision=plan.split_vision)
    if obstacle is None:
        return
    legal = ", ".join(map(str, shape.legal(split_vision=plan.split_vision)))
    whole = shape.obstacle(plan.tensor_parallel, split_vision=False) is None
    hint = "; or set engine.mm_encoder_tp_mode=data" if whole and plan.split_vision else ""
    yield Finding(
        "engine.tensor_parallel_size",
        f"{plan.tensor_parallel} does not divide {obstacle}; it can be {legal}, times "
        f"pipeline_parallel_size for more cards{hint}",
    )


def _pipeline(plan: Deployment, _: Machines) -> Iterator[Finding]:
    layers = plan.architecture.text.layers
    if plan.stages > layers:
        yield Finding(
            "engine.pipeline_parallel_size",
            f"{plan.stages} stages for {layers} layers; it can be at most {layers}",
        )
    elif plan.stages > 1 and plan.architecture.vision is not None:
        yield Finding(
            "engine.pipeline_parallel_size",
            f"each of {plan.stages} stages holds a copy of the vision encoder",
            fatal=False,
        )


def _cards(plan: Deployment, machines: Machines) -> Iterator[Finding]:
    if not plan.on_cards:
        return
    have = len(machines.cards)
    sizes = f"TP {plan.tensor_parallel} × PP {plan.stages}"
    sizes += f" × DP {plan.replicas}" if plan.replicas > 1 else ""
    if plan.cards > have:
        yield Finding(
            "engine.tensor_parallel_size",
            f"{sizes} needs {plan.cards} cards, and there {'is' if have == 1 else 'are'} {have}; "
            "lower one of them or add cards",
        )
    elif plan.cards < have:
        yield Finding(
            "engine.tensor_parallel_size", f"{sizes} uses {plan.cards} of {have} cards", fatal=False
        )
    each = machines.cards_each
    if machines.nodes > 1 and plan.tensor_parallel > each:
        yield Finding(
            "engine.tensor_parallel_size",
            f"{plan.tensor_parallel} ranks span machines of {each} cards, so that every layer "
            "waits for the network; put pipeline stages on the machines instead",
            fatal=False,
        )
    if machines.nodes > 1 and plan.cards > each and plan.backend != RAY:
        yield Finding(
            "engine.distributed_executor_backend",
            f"{plan.cards} cards on machines of {each} need {RAY}; set it",
            fatal=False,
        )
    if len({card.memory_gib for card in machines.used(plan.cards)}) > 1:
        yield Finding(
            "--gpus", "the cards differ; every one is used as far as the smallest", fatal=False
        )


def _dtype(plan: Deployment, machines: Machines) -> Iterator[Finding]:
    for card in _oldest(plan, machines):
        shown = "{}.{}".format(*card.capability)
        if card.capability < BUILT_FOR:
            yield Finding(
                "hardware.card",
                f"vLLM 0.32 is not built for {card.name} (compute capability {shown}); take cards "
                "of 7.5 or newer, or build vLLM from source",
            )
        if plan.dtype == "bfloat16" and card.capability < BFLOAT16_CAPABILITY:
            yield Finding(
                "model.dtype",
                f"bfloat16 needs compute capability 8.0; {card.name} has {shown}: set "
                "model.dtype=half",
            )


def _packing(plan: Deployment, machines: Machines) -> Iterator[Finding]:
    packing = plan.architecture.quantisation
    other = mismatch(plan.quantization, packing, on_cards=plan.on_cards)
    if other is not None:
        yield Finding(other.field, f"{other.found}; {other.mend}")
    if packing is None:
        return
    refused = refusal(packing, plan.dtype, on_cards=plan.on_cards)
    if refused is not None:
        yield Finding(refused.field, f"{refused.found}; {refused.mend}")
    for card in _oldest(plan, machines):
        shown = "{}.{}".format(*card.capability)
        if card.capability < BUILT_FOR:
            yield Finding(
                "model.quantization",
                f"{packing.method} needs compute capability 7.5; {card.name} has {shown}",
            )
        elif "fp8" in packing.method and card.capability < NATIVE_FP8:
            yield Finding(
                "model.quantization",
                f"{card.name} ({shown}) computes 8-bit floats as 16-bit ones: it saves memory, "
                "not time",
                fatal=False,
            )


def _kv_dtype(plan: Deployment, machines: Machines) -> Iterator[Finding]:
    for card in _oldest(plan, machines):
        shown = "{}.{}".format(*card.capability)
        if plan.kv_dtype.startswith("fp8") and not fp8_cache(card.capability):
            yield Finding(
                "engine.kv_cache_dtype",
                f"{plan.kv_dtype} needs compute capability 8.0; {card.name} has {shown}: unset it",
            )
        if plan.kv_dtype == "bfloat16" and card.capability < BFLOAT16_CAPABILITY:
            yield Finding(
                "engine.kv_cache_dtype",
                f"bfloat16 needs compute capability 8.0; {card.name} has {shown}: set float16",
            )


def _cache_size(plan: Deployment, _: Machines) -> Iterator[Finding]:
    if plan.kv_cache_field == KV_CACHE_VARIABLE:
        yield Finding(
            KV_CACHE_VARIABLE,
            f"is set here and gives each worker {(plan.kv_cache_bytes or 0) / GIB:g} GiB of KV "
            "cache, whatever the profile says",
            fatal=False,
        )


def fp8_cache(capability: tuple[int, int]) -> bool:
    """Whether an 8-bit KV cache works: by FlashInfer or FlashAttention from 8.0 on.

    Triton, all that older cards have, needs 8.9 for it (``v1/attention/backends/triton_attn.py``).
    """
    return capability >= (8, 0)


def _attention(plan: Deployment, machines: Machines) -> Iterator[Finding]:
    for card in _oldest(plan, machines):
        if card.capability < BFLOAT16_CAPABILITY and plan.architecture.vision is not None:
            yield Finding(
                "hardware.card",
                f"attention by {decoder_attention(card.capability)} and, of pictures, by "
                f"{vision_attention(card.capability)}: FlashAttention needs compute capability 8.0",
                fatal=False,
            )


def _length(plan: Deployment, _: Machines) -> Iterator[Finding]:
    longest = plan.architecture.text.positions
    if plan.max_model_len > longest:
        yield Finding(
            "engine.max_model_len",
            f"{plan.max_model_len} is beyond the model's {longest} positions; lower it, or extend "
            "them with model.hf_overrides (YaRN)",
        )
    if plan.max_num_batched_tokens < plan.max_num_seqs:
        yield Finding(
            "engine.max_num_batched_tokens",
            f"{plan.max_num_batched_tokens} is below max_num_seqs {plan.max_num_seqs}; raise it",
        )


def _pictures(plan: Deployment, _: Machines) -> Iterator[Finding]:
    picture = plan.picture
    if picture is not None and picture.tokens >= plan.max_model_len:
        field = "media.max_pixels"
        yield Finding(
            field,
            f"one {picture.kind} of the largest size is {picture.tokens} tokens and does not fit "
            f"into max_model_len {plan.max_model_len}",
            fatal=False,
        )


def _stored(plan: Deployment, _: Machines) -> Iterator[Finding]:
    """Nothing that forbids to plan: the download may go on."""
    model = plan.architecture
    for told in (model.fault, other_size(model)):
        if told is not None:
            yield Finding("model.model", told, fatal=False)


def other_size(model: Architecture) -> str | None:
    """Say that the files hold more or less than the sizes need, None where they agree or are away.

    Packers may keep more than is needed.
    """
    if model.stored_bytes is None:
        return None
    if model.quantisation is None:
        width = NUMBER_BYTES.get(model.dtype, 2)
        expected = float(model.parameters * width)
        # Some trainers write a tied output head all the same.
        head = model.text.embedding().parameters * width if model.text.tied else 0
        whole = any(abs(model.stored_bytes / (expected + more) - 1) <= 0.03 for more in (0, head))
    else:
        expected = stored_bytes(model)
        whole = model.stored_bytes >= 0.95 * expected
    if whole:
        return None
    return (
        f"its files hold {model.stored_bytes / GIB:.2f} GiB and its config.json describes "
        f"{expected / GIB:.2f}; the download may not be whole"
    )


def _oldest(plan: Deployment, machines: Machines) -> list[Card]:
    used = machines.used(plan.cards)
    return [min(used, key=lambda card: card.capability)] if used and plan.on_cards else []


RULES: tuple[Callable[[Deployment, Machines], Iterator[Finding]], ...] = (
    _served,
    _assumed,
    _tensor,
    _pipeline,
    _cards,
    _dtype,
    _packing,
    _kv_dtype,
    _cache_size,
    _attention,
    _length,
    _pictures,
    _stored,
)
