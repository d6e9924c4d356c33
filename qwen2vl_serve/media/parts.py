"""Bounds on the parts of a picture's file: Pillow reads them one by one, in Python."""

from __future__ import annotations

import io
import sys

from PIL import Image, ImageFile

from qwen2vl_serve.media import tiff

MOST_PARTS = 1 << 15
"""So many reads lead to the pixels at most: a segment of a JPEG takes four, a chunk three, and of a
GIF's metadata each 80 bytes two; Photoshop writes a megabyte of those. They take 20 ms."""

MOST_STRIPS = 1 << 19
"""Of a TIFF, or tiles: more than rows of a picture of 100 million pixels that may be shown."""


class TooManyParts(Exception):
    """A file was made to be slow to read; the text names what of it, and the limit."""


def opened(data: bytes, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Return what ``Image.open`` makes of a file.

    Raises what it raises, ``TooManyParts``, or ``tiff.UnfitTiff``.
    """
    layout = tiff.layout(data)
    if layout and layout.pieces > MOST_STRIPS:
        raise TooManyParts(f"{layout.pieces} strips, at most {MOST_STRIPS}")
    source = _Source(data)
    image = Image.open(source, formats=formats)
    if layout:
        layout.check(image.size)
    source.left = sys.maxsize
    return image


class _Source(io.BytesIO):
    """A file's bytes, of which ``left`` more reads are granted."""

    left = MOST_PARTS

    def read(self, size: int | None = -1, /) -> bytes:
        """Return what is next; raises ``TooManyParts``."""
        self.left -= 1
        if self.left < 0:
            raise TooManyParts(f"more than {MOST_PARTS} before its pixels")
        return super().read(size)
