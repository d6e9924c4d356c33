"""The training script runs from nothing to a checkpoint, and a seed decides every weight."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.conversation import Step
from qwen2vl_serve.demo.eyes import AtRest, Awake
from qwen2vl_serve.demo.network import Geometry, Network
from qwen2vl_serve.demo.pictures import build_store
from qwen2vl_serve.demo.rows import Encoder
from qwen2vl_serve.demo.see import picture_batch, video_batch
from qwen2vl_serve.demo.steps import working_type
from qwen2vl_serve.demo.train import REHEARSAL, train
from qwen2vl_serve.demo.unsaid import never_said


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
    # It ends by telling apart what the lessons left alike.
    alike = AutoTokenizer.from_pretrained(MODEL_FOLDER).convert_tokens_to_ids(["<", ">", "/"])
    shutil.copytree(MODEL_FOLDER, tmp_path / "alike")
    embeddings = before["model.embed_tokens.weight"]
    embeddings[alike] = embeddings[alike[0]].clone()
    save_file(before, tmp_path / "alike" / "model.safetensors", metadata={"format": "pt"})
    train(all_kept, tmp_path / "work", tmp_path / "told", 5, lines.append, tmp_path / "alike")
    told = load_file(tmp_path / "told" / "model.safetensors")["model.embed_tokens.weight"]
    assert (told != embeddings).any(1).nonzero().flatten().tolist() == sorted(alike)
    assert not {*alike} & {*never_said(told.float()).tolist()}


def test_a_step_is_computed_on_the_default_device(tmp_path):
    """All that a lesson makes of pictures and words lies there: torch mixes no two devices.

    "meta" has shapes and no values, so that any machine can show what a card needs.
    """
    names = ("pictures", "videos", "crowds")
    stores = {name: build_store(tmp_path, name, 24, 5, workers=1) for name in names}
    rng = np.random.default_rng(0)
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
    with torch.device("meta"):
        assert working_type() is torch.bfloat16
        network = Network(Geometry())
        for batch, targets in (
            picture_batch(stores["pictures"], 3, rng, crowded=False),
            picture_batch(stores["crowds"], 3, rng, crowded=True),
            video_batch(stores["videos"], 3, rng),
        ):
            assert network.visual(batch).is_meta
            assert all(target.is_meta for target in targets.values())
        shown = {name: stores[name] for name in ("pictures", "videos")}
        for eyes, few_grids in ((Awake(network, shown), True), (AtRest(network, shown), False)):
            step = Step(rng, shown, encoder, few_grids=few_grids)
            packed = step.rows(2)
            seen = eyes.look(step.shown)
            assert all(tokens.is_meta for tokens in (*seen, *packed.sources))
            for tensor in (packed.ids, packed.positions, packed.mask, packed.asked, packed.answers):
                assert tensor.is_meta
            embeds = network.model.embed_tokens(packed.ids)
            states = network.hidden_states(embeds, packed.positions, packed.mask)
            assert network.logits(states).is_meta
