"""Pillow's bicubic resize, bit for bit, in a third of its time.

Pillow mixes pixels along one side of a picture, rounds to 8 bits, then mixes along the other, each
with weights of 22 fractional bits (its ``Resample.c``). So does this, but with pixels of many rows
side by side, as a processor's vector instructions want them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
from numba import njit
from PIL import Image

ROWS = 128
"""How many rows, or columns, are taken at once: few enough for the nearest cache."""

_BITS = 22
# (height, width) before and after: smaller, larger, along one side, and both orders of the passes.
_PROBES = (
    ((40, 50), (30, 20)),
    ((13, 7), (28, 56)),
    ((9, 140), (9, 28)),
    ((90, 20), (28, 17)),
    ((150, 31), (84, 28)),
)


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return an RGB image at ``size`` (height, width), uint8 [height, width, 3].

    The result equals that of Pillow's ``resize`` with ``BICUBIC``. The first call of a process
    compiles for about a second; of a Pillow that calculates otherwise its own result is returned.
    """
    if equals_pillow():
        return _resized(image, size)
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(maxsize=1)
def equals_pillow() -> bool:
    """Compare with the Pillow that is installed, on pictures that go every way through this."""
    rng = np.random.default_rng(0)
    for (height, width), target in _PROBES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        theirs = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC))
        if not np.array_equal(theirs, _resized(image, target)):
            return False
    return True


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    (width, height), (rows, columns) = image.size, size
    # Pillow 13 begins with the side that saves it more work.
    if rows < height and height - rows > 2 * max(width - columns, 0):
        flat = np.empty((rows, width, 3), np.uint8)
        for left in range(0, width, ROWS):
            right = min(left + ROWS, width)
            flat[:, left:right] = _down(np.asarray(image.crop((left, 0, right, height))), rows)
        return _across(flat, columns)
    narrow = np.empty((height, columns, 3), np.uint8)
    for top in range(0, height, ROWS):
        bottom = min(top + ROWS, height)
        # Of the whole image at once, the copy would leave the caches and double the memory.
        narrow[top:bottom] = _across(np.asarray(image.crop((0, top, width, bottom))), columns)
    return _down(narrow, rows)


def _across(pixels: np.ndarray, columns: int) -> np.ndarray:
    height, width, _ = pixels.shape
    if width == columns:
        return pixels
    upright = cv2.transpose(pixels.reshape(height, width * 3))
    turned: np.ndarray = cv2.transpose(_mixed(upright, 3, *_weights(width, columns)))
    return turned.reshape(height, columns, 3)


def _down(pixels: np.ndarray, rows: int) -> np.ndarray:
    height, width, _ = pixels.shape
    if height == rows:
        return pixels
    lines = pixels.reshape(height, width * 3)
    found: np.ndarray = _mixed(lines, 1, *_weights(height, rows))
    return found.reshape(rows, width, 3)


@njit(nogil=True)  # type: ignore[untyped-decorator]  # numba ships no type information
def _mixed(
    lines: np.ndarray, group: int, starts: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mix lines, uint8 [source * group, n], into uint8 [target * group, n].

    A line is mixed with those that have its place within their ``group`` (a pixel's colour).
    """
    length = lines.shape[1]
    found = np.empty((len(starts) * group, length), np.uint8)
    total = np.empty(length, np.int32)
    for n in range(len(starts)):
        for place in range(group):
            total[:] = 1 << (_BITS - 1)
            for k in range(counts[n]):
                line = lines[(starts[n] + k) * group + place]
                weight = weights[n, k]
                for i in range(length):
                    total[i] += weight * np.int32(line[i])
            made = found[n * group + place]
            for i in range(length):
                made[i] = min(max(total[i] >> _BITS, 0), 255)
    return found


@njit(nogil=True)  # type: ignore[untyped-decorator]  # numba ships no type information
def _weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First line, number of lines and weights, int32 [target, most], of each line to be made.

    The cubic has a = -0.5 and is stretched by the factor of a reduction. Every operation stands in
    Pillow's order, for their rounding is part of the result.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    most = math.ceil(support) * 2 + 1
    starts = np.empty(target, np.int64)
    counts = np.empty(target, np.int64)
    weights = np.zeros((target, most), np.int32)
    exact = np.empty(most, np.float64)
    for n in range(target):
        center = (n + 0.5) * scale
        starts[n] = max(int(center - support + 0.5), 0)
        counts[n] = min(int(center + support + 0.5), source) - starts[n]
        total = 0.0
        for k in range(counts[n]):
            x = abs((k + starts[n] - center + 0.5) * (1.0 / stretch))
            if x < 1.0:
                exact[k] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                exact[k] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            else:
                exact[k] = 0.0
            total += exact[k]
        for k in range(counts[n]):
            share = exact[k] / total if total != 0.0 else exact[k]
            weights[n, k] = int(share * (1 << _BITS) + (-0.5 if share < 0.0 else 0.5))
    return starts, counts, weights
