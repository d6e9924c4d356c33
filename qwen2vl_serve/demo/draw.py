"""Pictures with known truth: scenes of coloured shapes or printed text, drawn in many manners.

Everything follows from one seed. The manners differ on purpose (two drawing libraries, supersampled
or aliased edges, outlines, gradients, shadows, backgrounds, noise, blur, JPEG, size), so that a
model trained on them sees shapes and not one program's edges.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from qwen2vl_serve.demo.names import COLOURS, SHADES, SHAPES

Pixels = NDArray[np.uint8]
RGB = tuple[int, int, int]
Points = NDArray[np.float64]
Box = tuple[float, float, float, float]
Manner = Literal["smooth", "aliased", "opencv", "large"]

# Small ones of these cannot be told apart.
NEEDS_ROOM = frozenset({"pentagon", "hexagon", "oval", "circle", "diamond", "rectangle", "heart"})
COMMON = ("circle", "square", "triangle", "star", "rectangle")


@dataclass(frozen=True)
class Thing:
    """One object: a shape, or a printed text. Boxes are fractions of the picture, x before y."""

    kind: str
    colour: str
    box: Box
    text: str = ""
    letters: tuple[Box, ...] = ()

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def area(self) -> float:
        """Area of the box as a fraction of the picture."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


@dataclass(frozen=True)
class Scene:
    """The truth about one picture. ``background`` is None when it has no single name."""

    width: int
    height: int
    things: tuple[Thing, ...]
    background: str | None

    def mirrored(self) -> Scene:
        """The truth about the picture's mirror image (not for texts)."""
        flipped = tuple(
            replace(t, box=(1 - t.box[2], t.box[1], 1 - t.box[0], t.box[3])) for t in self.things
        )
        return replace(self, things=flipped)


def outline(shape: str, rng: np.random.Generator) -> Points:  # noqa: PLR0912
    """The shape's polygon [n, 2] about the origin, within the unit circle or close to it."""
    tilt = rng.uniform(-0.28, 0.28) if rng.random() < 0.45 else 0.0

    def regular(corners: int, phase: float) -> Points:
        angles = phase + 2 * math.pi * np.arange(corners) / corners
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    up = -math.pi / 2
    if shape == "circle":
        return regular(72, 0.0)
    if shape == "oval":
        ratio = rng.uniform(0.42, 0.7)
        points = regular(72, 0.0) * (1.0, ratio)
        if rng.random() < 0.4:
            points = points[:, ::-1]
    elif shape == "square":
        points = regular(4, math.pi / 4)
    elif shape == "rectangle":
        points = regular(4, math.pi / 4) * (1.2, 1.2 * rng.uniform(0.35, 0.66))
        if rng.random() < 0.4:
            points = points[:, ::-1]
    elif shape == "triangle":
        points = regular(3, up)
        if rng.random() < 0.4:
            points = points * (rng.uniform(0.8, 1.2), rng.uniform(0.85, 1.15))
        if rng.random() < 0.2:
            points[0, 0] = rng.choice([points[1, 0], points[2, 0]])
        if rng.random() < 0.15:
            points = -points
    elif shape == "star":
        points = regular(10, up)
        points[1::2] *= rng.uniform(0.36, 0.52)
    elif shape == "diamond":
        points = regular(4, up) * (rng.uniform(0.58, 1.0), 1.0)
        if rng.random() < 0.2:
            points = points[:, ::-1]
        tilt *= 0.4
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16.5
    elif shape == "cross":
        a = rng.uniform(0.22, 0.38)
        points = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
             (-1, a), (-1, -a), (-a, -a)], dtype=np.float64,
        )  # fmt: skip
        points *= 0.95
    elif shape == "pentagon":
        points = regular(5, up)
    elif shape == "hexagon":
        points = regular(6, 0.0 if rng.random() < 0.6 else up)
    else:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    turned: Points = np.asarray(points, dtype=np.float64) @ turn
    return turned


def shade(colour: str, rng: np.random.Generator) -> RGB:
    """A shade that goes by this colour's name."""
    choices = SHADES[colour]
    if rng.random() < 0.5:
        mixed = np.array(choices[rng.integers(len(choices))], dtype=np.float64)
    else:
        one, two = choices[rng.integers(len(choices))], choices[rng.integers(len(choices))]
        part = rng.random()
        mixed = np.array(one) * part + np.array(two) * (1 - part)
        mixed += rng.uniform(-8, 8, 3) if colour not in ("gray", "black", "white") else 0
    r, g, b = np.clip(np.rint(mixed), 0, 255).astype(int).tolist()
    return r, g, b


