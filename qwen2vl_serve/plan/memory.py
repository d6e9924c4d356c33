"""How a card's memory is spent, part by part, each as a range.

Pure arithmetic after vLLM 0.32's ``determine_available_memory`` (``v1/worker/gpu_worker.py``):
KV cache = ⌈total · utilisation⌉ − what the process took since it opened the card − the highest
peak of activations − the estimate for CUDA graphs. All sizes are bytes on one card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan.deployment import Deployment
from qwen2vl_serve.plan.weights import MIB, StageWeights, allocation


@dataclass(frozen=True, slots=True)
class Range:
    """An estimate: the least and the most that is expected, and what is likely."""

    low: float = 0.0
    likely: float = 0.0
    high: float = 0.0

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __or__(self, other: Range) -> Range:
        """Return the larger of two, bound by bound."""
        return Range(
            max(self.low, other.low), max(self.likely, other.likely), max(self.high, other.high)
        )

    def times(self, low: float, likely: float, high: float) -> Range:
        """Scale each bound by its own factor."""
        return Range(self.low * low, self.likely * likely, self.high * high)


def exactly(size: float) -> Range:
    """Return a size that is known."""
    return Range(size, size, size)


def spread(size: float, low: float, high: float) -> Range:
    """Return ``size`` as the likely one between its multiples ``low`` and ``high``."""
    return Range(size * low, size, size * high)


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything on a card but the KV cache, within vLLM's share of it."""

    weights: Range
    vision: Range
    activations: Range
    buffers: Range
    graphs: Range
    other: Range

    @property
    def total(self) -> Range:
        """Sum of all parts."""
        return sum((getattr(self, field.name) for field in fields(self)), Range())


# What a process takes of a card before vLLM looks at it (CUDA's context, of which no log tells: an
# estimate), and what it adds outside PyTorch while it starts (kernels, NCCL). Of the latter, logs
# tell 0.03 GiB on one card (vllm#13882) and 0.28 (UI-TARS on vLLM 0.6.6), 0.30 on two (vllm#15815),
# 0.34 to 0.43 on four (vllm#16570).
_CONTEXT = Range(0.2 * GIB, 0.4 * GIB, 0.6 * GIB)
_NCCL_CONTEXT = Range(0.05 * GIB, 0.15 * GIB, 0.4 * GIB)
_OTHER_ALONE = Range(0.02 * GIB, 0.1 * GIB, 0.3 * GIB)
_OTHER_JOINED = Range(0.2 * GIB, 0.4 * GIB, 0.8 * GIB)


def context_bytes(workers: int) -> Range:
    """Return what lies outside vLLM's share: CUDA's context, and NCCL's among several cards.

    Source: ``init_device`` in ``v1/worker/gpu_worker.py``, which measures after both are there.
    """
    return _CONTEXT + (_NCCL_CONTEXT if workers > 1 else Range())


def parts(plan: Deployment, weights: StageWeights, *, first: bool, last: bool) -> Parts:
    """Return the parts of one card of a stage.

    Source: ``determine_available_memory`` in ``v1/worker/gpu_worker.py``.
    """
    text, vision = weights.text, weights.vision
    encoder = Range(vision.exact, vision.allocated, vision.allocated * 1.02)
    return Parts(
        weights=Range(text.exact, text.allocated, text.allocated * 1.01),
        vision=encoder + _deep_inputs(plan),
        activations=_activations(plan, first=first, last=last),
        buffers=_buffers(plan, first=first, last=last),
        graphs=_graphs(plan, weights.layers),
        other=_OTHER_JOINED if plan.tensor_parallel * plan.stages > 1 else _OTHER_ALONE,
    )


def _deep_inputs(plan: Deployment) -> Range:
    """Qwen3-VL's buffers for what its deep mergers give: a whole step each, on every stage.

    They are made with the model, so vLLM reports them with its weights. Source:
    ``deepstack_input_embeds`` in ``models/qwen3_vl.py``.
    """
    vision, text = plan.architecture.vision, plan.architecture.text
    if vision is None or plan.picture is None:
        return Range()
    one = allocation(plan.max_num_batched_tokens * text.hidden * plan.dtype_bytes)
    count = vision.deep_mergers
    return Range(one.exact, one.allocated, one.allocated).times(count, count, count)


def _activations(plan: Deployment, *, first: bool, last: bool) -> Range:
    """Peak of the profile run: vision encoder, then text model, then sampler, one after another.

    Source: ``profile_run`` in ``v1/worker/gpu/model_runner.py``: the encoder runs on the first
    stage only, its outputs stay while the text model runs, the sampler runs on the last stage.
    """
    text, width = plan.architecture.text, plan.dtype_bytes
    cached = vit = Range()
    if first and plan.picture is not None and (vision := plan.architecture.vision) is not None:
        # The outputs of deep mergers lie beside those of the last one.
        wide = text.hidden * (1 + vision.deep_mergers)
        cached = exactly(plan.picture.tokens * plan.picture.items * wide * width)
        vit = _encoder_peak(plan)
    tokens, ranks = plan.max_num_batched_tokens, plan.tensor_parallel
    # Gate, up and their product; the residual, its norm and two buffers as wide.
    layer = tokens * (3 * text.intermediate / ranks + 4 * text.hidden) * width
    model = spread(layer, 0.6, 1.6) + cached
    peak = vit | model
    if last:
        rows = min(plan.max_num_seqs, tokens)
        logits = rows * text.vocabulary * width
        # Gathered from the ranks; copied to float32 and sorted where requests ask for top-k.
        sampler = Range(logits, 2.5 * logits, 8 * logits) + cached
        peak = peak | sampler
    return peak


