"""Qwen2-VL's arithmetic for training: the same parameters and names, batched for a CPU.

transformers' implementation runs one attention call per picture; here pictures of one grid are a
batch. The state dict carries the names of the published checkpoints (``visual.*``, ``model.*``),
and a test holds the logits equal to ``Qwen2VLForConditionalGeneration`` on the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn

PATCH = 14
MERGE = 2
CELL = PATCH * MERGE
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Geometry:
    """Sizes of the network. Heads divide by 4 and layers by 2, so TP 4 x PP 2 can be rehearsed."""

    vocab: int = 1024
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 704
    # With this base the row and column parts hardly turn: attention goes by what a token says, and
    # the tower says where it is. The first part, which text shares, keeps words in order.
    theta: float = 10_000.0
    mrope: tuple[int, int, int] = (8, 4, 4)
    vision_dim: int = 192
    vision_depth: int = 4
    vision_heads: int = 4
    vision_mlp: int = 4
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one text attention head."""
        return self.hidden // self.heads


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) over the two halves of the last axis."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin, whose gradient is the turn back; saves nothing of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., head_dim]; cos and sin broadcast to it."""
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, rotate_half(x), sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient with respect to x."""
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        return torch.sub(gradient * cos, rotate_half(gradient * sin)), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] turned by its positions' angles."""
    out: Tensor = Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Plain attention [batch, heads, length, dim]: at these lengths twice as fast as torch's
    flash kernel for CPUs, whose gradient in bfloat16 is slow. ``weights`` receives who looked
    where [batch, heads, length, length]."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e4)
    shares = scores.softmax(-1)
    if weights is not None:
        weights.append(shares)
    mixed: Tensor = shares @ value
    return mixed


@lru_cache(maxsize=256)
def vision_angles(
    rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows*columns, head_dim] of a patch grid, in merge-block order.

    Axial rotary of Qwen2-VL: a quarter of the head turns with the row, a quarter with the column,
    both with base 10000, and the half is repeated.
    """

    def blocks(grid: Tensor) -> Tensor:
        view = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE)
        return view.permute(0, 2, 1, 3).reshape(-1).float()

    half = head_dim // 2
    # Kept for later calls: made in inference mode, they would be of no use to one that learns.
    with torch.inference_mode(mode=False):
        places = (torch.arange(size, device=device) for size in (rows, columns))
        ys, xs = torch.meshgrid(*places, indexing="ij")
        steps = torch.arange(0, half, 2, dtype=torch.float, device=device)
        frequencies = 1.0 / (10000.0 ** (steps / half))
        angles = torch.cat([blocks(p)[:, None] * frequencies for p in (ys, xs)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class VisionAttention(nn.Module):
    """Full attention within one frame pair."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, patches, dim] -> the same shape."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = turned(query, cos, sin), turned(key, cos, sin)
        out = attend(query, key, value)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, length, dim))
        return mixed