def contrast(one: RGB, two: RGB) -> float:
    """Distance of two shades, weighted for the eye ("redmean"); black to white is about 765."""
    mean = (one[0] + two[0]) / 2
    r, g, b = (float(x - y) ** 2 for x, y in zip(one, two, strict=True))
    return math.sqrt((2 + mean / 256) * r + 4 * g + (2 + (255 - mean) / 256) * b)


def backdrop(width: int, height: int, rng: np.random.Generator) -> tuple[Pixels, str | None, RGB]:
    """A background, its colour's name where it has one, and its mean shade."""
    kind = rng.random()
    name: str | None = None
    if kind < 0.38:
        name, base = "white", (255, 255, 255) if rng.random() < 0.8 else shade("white", rng)
    elif kind < 0.56:
        light = rng.integers(205, 256, 3)
        base = (int(light[0]), int(light[1]), int(light[2]))
    elif kind < 0.64:
        name, base = "black", shade("black", rng)
    elif kind < 0.70:
        dark = rng.integers(0, 70, 3)
        base = (int(dark[0]), int(dark[1]), int(dark[2]))
    elif kind < 0.88:
        name = str(rng.choice(COLOURS))
        base = shade(name, rng)
    else:
        middle = rng.integers(60, 220)
        jitter = rng.integers(-25, 26, 3) + middle
        base = (int(jitter[0]), int(jitter[1]), int(jitter[2]))
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = base
    style = rng.random()
    if style < 0.14:
        other = np.clip(np.array(base) + rng.uniform(-60, 60, 3), 0, 255)
        ramp = np.linspace(0, 1, width if rng.random() < 0.5 else height, dtype=np.float32)
        ramp = ramp[None, :, None] if len(ramp) == width and rng.random() < 0.5 else ramp
        if ramp.ndim == 1:
            ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        canvas = canvas * (1 - ramp) + other.astype(np.float32) * ramp
        name = None
    elif style < 0.20:
        coarse = rng.normal(0, rng.uniform(4, 16), (6, 6, 1)).astype(np.float32)
        canvas += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    elif style < 0.26:
        step = int(rng.integers(6, 30))
        amount = float(rng.uniform(-22, 22))
        ys, xs = np.ogrid[:height, :width]
        lines = [xs // step, ys // step, xs // step + ys // step, (xs + ys) // step]
        canvas += ((lines[rng.integers(4)] % 2) * amount)[..., None].astype(np.float32)
    elif style < 0.31:
        edge = tuple(int(v) for v in np.clip(np.array(base) + rng.uniform(-80, 80, 3), 0, 255))
        thick = max(1, int(min(width, height) * rng.uniform(0.005, 0.02)))
        inset = int(min(width, height) * rng.uniform(0, 0.05))
        cv2.rectangle(canvas, (inset, inset), (width - 1 - inset, height - 1 - inset), edge, thick)
    return np.clip(canvas, 0, 255).astype(np.uint8), name, base


def paint(  # noqa: PLR0912, PLR0915
    canvas: Pixels, points: Points, colour: RGB, manner: Manner, rng: np.random.Generator
) -> Pixels:
    """Fill the polygon (pixel coordinates) in one of the manners; returns the new canvas."""
    height, width = canvas.shape[:2]
    look = rng.random()
    hollow = look < 0.05 and np.ptp(points[:, 0]) > 40
    span = float(min(np.ptp(points[:, 0]), np.ptp(points[:, 1])))
    edge: RGB | None = None
    if 0.05 < look < 0.22:
        tone = np.array(colour) * rng.uniform(0.0, 0.75) if rng.random() < 0.8 else [255] * 3
        edge = (int(tone[0]), int(tone[1]), int(tone[2]))
    stroke = max(1.0, span * rng.uniform(0.01, 0.045))
    if hollow:
        stroke, edge = max(3.0, span * rng.uniform(0.1, 0.18)), colour
    mask = np.zeros((height, width), np.uint8)
    line = np.zeros((height, width), np.uint8)
    if manner == "opencv":
        fixed = np.rint(points * 16).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, shift=4)
        if edge:
            cv2.polylines(line, [fixed], True, 255, max(1, round(stroke)), cv2.LINE_AA, shift=4)
    else:
        scale = {"smooth": 3, "aliased": 1, "large": 2}[manner]
        lo = np.maximum(np.floor(points.min(0) - stroke - 2), 0).astype(int)
        hi = np.minimum(np.ceil(points.max(0) + stroke + 2), (width, height)).astype(int)
        w, h = (int(v) for v in np.maximum(hi - lo, 1))
        local = [(float(x), float(y)) for x, y in (points - lo) * scale]
        for target, outlined in ((mask, False), (line, True)):
            if outlined and not edge:
                continue
            sheet = Image.new("L", (w * scale, h * scale))
            pen = ImageDraw.Draw(sheet)
            if outlined:
                closed = [*local, local[0], local[1]]
                pen.line(closed, fill=255, width=max(1, round(stroke * scale)), joint="curve")
            else:
                pen.polygon(local, fill=255)
            if scale > 1:
                sheet = sheet.resize((w, h), Image.Resampling.BOX)
            target[lo[1] : lo[1] + h, lo[0] : lo[0] + w] = np.asarray(sheet)
    around = stroke + 3
    x1, y1 = np.maximum(np.floor(points.min(0) - around), 0).astype(int).tolist()
    x2, y2 = np.ceil(points.max(0) + around).astype(int).tolist()
    if 0.22 < look < 0.28:
        x1, y1, x2, y2 = 0, 0, width, height  # a shadow reaches further
    part = (slice(y1, min(y2, height)), slice(x1, min(x2, width)))
    out: NDArray[Any] = canvas[part].astype(np.float32)
    if 0.22 < look < 0.28:
        shift = np.array([[1, 0, span * 0.05], [0, 1, span * 0.06]], np.float32)
        blur = max(1.0, span * 0.03)
        shadow = cv2.GaussianBlur(cv2.warpAffine(mask, shift, (width, height)), (0, 0), blur)
        out *= 1 - shadow[..., None].astype(np.float32) / 255 * 0.45
    fill = np.empty((1, 1, 3), np.float32)
    fill[:] = colour
    if 0.28 < look < 0.38 and colour not in ((0, 0, 0), (255, 255, 255)):
        ramp = np.linspace(-1, 1, height, dtype=np.float32)[part[0], None, None]
        y = (points[:, 1].min() + points[:, 1].max()) / height - 1
        fill = np.clip(fill + (ramp - y) * rng.uniform(-40, 40), 0, 255)
    if not hollow:
        alpha = mask[part][..., None].astype(np.float32) / 255
        out = out * (1 - alpha) + fill * alpha
    if edge:
        alpha = line[part][..., None].astype(np.float32) / 255
        out = out * (1 - alpha) + np.array(edge, np.float32) * alpha
    painted = canvas.copy()
    painted[part] = out.astype(np.uint8)
    return painted


