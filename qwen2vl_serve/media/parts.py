"""Bounds on the parts of a picture's file: Pillow reads them one by one, in Python."""

from __future__ import annotations

import io
import struct
import sys
from types import MappingProxyType

from PIL import Image

MOST_PARTS = 1 << 15
"""So many reads lead to the pixels at most: a segment of a JPEG takes four, a chunk three, and of a
GIF's metadata each 80 bytes two; Photoshop writes a megabyte of those. They take 20 ms."""

MOST_STRIPS = 1 << 19
"""Of a TIFF, or tiles: more than rows of a picture of 100 million pixels that may be shown."""

_STRIPS = (273, 324)
_ORDERS = MappingProxyType({b"II": "<", b"MM": ">"})


class TooManyParts(Exception):
    """A file was made to be slow to read; the text names what of it, and the limit."""


def opened(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Return what ``Image.open`` makes of a file; raise what it raises, or ``TooManyParts``."""
    if (strips := _strips(data)) > MOST_STRIPS:
        raise TooManyParts(f"{strips} strips, at most {MOST_STRIPS}")
    source = _Source(data)
    image = Image.open(source, formats=formats)
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


def _strips(data: bytes) -> int:
    """Return in how many strips or tiles a TIFF or BigTIFF is; 0 of anything else."""
    order, big = _ORDERS.get(data[:2]), data[2:3] == b"+"
    if order is None:
        return 0
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    except (struct.error, OverflowError):
        return 0
    start += 8 if big else 2
    size = min(count, MOST_PARTS, (len(data) - start) // entry.size) * entry.size
    tags = entry.iter_unpack(data[start : start + size])
    return max((held for tag, _, held in tags if tag in _STRIPS), default=0)
