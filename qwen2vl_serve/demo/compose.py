"""Whole pictures and short videos from one seed, with their truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from qwen2vl_serve.demo.draw import (
    COMMON,
    NEEDS_ROOM,
    RGB,
    Box,
    Manner,
    Pixels,
    Points,
    Scene,
    Thing,
    backdrop,
    canvas_size,
    contrast,
    outline,
    paint,
    shade,
    weathered,
)
from qwen2vl_serve.demo.lettering import lettering, pick_font
from qwen2vl_serve.demo.names import CHARACTERS, COLOURS, SHAPES, WORDS

Subject = Literal["shapes", "text", "any"]
MANNERS: tuple[Manner, ...] = ("smooth", "aliased", "opencv", "large")


@dataclass(frozen=True)
class Clip:
    """The truth about a video: one thing that moves, or things that follow one another."""

    motion: str | None
    things: tuple[tuple[str, str], ...]  # (colour, shape) in order of appearance
    boxes: tuple[Box, ...] = ()  # of what each frame shows
    shown: tuple[int, ...] = ()  # which of the things that is

    def mirrored(self) -> Clip:
        """The truth about the mirrored video."""
        turned = {"left": "right", "right": "left"}
        boxes = tuple((1 - x2, y1, 1 - x1, y2) for x1, y1, x2, y2 in self.boxes)
        return replace(self, motion=turned.get(self.motion or "", self.motion), boxes=boxes)

    def reversed(self) -> Clip:
        """The truth about the video played backwards."""
        turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
        return replace(
            self,
            motion=turned.get(self.motion or "", self.motion),
            things=self.things[::-1],
            boxes=self.boxes[::-1],
            shown=tuple(len(self.things) - 1 - index for index in self.shown[::-1]),
        )


def pick_colour(avoid: list[RGB], taken: set[str], rng: np.random.Generator) -> tuple[str, RGB]:
    """A colour that stands out from every shade in ``avoid`` and is named unlike ``taken``."""
    for _ in range(60):
        name = str(rng.choice(COLOURS))
        tone = shade(name, rng)
        if name not in taken and all(contrast(tone, other) > 130 for other in avoid):
            return name, tone
    dark = sum(avoid[0]) > 380
    return ("black", (0, 0, 0)) if dark else ("white", (255, 255, 255))


def shade_at(canvas: Pixels, row: int, column: int) -> RGB:
    """The shade of one pixel."""
    r, g, b = canvas[row, column].tolist()
    return r, g, b


def pick_shape(room: float, rng: np.random.Generator) -> str:
    """A shape, from the easily told ones when it will be small (``room`` in final pixels)."""
    pool = COMMON if rng.random() < 0.35 else SHAPES
    shape = str(rng.choice(pool))
    while room < 30 and shape in NEEDS_ROOM and not (shape == "circle" and rng.random() < 0.5):
        shape = str(rng.choice(("circle", "square", "triangle", "star", "cross")))
    return shape


def printed_text(rng: np.random.Generator) -> str:
    """A number or a short word, at most five characters."""
    kind = rng.random()
    if kind < 0.35:
        digits = int(rng.integers(1, 6))
        return str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    if kind < 0.75:
        fitting = [w for w in WORDS if len(w) <= 5]
        word = fitting[int(rng.integers(len(fitting)))]
    else:
        pool = CHARACTERS[10:36].lower()
        word = "".join(pool[int(k)] for k in rng.integers(0, 26, int(rng.integers(1, 6))))
        if kind > 0.93:
            spots = CHARACTERS[1:10]
            word = "".join(spots[int(rng.integers(9))] if rng.random() < 0.4 else c for c in word)
            word = word.replace("o", "a").replace("l", "k").replace("i", "e")
    look = rng.random()
    if look < 0.62 or not word.isalpha() or len(word) == 1:
        return word.upper()
    return word if look < 0.82 else word.capitalize()


def free_place(
    taken: list[tuple[float, float, float, float]],
    size: tuple[float, float],
    bounds: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[float, float] | None:
    """A top left corner for a box of this size that keeps clear of the taken boxes."""
    width, height = bounds
    if size[0] > width * 0.98 or size[1] > height * 0.98:
        return None
    gap = 0.025 * min(width, height)
    for _ in range(25):
        x = float(rng.uniform(0.01 * width, width * 0.99 - size[0]))
        y = float(rng.uniform(0.01 * height, height * 0.99 - size[1]))
        if all(
            x > b[2] + gap or x + size[0] < b[0] - gap or y > b[3] + gap or y + size[1] < b[1] - gap
            for b in taken
        ):
            return x, y
    return None


def draw_shapes(
    canvas: Pixels, avoid: list[RGB], count: int, rng: np.random.Generator
) -> tuple[Pixels, list[Thing]]:
    """Draw up to ``count`` shapes that do not touch; returns the canvas and what was placed."""
    height, width = canvas.shape[:2]
    short = min(width, height)
    low, high = {1: (0.2, 0.85), 2: (0.18, 0.6), 3: (0.14, 0.46)}.get(count, (0.12, 0.38))
    final = 224 * (short / max(width, height)) ** 0.5
    manner = MANNERS[int(rng.integers(4))]
    alike, same_colour = rng.random() < 0.2, rng.random() < 0.2
    aligned = rng.random() < 0.2
    fixed_size = float(rng.uniform(low, high)) if rng.random() < 0.3 else None
    first_shape = first_colour = None
    taken: list[tuple[float, float, float, float]] = []
    things: list[Thing] = []
    for _ in range(count):
        size = (fixed_size or float(rng.uniform(low, high))) * short
        shape = first_shape if alike and first_shape else pick_shape(size / short * final, rng)
        if same_colour and first_colour:
            name, tone = first_colour
        else:
            name, tone = pick_colour(avoid, set(), rng)
        first_shape, first_colour = shape, (name, tone)
        points: Points = outline(shape, rng)
        points = points / float(np.ptp(points, axis=0).max()) * size
        points -= points.min(axis=0)
        extent = (float(np.ptp(points[:, 0])), float(np.ptp(points[:, 1])))
        corner = free_place(taken, extent, (width, height), rng)
        if corner is None:
            continue
        if aligned and not things:
            middle = ((width - extent[0]) / 2, (height - extent[1]) / 2)
            corner = middle if count == 1 else (corner[0], middle[1])
        points += corner
        canvas = paint(canvas, points, tone, manner, rng)
        box = (corner[0], corner[1], corner[0] + extent[0], corner[1] + extent[1])
        taken.append(box)
        scaled = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        things.append(Thing(shape, name, scaled))
    return canvas, things


def draw_text(
    canvas: Pixels, base: RGB, rng: np.random.Generator, text: str | None = None
) -> tuple[Pixels, Thing]:
    """Print one number or word on the canvas, at times on a plate, at times a little turned."""
    height, width = canvas.shape[:2]
    text = text or printed_text(rng)
    tall = height * rng.uniform(0.16, 0.6)
    mask, letters = lettering(text, max(8, round(tall)), pick_font(rng), rng)
    fit = min(1.0, width * 0.92 / mask.shape[1], height * 0.9 / mask.shape[0])
    if fit < 1.0:
        size = (max(1, int(mask.shape[1] * fit)), max(1, int(mask.shape[0] * fit)))
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    rows, columns = mask.shape
    x = int(rng.integers(0, max(1, width - columns)))
    y = int(rng.integers(0, max(1, height - rows)))
    if rng.random() < 0.4:
        x, y = (width - columns) // 2, (height - rows) // 2
    if rng.random() < 0.15:
        pad = int(rows * rng.uniform(0.1, 0.4)) + 2
        _, base = pick_colour([base], set(), rng)
        cv2.rectangle(canvas, (x - pad, y - pad), (x + columns + pad, y + rows + pad), base, -1)
    if rng.random() < 0.4:
        dark = sum(base) > 380
        name, tone = ("black", shade("black", rng)) if dark else ("white", shade("white", rng))
    else:
        name, tone = pick_colour([base], set(), rng)
    sheet = np.zeros((height, width), np.uint8)
    sheet[y : y + rows, x : x + columns] = mask
    centre = (x + columns / 2, y + rows / 2)
    turn = float(rng.uniform(-7, 7)) if rng.random() < 0.2 else 0.0
    if turn:
        spin = cv2.getRotationMatrix2D(centre, turn, 1.0)
        sheet = cv2.warpAffine(sheet, spin, (width, height)).astype(np.uint8)
    alpha = sheet[..., None].astype(np.float32) / 255
    out = (canvas * (1 - alpha) + np.array(tone, np.float32) * alpha).astype(np.uint8)
    boxes = tuple(
        ((x + a * fit) / width, y / height, (x + c * fit) / width, (y + rows) / height)
        for a, _, c, _ in letters
    )
    whole = (x / width, y / height, (x + columns) / width, (y + rows) / height)
    return out, Thing("text", name, whole, text, boxes)


def draw_picture(
    seed: int, subject: Subject = "any", count: int | None = None, text: str | None = None
) -> tuple[Pixels, Scene]:
    """One picture [height, width, 3] and its truth, the same for the same arguments.

    A picture of a text prints ``text`` where there is one, else any.
    """
    rng = np.random.default_rng((seed, 11))
    width, height = canvas_size(rng)
    canvas, name, base = backdrop(width, height, rng)
    near = [base]
    flat = canvas.reshape(-1, 3)
    near += [tuple(int(v) for v in flat[k]) for k in (0, len(flat) - 1)]  # type: ignore[misc]
    if subject == "any":
        subject = "text" if rng.random() < 0.27 else "shapes"
    things: list[Thing] = []
    if subject == "shapes":
        wanted = count or int(rng.choice([1, 2, 3, 4, 5], p=[0.34, 0.26, 0.18, 0.11, 0.11]))
        canvas, things = draw_shapes(canvas, near, wanted, rng)
    else:
        canvas, thing = draw_text(canvas, base, rng, text)
        things = [thing]
    return weathered(canvas, rng), Scene(width, height, tuple(things), name)


def draw_video(seed: int) -> tuple[list[Pixels], Clip]:  # noqa: PLR0915
    """Four to eight frames and their truth: a thing that moves, or things one after another."""
    rng = np.random.default_rng((seed, 12))
    side = int(rng.integers(96, 360))
    ratio = float(rng.choice([1.0, 1.0, 4 / 3, 16 / 9]))
    width, height = (round(side * ratio), side)
    if rng.random() < 0.15:
        width, height = height, width
    ground, _, base = backdrop(width, height, rng)
    near: list[RGB] = [base, *(shade_at(ground, k, k) for k in (0, -1))]
    count = int(rng.choice([4, 4, 5, 6, 6, 8, 8]))
    short = min(width, height)
    manner = MANNERS[int(rng.integers(4))]
    size = short * float(rng.uniform(0.22, 0.42))
    frames: list[Pixels] = []

    def prepared(span: float) -> tuple[str, str, RGB, Points]:
        shape = pick_shape(span / short * 130, rng)
        name, tone = pick_colour(near, used, rng)
        used.add(name)
        points = outline(shape, rng)
        return shape, name, tone, points / float(np.ptp(points, axis=0).max()) * span / 1.0

    def box_of(outline: Points) -> Box:
        low, high = outline.min(axis=0) / (width, height), outline.max(axis=0) / (width, height)
        return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    used: set[str] = set()
    boxes: list[Box] = []
    if rng.random() < 0.55:
        direction = str(rng.choice(["left", "right", "up", "down"]))
        shape, name, tone, points = prepared(size)
        reach = size / 2 + 2
        start, stop = rng.uniform(0, 0.2), rng.uniform(0.75, 1.0)
        along = np.linspace(start, stop, count)
        if direction in ("left", "up"):
            along = along[::-1]
        drift = rng.uniform(-0.1, 0.1)
        across = rng.uniform(0.25, 0.75) + np.linspace(-drift, drift, count) / 2
        brush = int(rng.integers(2**31))
        for a, c in zip(along, across, strict=True):
            x, y = (a, c) if direction in ("left", "right") else (c, a)
            spot = (reach + x * (width - 2 * reach), reach + y * (height - 2 * reach))
            # The same brush for every frame: a thing does not change its outline as it moves.
            steady = np.random.default_rng(brush)
            frames.append(paint(ground.copy(), points + spot, tone, manner, steady))
            boxes.append(box_of(points + spot))
        clip = Clip(direction, ((name, shape),), tuple(boxes), (0,) * count)
    else:
        parts = min(count // 2, int(rng.choice([2, 2, 3])))
        alike = rng.random() < 0.4
        things = [prepared(size * float(rng.uniform(1.0, 1.8))) for _ in range(parts)]
        if alike:
            things = [(things[0][0], name, tone, things[0][3]) for _, name, tone, _ in things]
        whole = rng.random() < 0.25
        centre = np.array([width, height]) * rng.uniform(0.4, 0.6, 2)
        shown = tuple(min(parts - 1, k * parts // count) for k in range(count))
        for index in shown:
            shape, name, tone, points = things[index]
            canvas = ground.copy()
            if whole:
                canvas[:] = tone
            else:
                canvas = paint(canvas, points + centre, tone, manner, np.random.default_rng(3))
            frames.append(canvas)
            boxes.append((0.0, 0.0, 1.0, 1.0) if whole else box_of(points + centre))
        told = tuple((name, "" if whole else shape) for shape, name, _, _ in things)
        clip = Clip(None, told, tuple(boxes), shown)
    tail = int(rng.integers(2**31))
    return [weathered(f, np.random.default_rng(tail)) for f in frames], clip
