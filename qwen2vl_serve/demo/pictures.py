"""Stores of drawn pictures and videos at the model's own scale, with dense targets.

Drawing costs more than reading, so the pictures of a training are drawn once by every core into a
memory-mapped file and met several times in different conversations.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen2vl_serve.demo.checkpoint import FRAME_PIXELS, IMAGE_PIXELS
from qwen2vl_serve.demo.compose import Clip, draw_picture, draw_video
from qwen2vl_serve.demo.crowd import draw_crowd
from qwen2vl_serve.demo.draw import Box, Pixels, Scene
from qwen2vl_serve.demo.names import CHARACTERS, COLOURS, SHAPES

CELL = 28
# smart_resize rounds up when it enlarges, so a narrow picture may pass the bound by a few cells.
MOST_CELLS = 72
KINDS = (*SHAPES, *CHARACTERS)
SLOTS = 5  # letters of the longest text
MOST = 6  # ranks and numbers of things are told apart up to here
UNASKED = -100  # a class that no loss counts (torch's own ignored index)
# The columns of the dense classes, and how many classes each has.
CLASSES = {
    "kind": len(KINDS) + 1,  # the last is "nothing"
    "colour": len(COLOURS) + 1,
    "rank": MOST,  # from left to right among the things, or among a word's letters
    "anchor": 2,  # whether this cell holds the middle of what it shows
    "things": MOST + 1,  # how many things the picture has
    "same kind": MOST + 1,  # how many of them are of the kind that the cell shows
    "same colour": MOST + 1,
}
Grid = tuple[int, int]


def resized(width: int, height: int, bounds: tuple[int, int]) -> Grid:
    """Rows and columns of 28-pixel cells that Qwen2-VL's ``smart_resize`` gives this picture."""
    rows, columns = round(height / CELL), round(width / CELL)
    pixels = rows * columns * CELL**2
    if pixels > bounds[1]:
        shrink = math.sqrt(height * width / bounds[1])
        rows = max(1, math.floor(height / shrink / CELL))
        columns = max(1, math.floor(width / shrink / CELL))
    elif pixels < bounds[0]:
        grow = math.sqrt(bounds[0] / (height * width))
        rows = math.ceil(height * grow / CELL)
        columns = math.ceil(width * grow / CELL)
    return rows, columns


def scaled(picture: Pixels, bounds: tuple[int, int]) -> Pixels:
    """The picture as the processor hands it to the model: [3, rows * 28, columns * 28]."""
    rows, columns = resized(picture.shape[1], picture.shape[0], bounds)
    size = (columns * CELL, rows * CELL)
    small = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def anchor_cell(x: float, y: float, grid: Grid) -> int:
    """The cell that holds a point, given in fractions of the picture."""
    rows, columns = grid
    row = min(rows - 1, max(0, int(y * rows)))
    return row * columns + min(columns - 1, max(0, int(x * columns)))


def parts_of(scene: Scene, crowded: bool) -> list[tuple[list[int], Box]]:
    """Everything a cell may show: its classes (the columns of CLASSES) and the box of the whole.

    Crowds are not counted and their shapes are not ranked: too many to tell apart.
    """
    parts: list[tuple[list[int], Box]] = []
    ranked = sorted(scene.things, key=lambda t: t.centre[0])
    counted = min(MOST, len(scene.things))
    for thing in scene.things:
        colour = COLOURS.index(thing.colour)
        numbers = [UNASKED] * 3
        if thing.kind == "text":
            for rank, (letter, box) in enumerate(zip(thing.text, thing.letters, strict=True)):
                kinds = [KINDS.index(letter), colour, min(rank, MOST - 1), 0]
                parts.append((kinds + numbers, box))
            continue
        rank = UNASKED if crowded else min(MOST - 1, ranked.index(thing))
        if not crowded:
            alike = sum(t.kind == thing.kind for t in scene.things)
            tinted = sum(t.colour == thing.colour for t in scene.things)
            numbers = [counted, min(MOST, alike), min(MOST, tinted)]
        parts.append(([KINDS.index(thing.kind), colour, rank, 0, *numbers], thing.box))
    return parts


