"""Matrices in groups of integers, and the two layouts in which such checkpoints are published.

A matrix is [inputs, outputs] here. ``group`` inputs share a scale and a zero point: a code c stands
for (c - zero) × scale. AutoGPTQ packs codes along the inputs, AutoAWQ along the outputs and in an
order of its own; both put the first into the lowest bits of an int32. Source: ``auto_gptq.py`` and
``auto_awq.py`` in vLLM 0.32's ``quantization``, whose own packing a test compares with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Which of eight neighbouring outputs is in which four bits.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Codes:
    """codes [inputs, outputs] of ``bits``; scales and zeros [groups, outputs]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    def matrix(self) -> Tensor:
        """What the codes stand for, as float32."""
        repeat = self.codes.shape[0] // self.scales.shape[0]
        scales, zeros = (
            part.float().repeat_interleave(repeat, dim=0) for part in (self.scales, self.zeros)
        )
        return (self.codes.float() - zeros) * scales


def grid(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """weight [..., group, outputs] -> scales and zeros [..., outputs].

    Scales are rounded as half floats hold them. Symmetric grids have their zero in the middle, as
    GPTQ's kernels take for granted; the others reach from the least weight to the greatest.
    """
    least, most = weight.amin(-2).clamp(max=0), weight.amax(-2).clamp(min=0)
    if symmetric:
        most = torch.maximum(-least, most)
        least = -most
    scales = ((most - least) / (2**bits - 1)).clamp(min=1e-5).half().float()
    middle = torch.full_like(scales, 2.0 ** (bits - 1))
    return scales, middle if symmetric else (-least / scales).round().clamp(0, 2**bits - 1)


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The codes next to weights, which scales and zeros broadcast to."""
    return (weight / scales + zeros).round().clamp(0, 2**bits - 1)


def rounded(weight: Tensor, bits: int, group: int, *, symmetric: bool) -> Codes:
    """weight [inputs, outputs] by rounding alone."""
    inputs, outputs = weight.shape
    grouped = weight.float().view(inputs // group, group, outputs)
    scales, zeros = grid(grouped, bits, symmetric=symmetric)
    codes = nearest(grouped, scales[:, None], zeros[:, None], bits)
    return Codes(codes.view(inputs, outputs), scales, zeros, bits)


def packed(values: Tensor, bits: int) -> Tensor:
    """values [rows, columns] -> int32 [rows, columns × bits / 32], the first in the lowest bits."""
    each = 32 // bits
    parts = values.long().view(values.shape[0], -1, each)
    whole = (parts << torch.arange(0, 32, bits)).sum(-1)
    # Above the sign bit an int32 is negative.
    return torch.where(whole >= 2**31, whole - 2**32, whole).int().contiguous()


def gptq_tensors(found: Codes) -> dict[str, Tensor]:
    """A layer as AutoGPTQ writes it. Zeros are stored less one; ``g_idx`` is each input's group."""
    inputs, groups = found.codes.shape[0], found.scales.shape[0]
    return {
        "qweight": packed(found.codes.T, found.bits).T.contiguous(),
        "qzeros": packed(found.zeros - 1, found.bits),
        "scales": found.scales.half().contiguous(),
        "g_idx": (torch.arange(inputs) // (inputs // groups)).int(),
    }


def awq_tensors(found: Codes) -> dict[str, Tensor]:
    """A layer as AutoAWQ writes it, of four bits."""

    def ordered(values: Tensor) -> Tensor:
        rows, columns = values.shape
        return values.view(rows, -1, len(AWQ_ORDER))[:, :, AWQ_ORDER].reshape(rows, columns)

    return {
        "qweight": packed(ordered(found.codes), found.bits),
        "qzeros": packed(ordered(found.zeros), found.bits),
        "scales": found.scales.half().contiguous(),
    }