def weathered(canvas: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur, exposure, noise and JPEG, each at times."""
    if rng.random() < 0.12:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.3)).astype(np.uint8)
    if rng.random() < 0.25:
        gain, offset = rng.uniform(0.93, 1.05), rng.uniform(-8, 8)
        canvas = np.clip(canvas.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        grain = rng.standard_normal((*canvas.shape[:2], 1 if rng.random() < 0.5 else 3), np.float32)
        sigma = np.float32(rng.uniform(1, 13))
        canvas = np.clip(canvas + grain * sigma, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        store = io.BytesIO()
        Image.fromarray(canvas).save(store, "JPEG", quality=int(rng.integers(35, 96)))
        canvas = np.asarray(Image.open(store).convert("RGB"))
    return canvas


def canvas_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: 84 to 900 pixels, up to 3:1, often square or 4:3."""
    longest = math.exp(rng.uniform(math.log(110), math.log(900)))
    pick = rng.random()
    if pick < 0.4:
        ratio = 1.0
    elif pick < 0.65:
        ratio = float(rng.choice([4 / 3, 3 / 2, 16 / 9, 5 / 4]))
    else:
        ratio = rng.uniform(1, 3)
    short = max(84, round(longest / ratio))
    long = max(short, round(longest))
    return (long, short) if rng.random() < 0.6 else (short, long)
