"""Printed text for pictures: fonts that come with Python packages, one mask and a box a letter."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Package, folder within it, and the file names' beginnings: upright book faces, not symbols.
FONT_SOURCES = (
    ("matplotlib", "mpl-data/fonts/ttf", ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10",
                                          "cmss10", "cmtt10", "cmb10")),
    ("font_source_sans_pro", "", ("SourceSansPro",)),
    ("font_source_serif_pro", "", ("SourceSerifPro",)),
)  # fmt: skip
HERSHEY = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
)


@lru_cache(maxsize=1)
def font_files() -> tuple[str, ...]:
    """Paths of every usable TrueType file in the installed font packages, sorted.

    Raises ModuleNotFoundError when one of the packages is absent: a smaller set of fonts would
    train another model.
    """
    found: list[str] = []
    for package, folder, beginnings in FONT_SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            name = package.replace("_", "-")
            raise ModuleNotFoundError(f"drawing needs the package {name}: pip install {name}")
        root = Path(spec.submodule_search_locations[0]) / folder
        found += [
            str(path)
            for path in sorted(root.rglob("*.ttf"))
            if path.name.startswith(beginnings) and "Display" not in path.name
        ]
    return tuple(found)


@lru_cache(maxsize=512)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """One face at one pixel size; the empty path is Pillow's built-in face."""
    if path:
        return ImageFont.truetype(path, size)
    built_in = ImageFont.load_default(size)
    assert isinstance(built_in, ImageFont.FreeTypeFont)  # noqa: S101
    return built_in


def pick_font(rng: np.random.Generator) -> str | int:
    """A font's path, the empty string (Pillow's own) or a Hershey face's number."""
    choice = rng.random()
    if choice < 0.12:
        return int(rng.choice(HERSHEY))
    if choice < 0.24:
        return ""
    files = font_files()
    if choice < 0.45:
        plain = [f for f in files if Path(f).stem in ("DejaVuSans", "DejaVuSans-Bold")]
        return plain[int(rng.integers(len(plain)))]
    return files[int(rng.integers(len(files)))]


def lettering(
    text: str, height: int, font: str | int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[tuple[float, float, float, float]]]:
    """The text as a tight mask [rows, columns] of about ``height`` rows, and a box per letter.

    Boxes are in the mask's pixels. ``height`` is the size of a capital letter.
    """
    if isinstance(font, int):
        (_, unit), _ = cv2.getTextSize("H", font, 1.0, 1)
        scale = height / unit
        thick = max(1, round(height * rng.uniform(0.07, 0.16)))
        (width, top), below = cv2.getTextSize(text, font, scale, thick)
        mask = np.zeros((top + below + 2 * thick, width + 2 * thick), np.uint8)
        cv2.putText(mask, text, (thick, top + thick), font, scale, 255, thick, cv2.LINE_AA)
        starts = [cv2.getTextSize(text[:n], font, scale, thick)[0][0] + thick
                  for n in range(1, len(text) + 1)]  # fmt: skip
        edges = [float(thick), *map(float, starts)]
    else:
        face = load_font(font, max(8, round(height / 0.72)))
        edges = [face.getlength(text[:n]) + 4 for n in range(len(text) + 1)]
        sheet = Image.new("L", (int(edges[-1]) + 12, int(height * 2.4) + 8))
        ImageDraw.Draw(sheet).text((4, 4), text, font=face, fill=255)
        mask = np.asarray(sheet)
    rows, columns = np.flatnonzero(mask.max(1) > 40), np.flatnonzero(mask.max(0) > 40)
    y1, y2, x1, x2 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    boxes = [
        (max(0.0, a - x1), 0.0, min(float(x2 - x1), b - x1), float(y2 - y1))
        for a, b in pairwise(edges)
    ]
    return np.ascontiguousarray(mask[y1:y2, x1:x2]), boxes
