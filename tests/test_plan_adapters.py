"""The planner counts the room for adapters, and refuses those that could not be served."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.adapters import AdapterRoom
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.plan.cards import parse_cards
from qwen2vl_serve.profile import load_profile
from tests.adapter_files import write_adapter

MIB = 1024**2


def test_the_room_of_a_7b_by_hand() -> None:
    """28 layers × rank 16 × 2 bytes × the inputs and outputs of their seven matrices."""
    model = published("Qwen2-VL-7B-Instruct")
    assert model is not None
    hidden, keys, inner = 3584, 512, 18944
    sides = (
        (hidden + hidden) + 2 * (hidden + keys) + (hidden + hidden)
        + 2 * (hidden + inner) + (inner + hidden)
    )  # fmt: skip
    room = AdapterRoom(slots=1, rank=16, vision=False, sharded=False)
    assert room.text_bytes(model, 28, 1, 2) == 28 * 16 * 2 * sides
    assert room.text_bytes(model, 28, 1, 2) / MIB == pytest.approx(77, abs=1)
    assert room.vision_bytes(model, 1, 2) == 0
    # Of each layer one matrix is split and one copied, unless both are.
    half = AdapterRoom(slots=3, rank=16, vision=True, sharded=False)
    whole = AdapterRoom(slots=3, rank=16, vision=True, sharded=True)
    assert whole.text_bytes(model, 28, 4, 2) == 3 * room.text_bytes(model, 28, 1, 2) / 4
    assert whole.text_bytes(model, 28, 4, 2) < half.text_bytes(model, 28, 4, 2)
    assert half.vision_bytes(model, 1, 2) > 0


def test_adapters_take_from_the_cache() -> None:
    """Four places of rank 64 are 16 times the 77 MiB of one of rank 16, all out of the KV cache."""
    cards = parse_cards("1x3090")
    plain = plan_for(load_profile("single-3090"), cards)
    fields = ["engine.enable_lora=true", "engine.max_loras=4", "engine.max_lora_rank=64"]
    with_room = plan_for(load_profile("single-3090", fields), cards)
    taken = (plain.kv_tokens.likely - with_room.kv_tokens.likely) * 56 * 1024
    assert taken / MIB == pytest.approx(4 * 4 * 77, rel=0.02)


def test_an_adapter_of_another_model_ends_with_2(tmp_path: Path, capsys) -> None:
    """One line on standard error names the field and the model that it was trained on."""
    folder = write_adapter(tmp_path, base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct")
    words = ["plan", "--profile", "single-3090", "--gpus", "1x3090"]
    assert cli.main([*words, "--set", f"adapters.lora_modules.a={folder}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "adapters.lora_modules.a" in told
    assert "was trained on Qwen/Qwen2.5-VL-7B-Instruct" in told
