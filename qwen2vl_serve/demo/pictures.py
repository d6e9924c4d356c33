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
from qwen2vl_serve.demo.draw import Box, Pixels, Scene, Thing
from qwen2vl_serve.demo.names import CHARACTERS, COLOURS, SHAPES

CELL = 28
# smart_resize rounds up when it enlarges, so a narrow picture may pass the bound by a few cells.
MOST_CELLS = 72
KINDS = (*SHAPES, *CHARACTERS)
SLOTS = 5  # letters of the longest text
MOTIONS = ("left", "right", "up", "down", "none")
SIZES = ("smallest", "largest", "between")
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
    "rank down": MOST,  # from top to bottom among the things
    "size": len(SIZES),  # among the things
    "across": 3,  # where the thing's middle is: left, middle, right; not asked near a border
    "down": 3,
    "motion": len(MOTIONS),  # of what a pair of frames shows
    "second colour": len(COLOURS) + 1,  # in the pair's second frame; "colour" is the first's
}
# A thing's sides are told as classes as well, from 0 to 1 in steps of a fortieth: a decoder can say
# a class in digits, while a number that grows along one direction it can only guess at.
STEPS = 40
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


def third(value: float) -> int:
    """0, 1 or 2 for a low, middle or high coordinate; UNASKED near a border between two."""
    if value < 0.36:
        return 0
    if value > 0.64:
        return 2
    return 1 if 0.42 < value < 0.58 else UNASKED


def size_among(thing: Thing, things: tuple[Thing, ...]) -> int:
    """The thing's place in SIZES; UNASKED where sizes are too near, or there is one thing."""
    areas = sorted(t.area for t in things)
    if len(areas) < 2:
        return UNASKED
    if thing.area == areas[0] and areas[1] > 1.3 * areas[0]:
        return SIZES.index("smallest")
    if thing.area == areas[-1] and areas[-1] > 1.3 * areas[-2]:
        return SIZES.index("largest")
    clear = areas[0] * 1.3 < thing.area < areas[-1] / 1.3
    return SIZES.index("between") if clear else UNASKED


@dataclass(frozen=True)
class Part:
    """What a cell may show: its classes (those of CLASSES that are asked), its own box and the
    whole thing's, which differ for a letter."""

    classes: dict[str, int]
    box: Box
    whole: Box


def parts_of(scene: Scene, crowded: bool) -> list[Part]:
    """Everything that cells of this scene may show.

    Crowds are not counted and their shapes are not ranked: too many to tell apart.
    """
    parts: list[Part] = []
    across = sorted(scene.things, key=lambda t: t.centre[0])
    down = sorted(scene.things, key=lambda t: t.centre[1])
    for thing in scene.things:
        found = {
            "colour": COLOURS.index(thing.colour),
            "anchor": 0,
            "across": third(thing.centre[0]),
            "down": third(thing.centre[1]),
        }
        if thing.kind == "text":
            for rank, (letter, box) in enumerate(zip(thing.text, thing.letters, strict=True)):
                read = {"kind": KINDS.index(letter), "rank": min(rank, MOST - 1)}
                parts.append(Part(found | read, box, thing.box))
            continue
        found["kind"] = KINDS.index(thing.kind)
        if not crowded:
            found |= {
                "rank": min(MOST - 1, across.index(thing)),
                "rank down": min(MOST - 1, down.index(thing)),
                "things": min(MOST, len(scene.things)),
                "same kind": min(MOST, sum(t.kind == thing.kind for t in scene.things)),
                "same colour": min(MOST, sum(t.colour == thing.colour for t in scene.things)),
                "size": size_among(thing, scene.things),
            }
        parts.append(Part(found, thing.box, thing.box))
    return parts


@dataclass(frozen=True)
class Dense:
    """What every cell of a picture shows.

    ``classes`` [cells, columns of CLASSES]; ``boxes`` and ``wholes`` [cells, 4], NaN where a cell
    shows nothing.
    """

    classes: NDArray[np.int64]
    boxes: NDArray[np.float32]
    wholes: NDArray[np.float32]


def dense_targets(scene: Scene, grid: Grid, crowded: bool = False) -> Dense:
    """The targets of a picture's cells.

    A cell shows a part when the cell's middle lies in the part's box; a part without such a cell
    takes the cell of its own middle.
    """
    rows, columns = grid
    names = list(CLASSES)
    classes = np.full((rows * columns, len(CLASSES)), UNASKED, np.int64)
    classes[:, :2] = (len(KINDS), len(COLOURS))
    boxes, wholes = (np.full((rows * columns, 4), np.nan, np.float32) for _ in range(2))
    for part in parts_of(scene, crowded):
        inside = cells_in(part.box, grid)
        values = [part.classes.get(name, UNASKED) for name in names]
        classes[inside] = values
        boxes[inside], wholes[inside] = part.box, part.whole
        x1, y1, x2, y2 = part.box
        anchor = anchor_cell((x1 + x2) / 2, (y1 + y2) / 2, grid)
        if inside[anchor]:
            classes[anchor, names.index("anchor")] = 1
    return Dense(classes, boxes, wholes)


def pair_targets(clip: Clip, first: int, grid: Grid) -> Dense:
    """The targets of the cells of a video's two frames from ``first`` on (the last one twice)."""
    classes = np.full((grid[0] * grid[1], len(CLASSES)), UNASKED, np.int64)
    classes[:, :2] = (len(KINDS), len(COLOURS))
    boxes, wholes = (np.full((grid[0] * grid[1], 4), np.nan, np.float32) for _ in range(2))
    second = min(first + 1, len(clip.boxes) - 1)
    one, other = clip.boxes[first], clip.boxes[second]
    box = (min(one[0], other[0]), min(one[1], other[1]),
           max(one[2], other[2]), max(one[3], other[3]))  # fmt: skip
    (colour, kind), (later, _) = (clip.things[clip.shown[k]] for k in (first, second))
    told = {
        "kind": KINDS.index(kind) if kind else UNASKED,
        "colour": COLOURS.index(colour),
        "second colour": COLOURS.index(later),
        "motion": MOTIONS.index(clip.motion or "none" if second > first else "none"),
    }
    inside = cells_in(box, grid)
    classes[inside] = [told.get(name, UNASKED) for name in CLASSES]
    boxes[inside] = box
    return Dense(classes, boxes, wholes)


def cells_in(box: Box, grid: Grid) -> NDArray[np.bool_]:
    """Which cells [rows * columns] have their middle in the box; the nearest one if none has."""
    rows, columns = grid
    x1, y1, x2, y2 = box
    ys = (np.arange(rows * columns) // columns + 0.5) / rows
    xs = (np.arange(rows * columns) % columns + 0.5) / columns
    inside: NDArray[np.bool_] = (xs >= x1) & (xs <= x2) & (ys >= y1) & (ys <= y2)
    if not inside.any():
        inside[anchor_cell((x1 + x2) / 2, (y1 + y2) / 2, grid)] = True
    return inside


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
