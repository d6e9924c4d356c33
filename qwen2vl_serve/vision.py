"""Pixel arithmetic of Qwen2-VL: from a picture's size to its visual tokens.

Standard library only. A visual token stands for 28 × 28 pixels: patches of 14, merged 2 × 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FACTOR = 28
"""Side of the square of pixels behind one visual token: ``patch_size * merge_size``."""

MAX_ASPECT = 200
"""Longest side over shortest; the reference refuses what exceeds it."""

MARKER_TOKENS = 2
"""``<|vision_start|>`` and ``<|vision_end|>`` around each picture in a prompt."""

FRAME_FACTOR = 2
"""Frames of a video behind one layer of visual tokens: ``temporal_patch_size``."""


@dataclass(frozen=True, slots=True)
class PixelBudget:
    """Bounds of a resized picture, in pixels (height × width)."""

    min_pixels: int
    max_pixels: int


def smart_resize(
    height: int, width: int, budget: PixelBudget, factor: int = FACTOR
) -> tuple[int, int]:
    """Return the (height, width) at which the model sees a picture of ``height`` × ``width``.

    Both are multiples of ``factor``, their product lies within ``budget`` wherever the aspect ratio
    allows, and the ratio is kept as nearly as that permits. Source: ``smart_resize`` of
    qwen_vl_utils 0.0.14. Where rounding makes that unusable for the processor behind it, it is
    mended: a side of 0 becomes ``factor``, a side beyond 200 times the other is cut to that.

    Raises:
        ValueError: a side is not positive, or the aspect ratio exceeds 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {width} × {height} pixels has no content")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width} × {height} pixels exceed the aspect ratio {MAX_ASPECT}")
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > budget.max_pixels:
        shrink = math.sqrt((height * width) / budget.max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return min(rows, MAX_ASPECT * columns), min(columns, MAX_ASPECT * rows)


def visual_tokens(height: int, width: int) -> int:
    """Return the tokens of a picture already resized to multiples of 28, without its markers."""
    return (height // FACTOR) * (width // FACTOR)
