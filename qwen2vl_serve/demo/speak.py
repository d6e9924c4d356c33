"""Second lesson, to speak: questions and answers about what the tower sees.

The tower either rests, which makes a step half as long, or goes on learning from the answers and
from dense targets, of the rows' own pictures and of a few crowded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor

from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene
from qwen2vl_serve.demo.lesson import about_picture, about_pictures, about_video, language_of
from qwen2vl_serve.demo.network import Network
from qwen2vl_serve.demo.pictures import Grid, Store, dense_targets, slot_targets
from qwen2vl_serve.demo.rows import SYSTEM_SHARES, SYSTEMS, Encoder, Media, Packed, Row, pack
from qwen2vl_serve.demo.see import Heads, picture_batch, picture_loss, seen_loss
from qwen2vl_serve.demo.steps import Optimizers, Schedule, Snapshot, Together
from qwen2vl_serve.demo.talk import talk_question
from qwen2vl_serve.demo.wording import Dialogue

ROW_TOKENS = 300
# Shares of a step's rows by what they are about.
KINDS = ("picture", "pictures", "video", "question first", "talk")
KIND_SHARES = (0.46, 0.24, 0.13, 0.12, 0.05)


class Step:
    """The pictures and rows of one step, all drawn from the step's own generator.

    Pictures come from at most two grids, so that the tower runs over two stacks.
    """

    def __init__(
        self, rng: np.random.Generator, stores: dict[str, Store], encoder: Encoder
    ) -> None:
        self._rng, self._encoder = rng, encoder
        self._pictures, self._videos = stores["pictures"], stores["videos"]
        self._grids = [_common_grid(rng, self._pictures) for _ in range(2)]
        self._video_grid = _common_grid(rng, self._videos)
        self.stacks: dict[tuple[Grid, bool], list[np.ndarray]] = {}
        self.scenes: dict[Grid, list[Scene]] = {}
        self.media: list[tuple[tuple[Grid, bool], int, int]] = []  # stack, first, frames

    def _picture(self, like: Scene | None = None) -> tuple[Media, Scene]:
        """A picture; with ``like``, one that shares its first thing's colour or shape."""
        rng = self._rng
        grid = self._grids[int(rng.integers(2))]
        for index in rng.choice(self._pictures.members[grid], 24).tolist():
            if like is None or _shares(like, self._pictures.truths[index]):
                break
        pixels, scene = self._pictures.load(index), self._pictures.truths[index]
        if not any(t.kind == "text" for t in scene.things) and rng.random() < 0.5:
            pixels, scene = pixels[..., ::-1], scene.mirrored()
        stack = self.stacks.setdefault((grid, False), [])
        self.scenes.setdefault(grid, []).append(scene)
        self.media.append(((grid, False), len(stack), 1))
        stack.append(pixels)
        return Media(len(self.media) - 1, 1, *grid, video=False), scene

    def _row(self, kind: str) -> Row:
        rng, encoder, row = self._rng, self._encoder, Row()
        system = SYSTEMS[int(rng.choice(len(SYSTEMS), p=SYSTEM_SHARES))]
        row.text(encoder.opening(system))
        if kind == "question first":
            row.seal()
            while len(row.ids) < ROW_TOKENS - 110:
                self._question_first(row)
            return row
        scenes: list[Scene] = []
        if kind == "video":
            medium, clip = self._video()
            row.medium(encoder, medium)
        elif kind in ("picture", "pictures"):
            count = 1 if kind == "picture" else int(rng.choice([2, 3, 4], p=[0.6, 0.25, 0.15]))
            named = count > 1 and rng.random() < 0.12
            for n in range(count):
                if named:
                    row.text(encoder.encode(f"Picture {n + 1}: "))
                # Left to chance, two pictures would hardly ever agree in anything.
                alike = len(scenes) == 1 and rng.random() < 0.45
                medium, scene = self._picture(scenes[0] if alike else None)
                row.medium(encoder, medium)
                scenes.append(scene)
        row.seal()
        misses = 0
        while len(row.ids) < ROW_TOKENS - 30 and misses < 25:
            if kind == "picture":
                dialogue = about_picture(rng, scenes[0])
            elif kind == "pictures":
                dialogue = about_pictures(rng, scenes)
            elif kind == "video":
                dialogue = about_video(rng, clip)
            else:
                dialogue = talk_question(rng, language_of(rng))
            if dialogue is None:
                misses += 1
                continue
            row.begin()
            row.dialogue(encoder, dialogue, "\n" if rng.random() < 0.08 else "")
        return row

    def _question_first(self, row: Row) -> None:
        rng = self._rng
        count = int(rng.choice([1, 2], p=[0.75, 0.25]))
        found = [self._picture() for _ in range(count)]
        scenes = [scene for _, scene in found]
        dialogue: Dialogue | None = None
        for _ in range(30):
            dialogue = about_picture(rng, scenes[0]) if count == 1 else about_pictures(rng, scenes)
            if dialogue is not None:
                break
        if dialogue is None:
            return
        row.begin()
        row.text(self._encoder.encode(dialogue.turns[0].question))
        for medium, _ in found:
            row.medium(self._encoder, medium)
        row.answers(self._encoder, dialogue)

    def _video(self) -> tuple[Media, Clip]:
        rng, grid = self._rng, self._video_grid
        index = int(rng.choice(self._videos.members[grid]))
        frames, clip = self._videos.load(index), self._videos.truths[index]
        if rng.random() < 0.5:
            frames, clip = frames[..., ::-1], clip.mirrored()
        if rng.random() < 0.5:
            frames, clip = frames[::-1], clip.reversed()
        if len(frames) % 2:
            frames = np.concatenate([frames, frames[-1:]])
        stack = self.stacks.setdefault((grid, True), [])
        self.media.append(((grid, True), len(stack), len(frames) // 2))
        stack.extend(frames.reshape(-1, 2, *frames.shape[1:]))
        return Media(len(self.media) - 1, len(frames) // 2, *grid, video=True), clip

    def rows(self, count: int) -> Packed:
        """``count`` rows of the mixture."""
        kinds = self._rng.choice(KINDS, count, p=KIND_SHARES)
        return pack([self._row(str(kind)) for kind in kinds], self._encoder.pad)


def _shares(one: Scene, other: Scene) -> bool:
    if len(one.things) != 1 or len(other.things) != 1:
        return False
    a, b = one.things[0], other.things[0]
    return "text" not in (a.kind, b.kind) and (a.kind == b.kind or a.colour == b.colour)


def _common_grid(rng: np.random.Generator, store: Store) -> Grid:
    grids = list(store.members)
    share = np.array([len(store.members[g]) for g in grids], dtype=np.float64)
    return grids[int(rng.choice(len(grids), p=share / share.sum()))]


def look(network: Network, step: Step) -> dict[tuple[Grid, bool], Tensor]:
    """The visual tokens of each of the step's stacks."""
    return {
        key: network.visual(torch.from_numpy(np.ascontiguousarray(np.stack(stack))))
        for key, stack in step.stacks.items()
    }


def dense_loss(heads: Heads, step: Step, seen: dict[tuple[Grid, bool], Tensor]) -> Tensor:
    """The mean dense loss over the step's pictures."""
    total, count = torch.zeros(()), 0
    for (grid, video), tokens in seen.items():
        if video:
            continue
        scenes = step.scenes[grid]
        pairs = [dense_targets(scene, grid) for scene in scenes]
        targets = {
            "classes": torch.from_numpy(np.stack([kinds for kinds, _ in pairs])),
            "boxes": torch.from_numpy(np.stack([boxes for _, boxes in pairs])),
            "slots": torch.from_numpy(np.stack([slot_targets(s) for s in scenes])),
            "counts": torch.tensor([sum(t.kind != "text" for t in s.things) for s in scenes]),
        }
        total = total + picture_loss(heads, tokens, targets, grid)[0] * len(scenes)
        count += len(scenes)
    return total / max(1, count)


def speak_loss(
    network: Network, heads: Heads, step: Step, packed: Packed, eyes: bool
) -> tuple[Tensor, dict[str, float]]:
    """Loss of the answers' tokens, with ``eyes`` half of the dense loss too; shares for the log."""
    with torch.set_grad_enabled(eyes):
        seen = look(network, step)
    embeds = network.model.embed_tokens(packed.ids)
    shape = embeds.shape
    places, values = [], []
    for medium, source in zip(packed.media, packed.sources, strict=True):
        key, first, frames_count = step.media[medium.index]
        places.append(source)
        values.append(seen[key][first : first + frames_count].flatten(0, 1))
    flat = embeds.reshape(-1, shape[-1])
    if places:
        flat = flat.index_copy(0, torch.cat(places), torch.cat(values).to(flat.dtype))
    states = network.hidden_states(flat.view(shape), packed.positions, packed.mask)
    logits = network.logits(states.reshape(-1, shape[-1])[packed.asked]).float()
    loss = F.cross_entropy(logits, packed.answers)
    log = {
        "token": float((logits.detach().argmax(-1) == packed.answers).float().mean()),
        "loss": float(loss.detach()),
    }
    if eyes:
        dense = dense_loss(heads, step, seen)
        log["dense"] = float(dense.detach())
        loss = loss + 0.5 * dense
    return loss, log


def learn_to_speak(  # noqa: PLR0917
    network: Network,
    heads: Heads,
    encoder: Encoder,
    stores: dict[str, Store],
    path: Path,
    schedule: Schedule,
    seed: int,
    say: Callable[[str], None],
    *,
    eyes: bool,
) -> None:
    """Train the decoder and, with ``eyes``, the tower; resumes from the snapshot at ``path`` if there is one."""  # noqa: E501
    modules = Together({"network": network, "heads": heads})
    trained = modules if eyes else Together({"model": network.model})
    optimizer = Optimizers(trained, schedule.rate, slower=(network.visual, 0.7))
    snapshot = Snapshot(path, modules, optimizer)
    smooth: dict[str, float] = {}
    for number in range(snapshot.restore(), schedule.end):
        schedule.apply(optimizer, number)
        rng = np.random.default_rng((seed, 2, number))
        step = Step(rng, stores, encoder)
        packed = step.rows(schedule.batch)
        work = partial(speak_loss, network, heads, step, packed, eyes)
        loss, log = modules.in_bfloat16(work)
        if eyes:
            crowd, targets = picture_batch(stores["crowds"], schedule.batch, rng, crowded=True)
            more, shown = modules.in_bfloat16(partial(seen_loss, network, heads, crowd, targets))
            loss, log = loss + 0.5 * more, log | shown
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        for name, value in log.items():
            smooth[name] = smooth.get(name, value) * 0.95 + value * 0.05
        if number % 25 == 24 or number == schedule.end - 1:
            text = " ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            say(f"speak {number + 1}/{schedule.end} {text}")
        if number % 100 == 99 or number == schedule.end - 1:
            snapshot.save(number + 1)
