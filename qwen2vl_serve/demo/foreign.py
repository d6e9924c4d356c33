"""Pictures by other drawing programs (matplotlib, cairo), which training never uses.

They tell whether the model learnt to see or only learnt this package's own renderer. Colours are the
programs' own names, fonts their defaults. Needs matplotlib and, for the cairo half, cairocffi.
"""  # noqa: E501

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from qwen2vl_serve.demo.compose import printed_text
from qwen2vl_serve.demo.draw import Box, Pixels, Scene, Thing

NAMED = {
    "red": ("red", "tab:red", "crimson"), "orange": ("orange", "tab:orange"),
    "yellow": ("yellow", "gold"), "green": ("green", "tab:green", "lime"),
    "blue": ("blue", "tab:blue", "royalblue"), "purple": ("purple", "tab:purple"),
    "pink": ("hotpink", "tab:pink"), "brown": ("brown", "tab:brown", "saddlebrown"),
    "black": ("black",), "gray": ("gray", "tab:gray"), "cyan": ("cyan", "tab:cyan"),
}  # fmt: skip
SHAPES = (
    "circle",
    "square",
    "triangle",
    "rectangle",
    "star",
    "diamond",
    "oval",
    "hexagon",
    "pentagon",
)


def corners(shape: str) -> list[tuple[float, float]]:
    """The polygon of a shape in the unit circle, y upwards; empty for round ones."""
    counts = {"triangle": 3, "pentagon": 5, "hexagon": 6}
    if shape in counts:
        n = counts[shape]
        turns = [math.pi / 2 + 2 * math.pi * k / n for k in range(n)]
        return [(math.cos(t), math.sin(t)) for t in turns]
    if shape == "star":
        radii = [1.0, 0.4] * 5
        return [
            (
                r * math.cos(math.pi / 2 + math.pi * k / 5),
                r * math.sin(math.pi / 2 + math.pi * k / 5),
            )
            for k, r in enumerate(radii)
        ]
    sides = {"square": (0.8, 0.8), "rectangle": (1.0, 0.55)}
    if shape in sides:
        w, h = sides[shape]
        return [(-w, -h), (w, -h), (w, h), (-w, h)]
    return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)] if shape == "diamond" else []


def _plan(
    rng: np.random.Generator, count: int, colours: tuple[str, ...]
) -> list[tuple[str, str, float, float, float]]:
    """Shape, colour, centre (y upwards) and radius, on a loose grid so that nothing touches."""
    spots = [(0.5, 0.5)] if count == 1 else [(0.25, 0.5), (0.75, 0.5)]
    if count == 1 and rng.random() < 0.5:
        spots = [(float(rng.choice([0.25, 0.5, 0.75])), float(rng.choice([0.25, 0.5, 0.75])))]
    elif count == 2 and rng.random() < 0.4:
        spots = [(0.5, 0.25), (0.5, 0.75)]
    elif count > 2:
        grid = [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.25, 0.75)]
        spots = [grid[int(k)] for k in rng.permutation(6)[:count]]
    most = 0.22 if count < 3 else 0.13
    return [
        (str(rng.choice(SHAPES)), str(rng.choice(colours)), x, y, float(rng.uniform(0.6, 1) * most))
        for x, y in spots
    ]


def _truth(plan: list[tuple[str, str, float, float, float]], width: int, height: int) -> Scene:
    things = []
    for shape, colour, x, y, radius in plan:
        points = corners(shape) or [
            (-1, -0.55 if shape == "oval" else -1),
            (1, 0.55 if shape == "oval" else 1),
        ]
        xs, ys = [x + p[0] * radius for p in points], [1 - y - p[1] * radius for p in points]
        box: Box = (min(xs), min(ys), max(xs), max(ys))
        things.append(Thing(shape, colour, box))
    return Scene(width, height, tuple(things), "white")


def with_matplotlib(seed: int, count: int, text: bool = False) -> tuple[Pixels, Scene]:
    """A figure of patches, or of one text in the default font."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Circle, Ellipse, Polygon  # noqa: PLC0415

    rng = np.random.default_rng((seed, 21))
    side = float(rng.uniform(2, 6))
    figure = Figure(figsize=(side, side), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    colour = str(rng.choice(list(NAMED)))
    if text:
        printed = printed_text(rng)
        size = side * 72 / max(2.5, len(printed)) * float(rng.uniform(0.7, 1.1))
        axes.text(
            0.5, 0.5, printed, fontsize=size, color=NAMED[colour][0], ha="center", va="center"
        )
        scene = Scene(0, 0, (Thing("text", colour, (0.1, 0.3, 0.9, 0.7), printed),), "white")
    else:
        plan = _plan(rng, count, tuple(NAMED))
        for shape, name, x, y, radius in plan:
            tone = str(rng.choice(NAMED[name]))
            points = [(x + px * radius, y + py * radius) for px, py in corners(shape)]
            if points:
                axes.add_patch(Polygon(points, color=tone))
            elif shape == "oval":
                axes.add_patch(Ellipse((x, y), 2 * radius, 1.1 * radius, color=tone))
            else:
                axes.add_patch(Circle((x, y), radius, color=tone))
        scene = _truth(plan, 0, 0)
    store = io.BytesIO()
    figure.savefig(store, format="png", facecolor="white")
    return np.asarray(Image.open(store).convert("RGB")), scene


def with_cairo(seed: int, count: int, text: bool = False) -> tuple[Pixels, Scene]:
    """A cairo surface with filled paths, or one text in the toy font "sans"."""
    import cairocffi as cairo  # noqa: PLC0415
    from matplotlib.colors import to_rgb  # noqa: PLC0415

    rng = np.random.default_rng((seed, 22))
    side = int(rng.integers(150, 700))
    surface = cairo.ImageSurface(cairo.FORMAT_RGB24, side, side)
    pen = cairo.Context(surface)
    pen.set_source_rgb(1, 1, 1)
    pen.paint()
    colour = str(rng.choice(list(NAMED)))
    if text:
        printed = printed_text(rng)
        pen.select_font_face("sans", weight=int(rng.integers(2)))
        pen.set_font_size(side / max(2.5, len(printed)) * float(rng.uniform(0.8, 1.2)))
        x, y, width, height, *_ = pen.text_extents(printed)
        pen.move_to(side / 2 - width / 2 - x, side / 2 - height / 2 - y)
        pen.set_source_rgb(*to_rgb(NAMED[colour][0]))
        pen.show_text(printed)
        scene = Scene(side, side, (Thing("text", colour, (0.1, 0.3, 0.9, 0.7), printed),), "white")
    else:
        plan = _plan(rng, count, tuple(NAMED))
        for shape, name, x, y, radius in plan:
            pen.set_source_rgb(*to_rgb(str(rng.choice(NAMED[name]))))
            pen.new_path()
            points = corners(shape)
            if points:
                for px, py in points:
                    pen.line_to((x + px * radius) * side, (1 - y - py * radius) * side)
                pen.close_path()
            else:
                pen.save()
                pen.translate(x * side, (1 - y) * side)
                pen.scale(1, 0.55 if shape == "oval" else 1)
                pen.arc(0, 0, radius * side, 0, 2 * math.pi)
                pen.restore()
            pen.fill()
        scene = _truth(plan, side, side)
    rows = np.frombuffer(surface.get_data(), np.uint8).reshape(side, surface.get_stride() // 4, 4)
    return np.ascontiguousarray(rows[:, :side, 2::-1]), scene
