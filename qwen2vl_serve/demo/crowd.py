"""Crowded pictures for the first lesson: many shapes or many letters, so each teaches many cells."""  # noqa: E501

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from qwen2vl_serve.demo.compose import MANNERS, pick_colour, pick_shape
from qwen2vl_serve.demo.draw import (
    RGB,
    Pixels,
    Points,
    Scene,
    Thing,
    backdrop,
    contrast,
    outline,
    paint,
    weathered,
)
from qwen2vl_serve.demo.lettering import lettering, pick_font
from qwen2vl_serve.demo.names import CHARACTERS

FINAL = 224.0  # side of a square picture at the model's scale


def draw_crowd(seed: int) -> tuple[Pixels, Scene]:
    """A picture [height, width, 3] of 4 to 16 shapes or 2 to 6 lines of letters, and its truth."""
    rng = np.random.default_rng((seed, 13))
    ratio = float(rng.choice([1.0, 1.0, 4 / 3, 3 / 4, 3 / 2]))
    side = float(rng.uniform(170, 420))
    width, height = round(side * ratio**0.5), round(side / ratio**0.5)
    canvas, name, base = backdrop(width, height, rng)
    flat = canvas.reshape(-1, 3)
    near: list[RGB] = [base]
    for place in (0, len(flat) - 1):
        r, g, b = flat[place].tolist()
        near.append((r, g, b))
    filler = _letters if rng.random() < 0.6 else _shapes
    canvas, things = filler(canvas, near, side / FINAL, rng)
    return weathered(canvas, rng), Scene(width, height, tuple(things), name)


def _shapes(
    canvas: Pixels, near: list[RGB], scale: float, rng: np.random.Generator
) -> tuple[Pixels, list[Thing]]:
    height, width = canvas.shape[:2]
    pitch = float(rng.uniform(42, 84)) * scale
    columns, rows = max(2, int(width / pitch)), max(2, int(height / pitch))
    cell = (width / columns, height / rows)
    manner = MANNERS[int(rng.integers(4))]
    things: list[Thing] = []
    for place in range(rows * columns):
        if rng.random() < 0.15:
            continue
        size = min(cell) * float(rng.uniform(0.55, 0.93))
        kind = pick_shape(size / scale, rng)
        colour, tone = pick_colour(near, set(), rng)
        points: Points = outline(kind, rng)
        points = points / float(np.ptp(points, axis=0).max()) * size
        points -= points.min(axis=0)
        extent = np.ptp(points, axis=0)
        free = np.array(cell) - extent
        corner = np.array([place % columns, place // columns]) * cell + free * rng.uniform(
            0.05, 0.95, 2
        )
        canvas = paint(canvas, points + corner, tone, manner, rng)
        x1, y1 = corner.tolist()
        x2, y2 = (corner + extent).tolist()
        things.append(Thing(kind, colour, (x1 / width, y1 / height, x2 / width, y2 / height)))
    return canvas, things


def _letters(
    canvas: Pixels, near: list[RGB], scale: float, rng: np.random.Generator
) -> tuple[Pixels, list[Thing]]:
    height, width = canvas.shape[:2]
    things: list[Thing] = []
    out: NDArray[Any] = canvas.astype(np.float32)
    top = float(rng.uniform(0.02, 0.08)) * height
    while True:
        tall = float(np.exp(rng.uniform(np.log(15), np.log(90)))) * scale
        if top + tall * 1.1 > height:
            break
        pool = CHARACTERS[:36] if rng.random() < 0.6 else CHARACTERS
        if rng.random() < 0.25:
            pool = CHARACTERS[:10]
        font, at = pick_font(rng), float(rng.uniform(0.01, 0.1)) * width
        bottom = top
        while at < width * 0.9:
            text = "".join(
                pool[int(k)] for k in rng.integers(0, len(pool), int(rng.integers(1, 7)))
            )
            mask, letters = lettering(text, max(8, round(tall)), font, rng)
            rows, columns = mask.shape
            if at + columns > width or top + rows > height:
                break
            if rng.random() < 0.5:
                colour, tone = (
                    ("white", (255, 255, 255)) if sum(near[0]) < 380 else ("black", (0, 0, 0))
                )
                if any(contrast(tone, other) < 130 for other in near):
                    colour, tone = pick_colour(near, set(), rng)
            else:
                colour, tone = pick_colour(near, set(), rng)
            x, y = int(at), int(top)
            alpha = mask[..., None].astype(np.float32) / 255
            patch = out[y : y + rows, x : x + columns]
            out[y : y + rows, x : x + columns] = (
                patch * (1 - alpha) + np.array(tone, np.float32) * alpha
            )
            boxes = tuple(
                ((x + a) / width, y / height, (x + c) / width, (y + rows) / height)
                for a, _, c, _ in letters
            )
            whole = (x / width, y / height, (x + columns) / width, (y + rows) / height)
            things.append(Thing("text", colour, whole, text, boxes))
            bottom = max(bottom, top + rows)
            at += columns + tall * float(rng.uniform(0.3, 0.9))
        top = max(bottom, top + tall * 0.4) + tall * float(rng.uniform(0.15, 0.5))
    turn = float(rng.uniform(-4, 4)) if rng.random() < 0.15 else 0.0
    if turn:
        spin = cv2.getRotationMatrix2D((width / 2, height / 2), turn, 1.0)
        out = cv2.warpAffine(out, spin, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return out.astype(np.uint8), things
