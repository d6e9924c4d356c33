"""First lesson, to see: the vision tower alone, told what every visual token shows.

Each 28-pixel cell learns what covers it: kind, colour, box, rank from left to right and from top to
bottom, size among the others, how many there are like it, and the direction in which it moves; an
attention pool learns the letters of a text. What a cell knows, the decoder only has to look up. The
heads are thrown away when the model has learnt to speak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn

from qwen2vl_serve.demo.names import CHARACTERS, COLOURS
from qwen2vl_serve.demo.network import CELL, CLIP_STD, PATCH, Network
from qwen2vl_serve.demo.pictures import (
    CLASSES,
    KINDS,
    SLOTS,
    STEPS,
    UNASKED,
    Dense,
    Grid,
    Store,
    dense_targets,
    pair_targets,
    slot_targets,
)
from qwen2vl_serve.demo.steps import Optimizers, Schedule, Snapshot, Together

# What the steps look at, in turn: single large things; then crowds, whole pictures, frame pairs.
SIMPLE = ("simple",)
CROWDED = ("crowds", "pictures", "crowds", "pictures", "videos")

# Weights of the dense classes in the loss.
SHARES = {"kind": 1.0, "colour": 1.0, "rank": 0.5, "anchor": 0.5, "things": 0.4,
          "same kind": 0.4, "same colour": 0.4, "rank down": 0.4, "size": 0.3, "across": 0.4,
          "down": 0.4, "motion": 0.5, "second colour": 0.5}  # fmt: skip
SIDES_SHARE = 0.2  # of each side's steps
SIDES = 4


class Heads(nn.Module):
    """What the visual tokens are asked while the tower learns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, sum(CLASSES.values()))
        self.box = nn.Linear(width, SIDES)
        self.sides = nn.Linear(width, SIDES * (STEPS + 1))
        self.place = nn.Linear(width, 2)
        self.queries = nn.Parameter(torch.randn(SLOTS, width) * 0.05)
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.letter = nn.Linear(width, len(CHARACTERS) + 1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """tokens [batch, cells, width] -> [batch, SLOTS, width], four heads of attention."""
        batch, _, width = tokens.shape

        def split(x: Tensor) -> Tensor:
            return x.reshape(batch, -1, 4, width // 4).transpose(1, 2)

        normed = self.norm(tokens)
        queries = split(self.queries.expand(batch, -1, -1).to(normed.dtype))
        keys, values = split(self.keys(normed)), split(self.values(normed))
        out = F.scaled_dot_product_attention(queries.to(keys.dtype), keys, values)
        return out.transpose(1, 2).reshape(batch, -1, width)


def picture_batch(
    store: Store, size: int, rng: np.random.Generator, crowded: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of one grid [size, 1, 3, height, width] and their targets, half of them mirrored.

    ``crowded`` pictures have more things and letters than are counted or read as one word.
    """
    grids = list(store.members)
    share = np.array([len(store.members[g]) for g in grids], dtype=np.float64)
    grid = grids[int(rng.choice(len(grids), p=share / share.sum()))]
    chosen = rng.choice(store.members[grid], size)
    pixels, cells, slots = [], [], []
    for index in chosen:
        picture, scene = store.load(int(index)), store.truths[int(index)]
        text = any(t.kind == "text" for t in scene.things)
        if not text and rng.random() < 0.5:
            picture, scene = picture[..., ::-1], scene.mirrored()
        pixels.append(picture)
        cells.append(dense_targets(scene, grid, crowded))
        if not crowded:
            slots.append(slot_targets(scene))
    targets = stacked(cells)
    if not crowded:
        targets["slots"] = torch.as_tensor(np.stack(slots))
    return torch.as_tensor(np.stack(pixels)), targets


def stacked(cells: list[Dense]) -> dict[str, Tensor]:
    """The fields of Dense, each [batch, cells, …]."""
    return {
        field.name: torch.as_tensor(np.stack([getattr(one, field.name) for one in cells]))
        for field in fields(Dense)
    }


def picture_loss(
    heads: Heads, tokens: Tensor, targets: dict[str, Tensor], grid: Grid
) -> tuple[Tensor, dict[str, float]]:
    """The sum of all pictures' losses and, for the log, the accuracy of each head."""
    normed = heads.norm(tokens)
    guesses = heads.classes(normed).float().split(list(CLASSES.values()), dim=-1)
    truths = targets["classes"].unbind(-1)
    shown = truths[1] < len(COLOURS)
    rows, columns = grid
    ys = (torch.arange(rows * columns) // columns + 0.5) / rows
    xs = (torch.arange(rows * columns) % columns + 0.5) / columns
    box = torch.sigmoid(heads.box(normed).float())
    missed = (box[shown] - targets["boxes"][shown]).abs().mean()
    place = torch.sigmoid(heads.place(normed).float()) - torch.stack([xs, ys], -1)
    loss = 4.0 * missed + 2.0 * place.abs().mean()
    balance = torch.where(shown, 1.0, 0.3)
    log: dict[str, float] = {}
    whole = ~targets["wholes"].isnan().any(-1)
    if whole.any():
        sides = heads.sides(normed[whole]).float().view(-1, SIDES, STEPS + 1)
        truth = targets["wholes"][whole].clamp(0, 1) * STEPS
        loss = loss + SIDES_SHARE * SIDES * steps_loss(sides, truth)
        log["sides"] = float((sides.detach().argmax(-1) - truth).abs().mean()) / STEPS
    for name, logits, truth in zip(CLASSES, guesses, truths, strict=True):
        asked = truth != UNASKED
        if not asked.any():
            continue
        losses = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
        loss = loss + SHARES[name] * (losses * balance).sum() / (balance * asked).sum()
        log[name] = share((logits.argmax(-1) == truth)[asked & shown])
    shape = shown & (truths[0] < len(KINDS) - len(CHARACTERS))
    right = guesses[0].argmax(-1) == truths[0]
    log |= {"shape": share(right[shape]), "letter": share(right[shown & ~shape]),
            "nothing": share(right[~shown]), "box": float(missed.detach())}  # fmt: skip
    if "slots" not in targets:
        return loss, log
    letters = heads.letter(heads.pooled(tokens)).float()
    written = (targets["slots"] < len(CHARACTERS)).any(1)
    reading = F.cross_entropy(letters.transpose(1, 2), targets["slots"], reduction="none")
    loss = loss + (reading * torch.where(written, 1.0, 0.1)[:, None]).mean()
    log["text"] = share((letters.argmax(-1) == targets["slots"]).all(1)[written])
    return loss, log


def steps_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of logits [n, SIDES, STEPS + 1] against a place between two steps.

    truth [n, SIDES] counts in steps. Each of the two takes the share that it is near.
    """
    low = truth.floor().clamp(max=STEPS - 1)
    part = truth - low
    chances = logits.log_softmax(-1)
    near, far = (chances.gather(-1, (low + k).long()[..., None])[..., 0] for k in (0, 1))
    return -((1 - part) * near + part * far).mean()


def share(right: Tensor) -> float:
    """The share of true values; 1 of none."""
    return float(right.float().mean()) if right.numel() else 1.0


def video_batch(
    store: Store, size: int, rng: np.random.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Frame pairs [size, 2, 3, height, width] of one grid and their targets.

    Half of the videos are mirrored, half run backwards.
    """
    grids = list(store.members)
    share = np.array([len(store.members[g]) for g in grids], dtype=np.float64)
    grid = grids[int(rng.choice(len(grids), p=share / share.sum()))]
    pairs, cells = [], []
    for index in rng.choice(store.members[grid], size):
        frames, clip = store.load(int(index)), store.truths[int(index)]
        if rng.random() < 0.5:
            frames, clip = frames[..., ::-1], clip.mirrored()
        if rng.random() < 0.5:
            frames, clip = frames[::-1], clip.reversed()
        first = int(rng.integers(0, (len(frames) + 1) // 2)) * 2
        pair = frames[first : first + 2]
        pairs.append(pair if len(pair) == 2 else np.repeat(pair, 2, axis=0))
        cells.append(pair_targets(clip, first, grid))
    return torch.as_tensor(np.stack(pairs)), stacked(cells)


def seen_loss(
    network: Network, heads: Heads, batch: Tensor, targets: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """``picture_loss`` of a batch of pictures or frame pairs."""
    grid = (batch.shape[-2] // CELL, batch.shape[-1] // CELL)
    return picture_loss(heads, network.visual(batch), targets, grid)


def whiten(network: Network, pictures: Store, seed: int) -> None:
    """Start the patch embedding from the principal components of the drawn patches.

    Flat colour dominates a patch's variance and edges have hardly any: from a random start the
    tower learns colours and then stands still on shapes. Scaled to unit variance, edges count as
    much. Seven eighths of the components see the mean of the two frames, the rest their difference.
    """
    rng = np.random.default_rng((seed, 4))
    patches = []
    for index in rng.choice(len(pictures.grids), 1_500).tolist():
        picture = pictures.load(index)[0]
        for _ in range(40):
            y, x = rng.integers(0, np.array(picture.shape[1:]) // PATCH) * PATCH
            patches.append(picture[:, y : y + PATCH, x : x + PATCH].reshape(-1))
    stack = torch.as_tensor(np.stack(patches)).double() / 255.0
    std = torch.tensor(CLIP_STD, dtype=torch.float64).repeat_interleave(PATCH * PATCH)
    stack = (stack - stack.mean(0)) / std
    values, vectors = torch.linalg.eigh(stack.T @ stack / len(stack))
    components = (vectors / (values.clamp(min=0) + 0.02).sqrt()).flip(1).T.float()
    weight = network.visual.patch_embed.proj.weight
    dim = weight.shape[0]
    still = dim * 7 // 8
    kernels = components.view(-1, 3, PATCH, PATCH)
    with torch.no_grad():
        weight[:still] = (kernels[:still] / 2).unsqueeze(2)
        moving = kernels[: dim - still].unsqueeze(2)
        weight[still:] = torch.cat([moving, -moving], dim=2)


def settle(network: Network, pictures: Store, size: float = 1.0) -> None:
    """Scale the tower's output to this root mean square over a few pictures.

    Nothing in the first lesson fixes its size. Left large, the decoder's first layers cannot mark
    a visual token with what they find out about it, such as the number of its picture.
    """
    with torch.inference_mode():
        few = [network.visual(torch.tensor(pictures.load(n)[None])) for n in range(64)]
        found = float(torch.stack([tokens.square().mean() for tokens in few]).mean().sqrt())
    last = network.visual.merger.mlp[2]
    assert isinstance(last, nn.Linear)  # noqa: S101  (for the type checker)
    with torch.no_grad():
        last.weight.mul_(size / found)
        last.bias.mul_(size / found)


def learn_to_see(  # noqa: PLR0917
    network: Network,
    heads: Heads,
    stores: dict[str, Store],
    turns: tuple[str, ...],
    path: Path,
    schedule: Schedule,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Train ``network.visual`` with ``heads`` on the stores named in ``turns``, one a step.

    Resumes from the snapshot at ``path`` if there is one. ``seed`` differs from lesson to lesson.
    """
    modules = Together({"visual": network.visual, "heads": heads})
    optimizer = Optimizers(modules, schedule.rate)
    snapshot = Snapshot(path, modules, optimizer)
    smooth: dict[str, float] = {}
    for step in range(snapshot.restore(), schedule.end):
        rng = np.random.default_rng((seed, 1, step))
        schedule.apply(optimizer, step)
        name = turns[step % len(turns)]
        if name == "videos":  # small frames, so twice as many
            batch, targets = video_batch(stores[name], schedule.batch * 2, rng)
        else:
            batch, targets = picture_batch(stores[name], schedule.batch, rng, name == "crowds")
        loss, log = modules.in_working_type(partial(seen_loss, network, heads, batch, targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        for told, value in log.items():
            key = f"{name} {told}"
            smooth[key] = smooth.get(key, value) * 0.95 + value * 0.05
        if step % 25 == 24 or step == schedule.end - 1:
            text = " ".join(f"{key} {value:.3f}" for key, value in sorted(smooth.items()))
            say(f"see {step + 1}/{schedule.end} {text}")
        if step % 100 == 99 or step == schedule.end - 1:
            snapshot.save(step + 1)
