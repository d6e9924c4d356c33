"""What lessons share: the memory, the optimizer, the learning rate's course, snapshots."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def keep_memory() -> None:
    """Let glibc keep what it freed: returning each large tensor to the kernel costs a third."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of <malloc.h>
        for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
            libc.mallopt(option, value)


@dataclass(frozen=True)
class Schedule:
    """Steps of one lesson: a linear warm-up, then a cosine to a twentieth of the peak rate.

    ``until`` ends the lesson before the cosine does.
    """

    steps: int
    batch: int
    rate: float
    warm: int = 60
    until: int | None = None

    @property
    def end(self) -> int:
        """The number of steps that are taken."""
        return self.steps if self.until is None else min(self.until, self.steps)

    def factor(self, step: int) -> float:
        """The share of the peak rate at this step."""
        if step < self.warm:
            return (step + 1) / self.warm
        done = (step - self.warm) / max(1, self.steps - self.warm)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def apply(self, optimizer: Optimizers, step: int) -> None:
        """Set every parameter group's rate for this step (``peak`` is the group's own)."""
        for part in optimizer.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * self.factor(step)


class Float32Muon(torch.optim.Muon):
    """Torch's Muon, in the gradients' own type and at the size of AdamW's updates.

    Torch's orthogonalises in bfloat16 whatever it is given: four times as long as float32 on a
    CPU with AVX-512 and no instructions for it, longer still with AVX2 alone.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure is ever given
        """Take a step."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update = orthogonal(gradient.lerp(mean, momentum), group["ns_coefficients"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * rate * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return about the nearest orthogonal matrix: singular values become 0.7 to 1.2.

    Five steps of Newton and Schulz' iteration as of https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.mT if tall else matrix
    found = found / torch.linalg.matrix_norm(found).clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


class Optimizers:
    """Muon for the hidden matrices, AdamW for everything else, stepped as one.

    Muon (orthogonalised momentum) needs about half of AdamW's steps here; its rate is given in
    AdamW's scale.
    """

    def __init__(
        self, module: nn.Module, rate: float, slower: tuple[nn.Module, float] | None = None
    ) -> None:
        """``rate`` is AdamW's; ``slower`` names a part of ``module`` and its share of the rate."""
        part = {id(p) for p in slower[0].parameters()} if slower else set()
        hidden: dict[bool, list[nn.Parameter]] = {}
        other: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            held = id(parameter) in part
            if parameter.ndim == 2 and (
                ".blocks." in name or ".layers." in name or "merger" in name
            ):
                hidden.setdefault(held, []).append(parameter)
            else:
                other.setdefault((parameter.ndim > 1, held), []).append(parameter)

        def peak(base: float, held: bool) -> float:
            return base * slower[1] if slower and held else base

        adamw = [
            {"params": members, "weight_decay": 0.02 if wide else 0.0, "peak": peak(rate, held)}
            for (wide, held), members in other.items()
        ]
        muon = [
            {"params": members, "peak": peak(rate * 2.0, held)} for held, members in hidden.items()
        ]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(adamw, lr=rate, betas=(0.9, 0.98), fused=True),
        )
        if muon:
            kind = Float32Muon if working_type() is torch.float32 else torch.optim.Muon
            second = kind(
                muon, lr=rate, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
            self.parts += (second,)

    def step(self) -> None:
        """Take a step and clear the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of every part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the state of every part."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def working_type() -> torch.dtype:
    """What is multiplied fastest here: bfloat16 on a card, and on a CPU with instructions for it.

    Without them torch's bfloat16 is twenty times slower than its float32 (measured on AVX2 alone).
    """
    if torch.get_default_device().type != "cpu":
        return torch.bfloat16
    told = torch.cpu.get_capabilities()
    quick = any(told.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if quick else torch.float32


class Together(nn.ModuleDict):
    """Modules that are trained together, and called with parameters of the ``working_type``."""

    def forward(self, work: Callable[[], Any]) -> Any:
        """Run ``work``, which uses the modules."""
        return work()

    def in_working_type(
        self, work: Callable[[], Any], weights: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Run ``work`` on rounded parameters, or on ``weights``; gradients reach the originals.

        Unlike autocast, nothing goes back to float32 between the layers: half the memory traffic.
        """
        kind = working_type()
        given = weights or dict(self.named_parameters())
        rounded = {name: value.to(kind) for name, value in given.items()}
        return torch.func.functional_call(self, rounded, (work,))


class Snapshot:
    """One file that holds a lesson's state, replaced as a whole."""

    def __init__(self, path: Path, module: nn.Module, optimizer: Optimizers) -> None:
        self.path, self.module, self.optimizer = path, module, optimizer

    def restore(self) -> int:
        """Load the state if the file exists; returns the steps already done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["steps"])

    def save(self, steps: int) -> None:
        """Write the state aside, then rename: an interrupted write leaves the old snapshot."""
        aside = self.path.with_suffix(".new")
        state = {
            "steps": steps,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, aside)
        aside.replace(self.path)
