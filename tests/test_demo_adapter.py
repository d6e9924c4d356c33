"""The script that trains the demo's adapters, for one step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl_serve.adapters.lora import read_adapter
from qwen2vl_serve.checkpoint import read_config
from qwen2vl_serve.demo import adapter
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER


@pytest.mark.parametrize(("name", "parts", "vision"), [("sailor", 20, 0), ("mirror", 14, 14)])
def test_a_step_makes_an_adapter(name: str, parts: int, vision: int, tmp_path: Path) -> None:
    """It learns something, of the parts that its recipe names alone, and is whole on the disk."""
    recipe = replace(adapter.RECIPES[name], steps=1, batch=1)
    lines: list[str] = []
    trained = adapter.train(recipe, 0, lines.append)
    assert lines[-1].startswith("1/1 loss ")
    assert all(bool(torch.any(part.b != 0)) for part in trained.values())
    adapter.write_adapter(tmp_path, recipe, trained)
    found = read_adapter(tmp_path, read_config(MODEL_FOLDER, {}))
    assert (found.rank, found.parts, found.vision_parts) == (4, parts, vision)


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with a line that repeats the name, before anything is trained."""
    with pytest.raises(SystemExit):
        adapter.main(["pirate"])
    assert "no adapter is named pirate" in capsys.readouterr().err
