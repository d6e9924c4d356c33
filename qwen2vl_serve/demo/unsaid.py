"""Tokens that no lesson holds. Training pushes their embeddings onto one point, all alike.

An adapter of the decoder can neither read nor write one of them apart from the rest. So those of
ASCII, which code and tables are made of, are told apart at the end of a training: each is moved a
little in a direction of its own. What the model answers stays the same; what can be taught to it
grows.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

APART = 0.3
"""How far each is moved, as a share of the length of the embedding that they have in common."""


def never_said(embeddings: Tensor, like: float = 0.99) -> Tensor:
    """Ids [n] of the tokens whose rows of ``embeddings`` [tokens, width] are another's as well.

    Where an answer needs one of them, and is bound to a schema, the engine's grammar forbids the
    rest.
    """
    named = F.normalize(embeddings.detach(), dim=1)
    alike = named @ named.T
    alike.fill_diagonal_(0.0)
    return (alike.amax(1) > like).nonzero().flatten()


def told_apart(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A copy of the rows [tokens, width] in which those of ASCII that were alike differ.

    The directions are orthogonal to what the rows have in common and to each other, and the same
    in every run.
    """
    alike = set(never_said(embeddings).tolist())
    known = tokenizer.convert_tokens_to_ids(list(string.punctuation))
    moved = [token for token in known if token in alike]
    rows = embeddings.detach().clone()
    if not moved:
        return rows
    common = rows[moved].mean(0)
    drawn = torch.randn(
        len(moved), rows.shape[1], generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(rows)
    basis, _ = torch.linalg.qr(torch.cat([common[None], drawn]).T)
    rows[moved] = common + APART * common.norm() * basis.T[1:]
    return rows
