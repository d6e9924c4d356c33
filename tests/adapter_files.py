"""LoRA adapters as PEFT writes them, without PEFT or torch: zeros of the right shapes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
VISION = "base_model.model.model.visual.blocks.0.attn.qkv"
DEMO_SIZES = {Q_PROJ: (256, 256), VISION: (192, 576)}
"""Inputs and outputs of these parts of the demo model."""


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 zeros."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))


def write_adapter(
    folder: Path, parts: Mapping[str, tuple[int, int]] | None = None, rank: int = 2, **settings: Any
) -> Path:
    """Write an adapter whose ``parts`` have these inputs and outputs; ``settings`` as PEFT's."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "modules_to_save": None,
        "target_modules": ["q_proj"], "base_model_name_or_path": "demo", **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in (parts or {Q_PROJ: DEMO_SIZES[Q_PROJ]}).items():
        shapes[f"{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, rank)
    write_tensors(folder / "adapter_model.safetensors", shapes)
    return folder