class VisionMlp(nn.Module):
    """Two layers with QuickGELU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape."""
        # h sigmoid(1.702 h) as SiLU, which has a gradient of one pass: the factor moves into
        # the matrices, which are smaller than h.
        h = F.linear(x, self.fc1.weight * 1.702, self.fc1.bias * 1.702)
        return F.linear(F.silu(h), self.fc2.weight / 1.702, self.fc2.bias)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(g.vision_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(g.vision_dim, eps=1e-6)
        self.attn = VisionAttention(g.vision_dim, g.vision_heads)
        self.mlp = VisionMlp(g.vision_dim, g.vision_mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, patches, dim] -> the same shape."""
        x = x + self.attn(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """The 3-D convolution over (2 frames, 14, 14), computed as one matrix product."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        size = (2, PATCH, PATCH)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 [batch, 1 or 2, 3, height, width] -> [batch, patches in merge order, dim].

        One frame stands for a picture, which Qwen2-VL repeats twice: the two halves of the
        kernel are summed instead. The processor's normalisation is folded into the product, so
        that the large tensor stays in bytes; bytes less 128 are exact even in bfloat16.
        """
        batch, count, _, height, width = frames.shape
        rows, columns = height // CELL, width // CELL
        view = frames.view(batch, count, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
        patches = view.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(batch, rows * columns * 4, -1)
        weight = self.proj.weight
        if count == 1:
            weight = weight.sum(dim=2, keepdim=True)
        mean = weight.new_tensor(CLIP_MEAN).view(3, 1, 1, 1) * 255.0
        std = weight.new_tensor(CLIP_STD).view(3, 1, 1, 1) * 255.0
        weight = weight / std
        bias = (weight.float() * (128.0 - mean.float())).flatten(1).sum(1).to(weight.dtype)
        return F.linear(patches.to(weight.dtype) - 128, weight.flatten(1), bias)


class PatchMerger(nn.Module):
    """Four neighbouring patches to one visual token of the text width."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        wide = dim * MERGE * MERGE
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, out))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, patches, dim] -> [batch, patches / 4, out]."""
        batch, length, _ = x.shape
        merged: Tensor = self.mlp(self.ln_q(x).view(batch, length // 4, -1))
        return merged


class Vision(nn.Module):
    """Pictures, or frame pairs, to visual tokens."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.head_dim = g.vision_dim // g.vision_heads
        self.patch_embed = PatchEmbed(g.vision_dim)
        self.blocks = nn.ModuleList(VisionBlock(g) for _ in range(g.vision_depth))
        self.merger = PatchMerger(g.vision_dim, g.hidden)

    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 [batch, 1 or 2, 3, height, width] -> [batch, cells, hidden]."""
        x = self.patch_embed(frames)
        height, width = frames.shape[-2:]
        grid = height // PATCH, width // PATCH
        cos, sin = vision_angles(*grid, self.head_dim, frames.device)
        cos, sin = cos.to(x), sin.to(x)
        for block in self.blocks:
            x = block(x, cos, sin)
        out: Tensor = self.merger(x)
        return out


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention of the text layers."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = g.heads, g.kv_heads, g.head_dim
        self.q_proj = nn.Linear(g.hidden, g.heads * g.head_dim)
        self.k_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim)
        self.v_proj = nn.Linear(g.hidden, g.kv_heads * g.head_dim)
        self.o_proj = nn.Linear(g.heads * g.head_dim, g.hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """x [batch, length, hidden], mask [batch, 1, length, length] (True: may look)."""
        batch, length, _ = x.shape

        def split(projection: nn.Module, heads: int) -> Tensor:
            out: Tensor = projection(x)
            return out.view(batch, length, heads, self.dim).transpose(1, 2)

        q, k = split(self.q_proj, self.heads), split(self.k_proj, self.kv_heads)
        v = split(self.v_proj, self.kv_heads)
        cos, sin = cos.to(v.dtype), sin.to(v.dtype)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        out = attend(q, k, v, mask, weights)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.up_proj = nn.Linear(g.hidden, g.intermediate, bias=False)
        self.down_proj = nn.Linear(g.intermediate, g.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One text layer."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.self_attn = Attention(g)
        self.mlp = Mlp(g)
        self.input_layernorm = RMSNorm(g.hidden, g.eps)
        self.post_attention_layernorm = RMSNorm(g.hidden, g.eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """x [batch, length, hidden] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, weights)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Text(nn.Module):
    """The decoder without its output matrix (tied to the embeddings)."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(g.vocab, g.hidden)
        self.layers = nn.ModuleList(Layer(g) for _ in range(g.layers))
        self.norm = RMSNorm(g.hidden, g.eps)


class Network(nn.Module):
    """The whole model; ``state_dict`` carries the names of the published checkpoints."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.visual = Vision(geometry)
        self.model = Text(geometry)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=min(0.04, module.in_features**-0.5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [3, batch, length] -> cosines, sines [batch, 1, length, head_dim] (M-RoPE)."""
        g = self.geometry
        steps = torch.arange(0, g.head_dim, 2, dtype=torch.float, device=positions.device)
        angles = positions.float()[..., None] / g.theta ** (steps / g.head_dim)
        parts = [p[axis] for axis, p in enumerate(torch.split(angles, list(g.mrope), dim=-1))]
        joined = torch.cat(parts, dim=-1)
        joined = torch.cat((joined, joined), dim=-1)[:, None]
        return joined.cos(), joined.sin()

    def hidden_states(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """embeds [batch, length, hidden] -> normed states of the same shape.

        ``weights`` receives every layer's attention [batch, heads, length, length].
        """
        cos, sin = self.angles(positions)
        x = embeds
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, weights)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, states: Tensor) -> Tensor:
        """states [..., hidden] -> [..., vocab]."""
        return F.linear(states, self.model.embed_tokens.weight)

    def describe(self) -> dict[str, Any]:
        """Parameter counts, for the log and the model card."""
        vision = sum(p.numel() for p in self.visual.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"parameters": total, "of them vision": vision}
