"""Boxes drawn on a picture; needs the extra ``draw`` (Pillow)."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl_client.boxes import Box
from qwen2vl_client.errors import InvalidArgumentError, MediaError
from qwen2vl_client.media import ImageSource, file_content

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

#: One for each label, told apart on light and dark grounds and by the colour-blind (Okabe and Ito).
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Where fonts with Chinese characters are, and by which names; the first that has them all is used.
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
FONT_NAMES = (
    "notosanscjk", "notosanssc", "sourcehansans", "wqy", "droidsansfallback", "pingfang",
    "hiragino", "stheiti", "msyh", "simhei", "simsun", "arialunicode", "unifont",
)  # fmt: skip
_SUFFIXES = frozenset({".ttf", ".ttc", ".otf", ".otc"})
_MISSING = "\U0010fffe"  # a noncharacter: no font has it, so it shows what a font shows instead


def draw_boxes(
    image: ImageSource,
    boxes: Iterable[Box],
    *,
    font: str | os.PathLike[str] | None = None,
    font_size: int | None = None,
    width: int | None = None,
) -> Image:
    """Return a copy of a picture, upright, with each box and its label.

    ``image`` is a path, bytes, an open file or a Pillow image. ``font`` names a font file; without
    it a font that has every character of the labels is looked for among the installed ones.
    ``font_size`` and ``width`` are pixels, by default a share of the picture's.

    Raises:
        MediaError: the picture cannot be read.
        InvalidArgumentError: Pillow is not installed, or no font has the labels' characters.
    """
    try:
        from PIL import ImageDraw  # noqa: PLC0415  (an extra, imported by those who ask for it)
    except ImportError:
        raise InvalidArgumentError("draw_boxes() needs Pillow: pip install pillow") from None
    picture = _upright(image)
    listed = list(boxes)
    short = min(picture.size)
    line = width or max(2, round(short / 200))
    letters = _font({box.label for box in listed}, font, font_size or max(12, round(short / 28)))
    labels = list(dict.fromkeys(box.label for box in listed))
    pen = ImageDraw.Draw(picture)
    for box in listed:
        colour = COLOURS[labels.index(box.label) % len(COLOURS)]
        # The last pixel of a box is the one before its right and bottom.
        pen.rectangle(
            (box.left, box.top, box.right - 1, box.bottom - 1), outline=colour, width=line
        )
        if box.label:
            _write(pen, box, letters, colour, picture.size)
    return picture


def _write(pen: Any, box: Box, letters: FreeTypeFont, colour: str, size: Sequence[int]) -> None:
    """Write the label above its box, or within it where there is no room, on a plate."""
    label = " ".join(box.label.split())
    left, top, right, bottom = letters.getbbox(label)
    pad = max(1, round((bottom - top) / 6))
    wide, high = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0, min(box.left, size[0] - wide))
    y = box.top - high if box.top >= high else min(box.top, max(0, size[1] - high))
    pen.rectangle((x, y, x + wide, y + high), fill=colour)
    pen.text((x + pad - left, y + pad - top), label, fill="white", font=letters)


def _upright(image: ImageSource) -> Image:
    from PIL import Image, ImageOps  # noqa: PLC0415  (as above)

    try:
        if isinstance(image, Image.Image):
            opened = image
        else:
            opened = Image.open(io.BytesIO(file_content(image)[0]))
        return _as_shown(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"cannot draw on the picture {image!r:.120}: {error}") from error


def _as_shown(picture: Image) -> Image:
    """Return a picture as the server shows it to a model: on white, of 8 bits a sample.

    For numbers of 32 bits files keep to no range; the largest tells which it is.
    """
    from PIL import Image  # noqa: PLC0415  (as above)

    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        samples = picture.convert("F")  # Pillow's own way to RGB cuts them to 0 to 255
        tops = {"I": (255, 65535), "F": (1, 255)}.get(picture.mode, (65535,))
        high: Any = samples.getextrema()[1]
        top = next((one for one in tops if high <= one), tops[-1])
        return samples.point(lambda sample: sample * (255 / top)).convert("RGB")
    if picture.mode != "RGB" and picture.has_transparency_data:
        seen = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return picture.convert("RGB")


def _font(labels: set[str], given: str | os.PathLike[str] | None, size: int) -> FreeTypeFont:
    """Return a font of ``size`` that has every character of the labels."""
    from PIL import ImageFont  # noqa: PLC0415  (as above)

    needed = frozenset("".join(labels))
    if given is not None:
        try:
            letters = ImageFont.truetype(given, size)
        except OSError as error:
            raise InvalidArgumentError(f"cannot read the font {str(given)!r}: {error}") from error
        lacking = lacking_in(letters, needed)
        if lacking:
            raise InvalidArgumentError(f"the font {str(given)!r} lacks {lacking}; give another")
        return letters
    own = ImageFont.load_default(size)
    if isinstance(own, ImageFont.FreeTypeFont) and not lacking_in(own, needed):
        return own
    for path in installed_fonts():
        try:
            letters = ImageFont.truetype(path, size)
        except OSError:
            continue
        if not lacking_in(letters, needed):
            return letters
    shown = "".join(sorted(needed))[:40]
    raise InvalidArgumentError(
        f"no installed font has all of {shown!r}: install one (Debian: fonts-noto-cjk) or name "
        "its file as font="
    )


def lacking_in(letters: FreeTypeFont, needed: Iterable[str]) -> str:
    """Return those of the characters that a font would show as its empty box."""
    empty = _look(letters, _MISSING)
    return "".join(
        character
        for character in sorted(needed)
        if unicodedata.category(character)[0] not in "ZC" and _look(letters, character) == empty
    )


def _look(letters: FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = letters.getmask(character)
    return mask.size, bytes(mask)


@lru_cache(maxsize=1)
def installed_fonts() -> tuple[Path, ...]:
    """Return the installed font files, those that are known for Chinese first."""
    found = [
        path
        for folder in FONT_FOLDERS
        for path in sorted(Path(os.path.expanduser(folder)).rglob("*"))  # noqa: PTH111  (pathlib's raises where there is no home)
        if path.suffix.lower() in _SUFFIXES
    ]

    def rank(path: Path) -> int:
        name = path.name.lower().replace("-", "").replace("_", "")
        return next((n for n, known in enumerate(FONT_NAMES) if known in name), len(FONT_NAMES))

    return tuple(sorted(found, key=rank))