def dense_targets(
    scene: Scene, grid: Grid, crowded: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Per cell: classes [cells, columns of CLASSES] and boxes [cells, 4].

    A cell shows a part when the cell's middle lies in the part's box; a part without such a cell
    takes the cell of its own middle. The box is that of the part, NaN where there is none.
    """
    rows, columns = grid
    classes = np.full((rows * columns, len(CLASSES)), UNASKED, np.int64)
    classes[:, :2] = (len(KINDS), len(COLOURS))
    boxes = np.full((rows * columns, 4), np.nan, np.float32)
    ys = (np.arange(rows * columns) // columns + 0.5) / rows
    xs = (np.arange(rows * columns) % columns + 0.5) / columns
    for values, (x1, y1, x2, y2) in parts_of(scene, crowded):
        inside = (xs >= x1) & (xs <= x2) & (ys >= y1) & (ys <= y2)
        anchor = anchor_cell((x1 + x2) / 2, (y1 + y2) / 2, grid)
        if not inside.any():
            inside[anchor] = True
        classes[inside] = values
        boxes[inside] = (x1, y1, x2, y2)
        if inside[anchor]:
            classes[anchor, list(CLASSES).index("anchor")] = 1
    return classes, boxes


def slot_targets(scene: Scene) -> NDArray[np.int64]:
    """The letters [5] of the picture's text as indices in CHARACTERS; the last class is blank."""
    slots = np.full(SLOTS, len(CHARACTERS), np.int64)
    for thing in scene.things:
        if thing.kind == "text":
            for spot, letter in enumerate(thing.text):
                slots[spot] = CHARACTERS.index(letter)
    return slots


@dataclass(frozen=True)
class Store:
    """Drawn pictures: ``pixels`` [n, slot] bytes, their grids, truths, and members by grid.

    ``shrink`` divides the pictures' sides when they are loaded; members are kept by the small grid.
    """

    pixels: Any
    grids: list[Grid]
    truths: list[Any]
    frames: list[int]
    members: dict[Grid, NDArray[np.int64]]
    shrink: int = 1

    def load(self, index: int) -> Pixels:
        """The picture [frames, 3, height, width]."""
        rows, columns = self.grids[index]
        shape = (self.frames[index], 3, rows * CELL, columns * CELL)
        flat: Pixels = self.pixels[index, : math.prod(shape)]
        picture = flat.reshape(shape)
        if self.shrink > 1:
            n = self.shrink
            blocks = picture.reshape(*shape[:2], shape[2] // n, n, shape[3] // n, n)
            picture = blocks.mean((3, 5), dtype=np.float32).astype(np.uint8)
        return picture

    def first(self, count: int) -> Store:
        """Only the first ``count`` pictures."""
        return _store(
            self.pixels[:count], self.grids[:count], self.truths[:count], self.frames[:count]
        )

    def simple(self) -> Store:
        """Only the pictures of one large shape or one or two letters, at half their size."""
        members: dict[Grid, list[int]] = {}
        for row, ((rows, columns), scene) in enumerate(zip(self.grids, self.truths, strict=True)):
            if rows % 2 or columns % 2 or len(scene.things) != 1:
                continue
            thing = scene.things[0]
            if (
                len(thing.text) <= 2
                and max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) > 0.3
            ):
                members.setdefault((rows // 2, columns // 2), []).append(row)
        by_grid = {grid: np.array(found) for grid, found in sorted(members.items())}
        return replace(self, members=by_grid, shrink=2)


def _one_picture(seed: int) -> tuple[Pixels, Scene]:
    picture, scene = draw_picture(seed)
    return scaled(picture, IMAGE_PIXELS)[None], scene


def _one_crowd(seed: int) -> tuple[Pixels, Scene]:
    picture, scene = draw_crowd(seed)
    return scaled(picture, IMAGE_PIXELS)[None], scene


def _one_video(seed: int) -> tuple[Pixels, Clip]:
    frames, clip = draw_video(seed)
    return np.stack([scaled(f, FRAME_PIXELS) for f in frames]), clip


def build_store(folder: Path, name: str, count: int, first_seed: int, workers: int) -> Store:
    """Draw ``count`` "pictures", "crowds" or "videos" (the ``name``) from consecutive seeds, or open them again.

    The result depends on the seeds alone, not on the number of workers.
    """  # noqa: E501
    folder.mkdir(parents=True, exist_ok=True)
    data, index = folder / f"{name}.bytes", folder / f"{name}.pickle"
    video = name == "videos"
    slot = (8 * 30 if video else MOST_CELLS) * CELL**2 * 3
    if not index.exists():
        pixels = np.memmap(data, np.uint8, "w+", shape=(count, slot))
        grids: list[Grid] = []
        truths: list[Any] = []
        frames: list[int] = []
        draw = {"videos": _one_video, "crowds": _one_crowd, "pictures": _one_picture}[name]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            seeds = range(first_seed, first_seed + count)
            for row, (picture, truth) in enumerate(pool.imap(draw, seeds, chunksize=64)):
                pixels[row, : picture.size] = picture.reshape(-1)
                grids.append((picture.shape[2] // CELL, picture.shape[3] // CELL))
                truths.append(truth)
                frames.append(picture.shape[0])
        pixels.flush()
        index.write_bytes(pickle.dumps((grids, truths, frames)))
    grids, truths, frames = pickle.loads(index.read_bytes())  # noqa: S301
    return _store(np.memmap(data, np.uint8, "r", shape=(count, slot)), grids, truths, frames)


def _store(pixels: Any, grids: list[Grid], truths: list[Any], frames: list[int]) -> Store:
    members: dict[Grid, list[int]] = {}
    for row, grid in enumerate(grids):
        members.setdefault(grid, []).append(row)
    by_grid = {grid: np.array(rows) for grid, rows in sorted(members.items())}
    return Store(pixels, grids, truths, frames, by_grid)
