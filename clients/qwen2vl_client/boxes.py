"""Boxes in a model's words, read for the three ways in which Qwen's models write them.

====================  ==================================================  =====================
convention            written                                             coordinates
====================  ==================================================  =====================
``qwen2-vl``          ``<|object_ref_start|>cat<|object_ref_end|>``       thousandths of the
                      ``<|box_start|>(1,2),(3,4)<|box_end|>``             picture's sides
``qwen-vl``           ``<ref>cat</ref><box>(1,2),(3,4)</box>``            the same
``qwen2.5-vl``        JSON, often fenced:                                 pixels of the picture
                      ``[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]``     as the model saw it
====================  ==================================================  =====================

Reading never fails: what is no whole box is passed over. Sources: the README and TUTORIAL of
Qwen-VL, the report of Qwen2-VL (arXiv 2409.12191, section 2.2), the cookbooks of Qwen2.5-VL.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwen2vl_client.errors import InvalidArgumentError

Convention = Literal["qwen2-vl", "qwen-vl", "qwen2.5-vl"]
CONVENTIONS: tuple[Convention, ...] = ("qwen2-vl", "qwen-vl", "qwen2.5-vl")
#: Width and height, in pixels.
Size: TypeAlias = tuple[int, int]

_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,9})?)\s*"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_TAGGED = {
    "qwen2-vl": re.compile(
        r"<\|object_ref_start\|>((?:(?!<\|object_ref_start\|>).)*?)<\|object_ref_end\|>"
        rf"|<\|box_start\|>\s*{_PAIRS}\s*<\|box_end\|>",
        re.DOTALL,
    ),
    "qwen-vl": re.compile(rf"<ref>((?:(?!<ref>).)*?)</ref>|<box>\s*{_PAIRS}\s*</box>", re.DOTALL),
}
_BARE = re.compile(_PAIRS)
_JSON = json.JSONDecoder()
_LABELS = ("label", "text_content", "text", "name")


@dataclass(frozen=True)
class Mark:
    """A box as the model wrote it: left, top, right, bottom in the convention's units."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""


@dataclass(frozen=True)
class Box:
    """A box in pixels of the source picture, within it: ``left < right``, ``top < bottom``."""

    left: int
    top: int
    right: int
    bottom: int
    label: str = ""

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom: what Pillow's ``crop`` takes."""
        return self.left, self.top, self.right, self.bottom


def boxes_in(
    text: str, size: Size, seen: Size | None = None, convention: Convention | None = None
) -> tuple[Box, ...]:
    """Return the boxes of an answer in pixels of a source picture of ``size``.

    ``seen`` is the size at which the model saw it; Qwen2.5-VL's coordinates are pixels of that.
    A box is cut to the picture; one that lies outside, or has no area, is left out.

    Raises:
        InvalidArgumentError: a size is not positive; or there are boxes in pixels of the picture
            as it was seen, and ``seen`` is not told.
    """
    found = convention or convention_of(text)
    marks = marks_in(text, found) if found else ()
    if not marks:
        return ()
    if found == "qwen2.5-vl" and seen is None:
        raise InvalidArgumentError(
            "these boxes are in pixels of the picture as the model saw it: give that size as "
            "seen=(width, height)"
        )
    scale = seen if found == "qwen2.5-vl" and seen else (1000, 1000)
    if min(*size, *scale) < 1:
        raise InvalidArgumentError(f"the sizes {size} and {scale} must be positive")
    placed = (_placed(mark, size, scale) for mark in marks)
    return tuple(box for box in placed if box is not None)


def convention_of(text: str) -> Convention | None:
    """Return how an answer writes its boxes, None where it has none.

    Pairs of points without marks are what is left of Qwen2-VL's where special tokens were dropped.
    """
    if "<|box_start|>" in text:
        return "qwen2-vl"
    if "<box>" in text:
        return "qwen-vl"
    if "bbox_2d" in text:
        return "qwen2.5-vl"
    return "qwen2-vl" if _BARE.search(text) else None


def marks_in(text: str, convention: Convention) -> tuple[Mark, ...]:
    """Return the boxes of an answer as they were written, the two corners in order."""
    if convention == "qwen2.5-vl":
        return tuple(_from_json(text))
    if convention not in _TAGGED:
        raise InvalidArgumentError(f"convention={convention!r} is none of {', '.join(CONVENTIONS)}")
    marks = tuple(_from_tags(text, _TAGGED[convention]))
    if not marks and convention == "qwen2-vl":
        return tuple(_mark(found.groups(), "") for found in _BARE.finditer(text))
    return marks


def written(marks: Sequence[Mark], convention: Convention) -> str:
    """Write boxes as a model of that convention does; coordinates are rounded to whole numbers."""
    if convention == "qwen2.5-vl":
        listed = [{"bbox_2d": _corners(mark), "label": mark.label} for mark in marks]
        lines = ",\n".join(f"\t{json.dumps(one, ensure_ascii=False)}" for one in listed)
        return f"```json\n[\n{lines}\n]\n```"
    ref = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
    if convention == "qwen-vl":
        ref = ("<ref>", "</ref>", "<box>", "</box>")
    pieces = []
    for mark in marks:
        left, top, right, bottom = _corners(mark)
        pieces.append(
            f"{ref[0]}{mark.label}{ref[1]}{ref[2]}({left},{top}),({right},{bottom}){ref[3]}"
        )
    return "".join(pieces)


def _from_tags(text: str, pattern: re.Pattern[str]) -> Iterator[Mark]:
    label = ""
    for found in pattern.finditer(text):
        if found[1] is not None:
            label = found[1].strip()
        else:  # a name may stand before several boxes
            yield _mark(found.groups()[1:], label)


def _from_json(text: str) -> Iterator[Mark]:
    for found in re.finditer(r"\{", text):  # of each object, those within another, too
        try:
            value, _ = _JSON.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        corners = value.get("bbox_2d")
        if not isinstance(corners, list) or len(corners) != 4 or not all(map(_finite, corners)):
            continue
        named = (value[key] for key in _LABELS if isinstance(value.get(key), str))
        yield _mark(corners, next(named, "").strip())


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e9  # false of NaN, too


def _mark(corners: Sequence[object], label: str) -> Mark:
    a, b, c, d = (float(str(corner)) for corner in corners)
    return Mark(min(a, c), min(b, d), max(a, c), max(b, d), label)


def _corners(mark: Mark) -> list[int]:
    return [round(side) for side in (mark.left, mark.top, mark.right, mark.bottom)]


def _placed(mark: Mark, size: Size, scale: Size) -> Box | None:
    def along(value: float, side: int) -> int:
        pixel = math.floor(value * size[side] / scale[side] + 0.5)
        return min(max(pixel, 0), size[side])

    left, right = along(mark.left, 0), along(mark.right, 0)
    top, bottom = along(mark.top, 1), along(mark.bottom, 1)
    if left >= right or top >= bottom:
        return None
    return Box(left, top, right, bottom, mark.label)
