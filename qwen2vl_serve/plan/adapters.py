"""What the room for LoRA adapters takes on each card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen2vl_serve.adapters.named import LATER_RANK
from qwen2vl_serve.plan.architectures import Architecture, Tensors
from qwen2vl_serve.profile import Profile

_SLICES = {"qkv_proj": 3, "gate_up_proj": 2}
# Layers that vLLM gives matrices of an adapter to; of the rest it wraps none.
_ADAPTED = {
    "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    "qkv", "proj", "mlp_up", "mlp_down", "merger_up", "merger_down",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """``slots`` places of ``rank``, with ``vision`` also at the vision tower's layers."""

    slots: int
    rank: int
    vision: bool
    sharded: bool

    def text_bytes(self, architecture: Architecture, layers: int, ranks: int, number: int) -> float:
        """Bytes beside ``layers`` decoder blocks on one of ``ranks`` cards.

        Source: ``_create_lora_modules`` in ``lora/model_manager.py``, which wraps every layer that
        can be: the matrices are there before any adapter is.
        """
        return number * sum(self._numbers(architecture.text.layer_tensors(layers), ranks))

    def vision_bytes(self, architecture: Architecture, ranks: int, number: int) -> float:
        """Bytes beside the vision tower on one of ``ranks`` cards.

        Source: as of ``text_bytes``; ``supports_tower_connector_lora`` there decides whether it has
        any.
        """
        if not self.vision or architecture.vision is None:
            return 0.0
        return number * sum(self._numbers(architecture.vision.tensors(), ranks))

    def _numbers(self, tensors: Iterable[Tensors], ranks: int) -> Iterator[float]:
        """Numbers of both matrices in every place, of each layer.

        Sources: ``create_lora_weights`` in ``lora/layers/base_linear.py``, and of layers in slices,
        which have a first matrix each, in ``column_parallel_linear.py``: of a column-parallel layer
        the second matrix is split over the cards, of a row-parallel one the first.
        """
        for tensor in tensors:
            if tensor.name not in _ADAPTED:
                continue
            first = float(_SLICES.get(tensor.name, 1) * tensor.inputs)
            second = float(tensor.outputs)
            if tensor.split == "row":
                first, second = first / ranks, second / (ranks if self.sharded else 1)
            else:
                first, second = first / (ranks if self.sharded else 1), second / ranks
            yield tensor.count * self.slots * self.rank * (first + second)


def adapter_room(profile: Profile) -> AdapterRoom | None:
    """Return the room that the engine arguments ask for, None where adapters are off."""
    engine = profile.engine
    if not engine.enable_lora and not profile.adapters.wanted:
        return None
    return AdapterRoom(
        slots=engine.max_loras or 1,
        rank=engine.max_lora_rank or LATER_RANK,
        vision=bool(engine.enable_tower_connector_lora),
        sharded=bool(engine.fully_sharded_loras),
    )
