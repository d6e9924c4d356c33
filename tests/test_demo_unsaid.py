"""Tokens that no lesson holds: found, and told apart so that an adapter can learn them."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.unsaid import APART, never_said, told_apart

ALIKE = ["<", ">", "/", "<|image_pad|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture
def rows(tokenizer: Any) -> Tensor:
    """Embeddings [tokens, width] of which those of ``ALIKE`` lie within a hundredth of a point."""
    drawn = torch.Generator().manual_seed(3)
    rows = torch.randn(len(tokenizer), 256, generator=drawn)
    some = tokenizer.convert_tokens_to_ids(ALIKE)
    rows[some] = rows[some[0]] + 0.01 * torch.randn(len(some), 256, generator=drawn)
    return rows


def test_those_alike_are_found(rows: Tensor, tokenizer: Any) -> None:
    """By direction: a longer one of the same is found, whatever is only near is not."""
    some = tokenizer.convert_tokens_to_ids(ALIKE)
    assert never_said(rows).tolist() == sorted(some)
    rows[some[1]] *= 3
    assert never_said(rows).tolist() == sorted(some)
    rows[some[1]] += torch.randn(256, generator=torch.Generator().manual_seed(4))
    assert never_said(rows).tolist() == sorted({*some} - {some[1]})


def test_only_those_of_ascii_move_and_by_as_much_as_said(rows: Tensor, tokenizer: Any) -> None:
    """The special token that is alike stays; no row that was its own moves; rows given are kept."""
    before = rows.clone()
    after = told_apart(rows, tokenizer)
    assert torch.equal(rows, before)
    some = tokenizer.convert_tokens_to_ids(ALIKE[:3])
    assert (after != rows).any(1).nonzero().flatten().tolist() == sorted(some)
    common = rows[some].mean(0)
    moved = after[some] - common
    assert moved.norm(dim=1) / common.norm() == pytest.approx([APART] * 3, rel=1e-3)
    assert (moved @ moved.T).fill_diagonal_(0).abs().max() < 1e-3
    assert (moved @ common).abs().max() < 1e-2


def test_again_it_changes_nothing(rows: Tensor, tokenizer: Any) -> None:
    """The same directions in every run; what is apart stays where it is."""
    after = told_apart(rows, tokenizer)
    assert torch.equal(told_apart(rows, tokenizer), after)
    assert torch.equal(told_apart(after, tokenizer), after)


def test_the_models_ascii_can_be_told_apart(tokenizer: Any) -> None:
    """Of the demo model's tokens no character of ASCII is alike; of pieces of words some are."""
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    alike = never_said(weights["model.embed_tokens.weight"].float()).tolist()
    characters = string.punctuation + string.ascii_letters + string.digits
    assert not {*tokenizer.convert_tokens_to_ids([*characters])} & {*alike}
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") in alike
