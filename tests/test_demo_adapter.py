"""The script that trains the demo's adapters, for one step."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_serve.adapters.lora import read_adapter
from qwen2vl_serve.checkpoints.checkpoint import read_config
from qwen2vl_serve.demo import adapter
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER


@pytest.mark.parametrize(
    ("name", "rank", "parts", "vision"),
    [("sailor", 4, 20, 0), ("mirror", 4, 14, 14), ("clerk", 16, 28, 0), ("seller", 16, 28, 0)],
)
def test_a_step_makes_an_adapter(
    name: str, rank: int, parts: int, vision: int, tmp_path: Path
) -> None:
    """It learns something, of the parts that its recipe names alone, and is whole on the disk."""
    recipe = replace(adapter.RECIPES[name], steps=1, batch=1)
    lines: list[str] = []
    trained = adapter.train(recipe, 0, lines.append)
    assert lines[-1].startswith("1/1 loss ")
    assert all(bool(torch.any(part.b != 0)) for part in trained.values())
    adapter.write_adapter(tmp_path, recipe, trained)
    found = read_adapter(tmp_path, read_config(MODEL_FOLDER, {}))
    assert (found.rank, found.parts, found.vision_parts) == (rank, parts, vision)


def test_a_name_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with a line that repeats the name, before anything is trained."""
    with pytest.raises(SystemExit):
        adapter.main(["pirate"])
    assert "no adapter is named pirate" in capsys.readouterr().err


def test_an_adapter_is_trained_further(tmp_path: Path) -> None:
    """It begins with what was written: a step at a rate of nothing leaves it as it was."""
    recipe = replace(adapter.RECIPES["sailor"], steps=1, batch=1)
    adapter.write_adapter(tmp_path, recipe, adapter.train(recipe, 0, str))
    still = replace(recipe, rate=1e-12)
    again = adapter.train(still, 1, str, tmp_path)
    adapter.write_adapter(tmp_path / "again", still, again)
    one, two = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(torch.any(part.b != 0)) for part in again.values())


@pytest.mark.parametrize(
    ("folder", "words"),
    [("nothing", "nothing/sailor/adapter_model.safetensors cannot be read"),
     ("other", "other/sailor/adapter_model.safetensors is no adapter of this recipe")],
)  # fmt: skip
def test_what_cannot_be_trained_further_is_told(
    folder: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line with status 2, and nothing is written."""
    shutil.copytree(adapter.ADAPTERS_FOLDER / "mirror", tmp_path / "other" / "sailor")
    out, further = tmp_path / "out", tmp_path / folder
    monkeypatch.setattr(adapter, "keep_memory", lambda: None)  # it would stay with this process
    with pytest.raises(SystemExit) as ended:
        adapter.main(["sailor", "--steps=1", f"--out={out}", f"--further={further}"])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
