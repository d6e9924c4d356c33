"""Which weights a rank holds: every pipeline stage's layers, split over its tensor ranks.

Pure arithmetic; sources are vLLM 0.32's ``model_executor/layers/linear.py``,
``vocab_parallel_embedding.py``, ``models/qwen2.py`` and ``distributed/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qwen2vl_serve.plan.adapters import AdapterRoom
from qwen2vl_serve.plan.architectures import (
    VOCABULARY_STEP,
    Architecture,
    Quantisation,
    Tensors,
)

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes on one card: ``exact`` as computed, ``allocated`` as PyTorch's allocator takes them."""

    exact: float = 0.0
    allocated: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.exact + other.exact, self.allocated + other.allocated)


@dataclass(frozen=True, slots=True)
class StageWeights:
    """What one card of a pipeline stage holds; all cards of a stage hold the same amount."""

    layers: int
    text: Load
    vision: Load

    @property
    def total(self) -> Load:
        """Text model, vision encoder and rotary table together."""
        return self.text + self.vision


def layers_of_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Return how many layers each pipeline stage holds.

    What does not divide goes to the stages before the last one, from the back. Source:
    ``get_pp_indices`` in ``distributed/utils.py``.
    """
    each, rest = divmod(layers, stages)
    counts = [each] * stages
    for index in range(2, rest + 2):
        counts[-index] += 1
    return tuple(counts)


def stage_weights(
    architecture: Architecture,
    *,
    tensor_parallel: int,
    stages: int,
    dtype_bytes: int,
    split_vision: bool = True,
    with_vision: bool = True,
    adapters: AdapterRoom | None = None,
) -> tuple[StageWeights, ...]:
    """Return what a card of each stage holds.

    Token embeddings are on the first stage, the output head and the last norm on the last; tied
    embeddings are on both. Every stage holds a whole vision encoder and a rotary table.
    ``adapters`` is the room for LoRA, which is beside every layer. Sources: ``Qwen2Model`` and
    ``Qwen2ForCausalLM`` in ``models/qwen2.py``, ``models/qwen2_vl.py``.
    """
    text, vision, packing = architecture.text, architecture.vision, architecture.quantisation

    def held(tensors: Iterable[Tensors], ranks: int, packed: Quantisation | None) -> Load:
        loads = (_load(tensor, ranks, dtype_bytes, packed) for tensor in tensors)
        return sum(loads, Load())

    tower = Load()
    if vision is not None and with_vision:
        packed = packing if packing is not None and packing.vision else None
        tower = held(vision.tensors(), tensor_parallel if split_vision else 1, packed)
        tower += allocation(vision.rotary_values * dtype_bytes)
        if adapters is not None:
            ranks = tensor_parallel if split_vision else 1
            beside = adapters.vision_bytes(architecture, ranks, dtype_bytes)
            tower += Load(beside, beside)
    rotary = allocation(text.rotary_values * dtype_bytes)
    table, last_norm = [text.embedding()], [Tensors("norm", text.hidden, 1, "copied")]
    found = []
    counts = layers_of_stages(text.layers, stages)
    for stage, layers in enumerate(counts):
        first, last = stage == 0, stage == stages - 1
        load = held(text.layer_tensors(layers), tensor_parallel, packing) + rotary
        tables = (first or (last and text.tied)) + (last and not text.tied)
        for _ in range(tables):
            load += held(table, tensor_parallel, None)
        if last:
            load += held(last_norm, tensor_parallel, None)
        if adapters is not None:
            beside = adapters.text_bytes(architecture, layers, tensor_parallel, dtype_bytes)
            load += Load(beside, beside)
        found.append(StageWeights(layers, load, tower))
    return tuple(found)


def stored_bytes(architecture: Architecture) -> float:
    """Return the bytes of a checkpoint's tensors, unquantised ones in 16 bits."""
    (whole,) = stage_weights(architecture, tensor_parallel=1, stages=1, dtype_bytes=2)
    vision = architecture.vision
    tables = architecture.text.rotary_values + (vision.rotary_values if vision else 0)
    return whole.total.exact - 2 * tables  # made when the model is loaded


def _load(tensor: Tensors, ranks: int, width: int, packing: Quantisation | None) -> Load:
    """Bytes of ``tensor.count`` layers on one of ``ranks`` cards.

    Source: ``create_weights`` in ``model_executor/layers/linear.py``.
    """
    inputs, outputs, bias = _rank_sizes(tensor, ranks)
    if packing is not None and tensor.packed:
        matrix = packing.packed_bytes(inputs, outputs)
    else:
        matrix = float(inputs * outputs * width)
    one = allocation(matrix) + Load(bias * width, bias * width)
    return Load(one.exact * tensor.count, one.allocated * tensor.count)


def _rank_sizes(tensor: Tensors, ranks: int) -> tuple[int, int, int]:
    """Return inputs, outputs and biases on one rank.

    Sources: ``ColumnParallelLinear``, ``QKVParallelLinear`` and ``RowParallelLinear`` in
    ``layers/linear.py``, ``VocabParallelEmbedding`` in ``layers/vocab_parallel_embedding.py``.
    """
    if tensor.split == "vocabulary":
        padded = -(-tensor.outputs // VOCABULARY_STEP) * VOCABULARY_STEP
        return tensor.inputs, -(-padded // ranks), 0
    if tensor.split == "copied" or ranks == 1:
        return tensor.inputs, tensor.outputs, tensor.bias
    if tensor.split == "row":
        return -(-tensor.inputs // ranks), tensor.outputs, tensor.bias
    if tensor.heads:
        kv = max(1, tensor.kv_heads // ranks)
        outputs = (-(-tensor.heads // ranks) + 2 * kv) * tensor.width
        return tensor.inputs, outputs, outputs if tensor.bias else 0
    return tensor.inputs, -(-tensor.outputs // ranks), -(-tensor.bias // ranks)


# From 10 MiB on a tensor has a segment of its own, of a multiple of 2 MiB; what is left of it is
# given to others only if more than 1 MiB, and never from 20 MiB on, where vLLM forbids to split.
_OWN_SEGMENT, _STEP, _SPLIT_OVER, _NEVER_SPLIT = 10 * MIB, 2 * MIB, 1 * MIB, 20 * MIB


def allocation(size: float) -> Load:
    """Return what PyTorch's caching allocator takes for one tensor.

    Source: ``CUDACachingAllocator`` (kMinLargeAlloc, kRoundLarge, kSmallSize) and vLLM's
    ``_scoped_allocator_max_split`` in ``v1/worker/gpu_worker.py``.
    """
    if size < _OWN_SEGMENT:
        return Load(size, size)
    segment = -(-size // _STEP) * _STEP
    if segment - size > _SPLIT_OVER and size < _NEVER_SPLIT:
        return Load(size, size)
    return Load(size, float(segment))


def without(weights: StageWeights, offloaded: float) -> StageWeights:
    """Return ``weights`` after ``offloaded`` bytes of the text model moved to the host.

    Source: ``_maybe_offload_to_cpu`` in ``model_executor/offloader/uva.py``.
    """
    kept = weights.text
    left = max(0.0, 1 - offloaded / kept.allocated) if kept.allocated else 0.0
    return replace(weights, text=Load(kept.exact * left, kept.allocated * left))