def _encoder_peak(plan: Deployment) -> Range:
    """Peak of the vision encoder over the profiled media.

    Per patch: its pixels, the residual, its norm, then the MLP or attention: queries, keys and
    values (gathered from the ranks in Qwen2-VL), queries and keys twice more to turn them, result,
    and without FlashAttention copies of them all. The encoder is not compiled, and beside compiled
    layers it does without vLLM's kernels too: RMS norms then write nothing in place, and QuickGELU
    needs one more tensor. On a CPU the modules' peak was measured as 15.1 times the encoder's
    width (Qwen2-VL) and 14.8 (Qwen2.5-VL) for each patch, beside its pixels; a boot of Qwen2.5-VL
    on a card left for the cache what is likely here, to 0.1 GiB of 14 (``test_plan_golden.py``).
    Sources: ``forward`` of the blocks in ``models/qwen2_vl.py`` and ``models/qwen2_5_vl.py``,
    ``get_default_ir_op_priority`` in ``platforms/cuda.py``, ``dispatch_forward`` in
    ``model_executor/custom_op.py``.
    """
    vision, picture = plan.architecture.vision, plan.picture
    if vision is None or picture is None:
        return Range()
    ranks = plan.tensor_parallel if plan.split_vision else 1
    patches = picture.tokens * picture.items * vision.merge**2
    embed, wide = vision.embed, vision.intermediate
    gathered = 3 * embed if ranks > 1 and not vision.gated else 0
    copies = 0 if plan.flash else 4
    attention = 2 * embed + gathered + (3 + 2 + 2 + 1 + copies) * embed / ranks
    compiled = bool(plan.graphs)
    if vision.gated:
        # The norm and the sum of input and attention are new tensors, or take their places.
        mlp = (5 if compiled else 3) * embed + 3 * wide / ranks
    else:
        # Qwen3-VL, which learns positions, has torch's own GELU.
        quick = compiled and not vision.positions
        mlp = 3 * embed + (3 if quick else 2) * wide / ranks
    values = vision.patch_values + max(attention, mlp)
    return spread(patches * values * plan.dtype_bytes, 0.75, 1.5)


def _buffers(plan: Deployment, *, first: bool, last: bool) -> Range:
    """What the model runner keeps: embeddings' and stages' inputs, block tables, sampling state.

    Sources: ``mm/encoder_runner.py``, ``model_runner.py`` (``intermediate_tensors``) and
    ``sample/penalties.py`` in ``v1/worker/gpu``; the last counts every request's output tokens
    over the whole vocabulary in 32 bit.
    """
    text, width = plan.architecture.text, plan.dtype_bytes
    rows = plan.max_num_batched_tokens * text.hidden * width
    size = 0.0
    if first and plan.architecture.vision is not None:
        size += rows
    if not first:
        size += 2 * rows
    size += plan.max_num_seqs * -(-plan.max_model_len // plan.block) * 4
    if last:
        size += plan.max_num_seqs * text.vocabulary * (4 + 1 / 8)
    return Range(size, size + 16 * MIB, 1.2 * size + 128 * MIB)


def _graphs(plan: Deployment, layers: int) -> Range:
    """Estimate of CUDA graphs: one pool for the largest, and nodes for every layer and size.

    The cost of a layer and size is not computable, and here between 0.1 and 0.7 MiB, an estimate
    around two logs: WeClone#101 (engine V0) tells 0.64 GiB for 28 layers and 35 sizes, 0.67 MiB
    each; notes on vLLM 0.23.0 tell 0.53 GiB for 28 layers and 51 sizes, 0.33 beside the pool
    (``VIDEO_ON_AN_A100`` in ``test_plan_golden.py``). Source of what is estimated:
    ``profile_cudagraph_memory`` in ``v1/worker/gpu/cudagraph_utils.py``.
    """
    if not plan.graphs:
        return Range()
    most, sizes = plan.graphs[-1], len(plan.graphs)
    text = plan.architecture.text
    pool = (
        most * (3 * text.intermediate / plan.tensor_parallel + 4 * text.hidden) * plan.dtype_bytes
    )
    return Range(
        pool + sizes * layers * 0.1 * MIB,
        pool + sizes * layers * 0.3 * MIB,
        2 * pool + sizes * layers * 0.7 * MIB,
    )


@dataclass(frozen=True, slots=True)
class Cache:
    """A card's KV cache: bytes, and the tokens they hold, each as a range of outcomes.

    ``low`` is the least cache, which is left where everything else takes the most.
    """

    size: Range
    tokens: Range


def requested_bytes(total: float, utilisation: float) -> int:
    """Return vLLM's share of a card. Source: ``request_memory`` in ``v1/worker/utils.py``."""
    return math.ceil(total * utilisation)


def cache_bytes(requested: float, taken: Range) -> Range:
    """Return what is left of ``requested`` for the KV cache; negative where nothing is.

    Source: ``determine_available_memory`` in ``v1/worker/gpu_worker.py``.
    """
    return Range(requested - taken.high, requested - taken.likely, requested - taken.low)


def tokens_held(size: float, bytes_per_token: int, block: int) -> int:
    """Tokens in a KV cache of ``size`` bytes, in whole blocks.

    Source: ``get_kv_cache_config_from_groups`` in ``v1/core/kv_cache_utils.py``.
    """
    return max(0, int(size // (bytes_per_token * block))) * block


def needed_bytes(length: int, bytes_per_token: int, block: int) -> int:
    """KV cache that one request of ``length`` tokens needs to be admitted: its blocks and one more.

    Source: ``get_kv_cache_configs`` in ``v1/core/kv_cache_utils.py``, which keeps a null block.
    """
    return (-(-length // block) + 1) * bytes_per_token * block
