"""The training script runs from nothing to a checkpoint, and a seed decides every weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.train import REHEARSAL, train


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other at every step beside the tests of another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_runs_give_the_same_weights(tmp_path):
    """Draw, see, speak, write: twice the same; an interrupted run ends the same as well."""
    lines: list[str] = []
    train(REHEARSAL, tmp_path / "a", tmp_path / "one", 5, lines.append)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "store").symlink_to(tmp_path / "a" / "store")
    train(REHEARSAL, tmp_path / "b", tmp_path / "two", 5, lines.append)
    train(replace(REHEARSAL), tmp_path / "b", tmp_path / "three", 5, lines.append)
    one, two, three = (
        load_file(tmp_path / n / "model.safetensors") for n in ("one", "two", "three")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert any("speak" in line for line in lines)


def test_a_checkpoint_is_trained_further(tmp_path):
    """Its tokenizer stays, its weights move from where they were, and it need not begin anew."""
    lines: list[str] = []
    train(REHEARSAL, tmp_path / "work", tmp_path / "out", 5, lines.append, MODEL_FOLDER)
    before, after = (load_file(f / "model.safetensors") for f in (MODEL_FOLDER, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = [(after[n].float() - w.float()).norm() / w.float().norm() for n, w in before.items()]
    assert 0 < max(moved) < 0.7
    tokens = "tokenizer.json"
    assert (tmp_path / "out" / tokens).read_bytes() == (MODEL_FOLDER / tokens).read_bytes()
    assert not (tmp_path / "work" / "simple.pt").exists()
    # The snapshots are taken up; in a mean that keeps all of the old weights no step is left.
    all_kept = replace(REHEARSAL, kept=1.0)
    train(all_kept, tmp_path / "work", tmp_path / "kept", 5, lines.append, MODEL_FOLDER)
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in before.items())
