"""What a TIFF says of its strips or tiles, and whether they hold all of its pixels.

libtiff paints what is missing of a JPEG grey and of a fax black or white, and says nothing.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from PIL import Image

from qwen2vl_serve.media import jpeg

MOST_TAGS = 1 << 15
MOST_JPEGS = 1 << 13
"""Strips or tiles that are each a JPEG: each is looked at, and they take 3 s at most."""

MOST_TILE = 2048 * 2048
"""Pixels of a tile, whatever the picture's size: libtiff unpacks a whole one at a time."""

_BIG, _MISREAD = b"II+\0", b"MM\0+"
_ORDERS = MappingProxyType({b"II*\0": "<", b"II\0*": "<", _BIG: "<", b"MM\0*": ">", b"MM*\0": ">"})
_NUMBERS = MappingProxyType({1: "B", 3: "H", 4: "L", 16: "Q", 6: "B", 8: "H", 9: "L", 17: "Q"})
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIPS, _STRIP_ROWS, _STRIP_SIZES, _PLANES = 273, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES, _JPEG_TABLES = 322, 323, 324, 325, 347
_USED = frozenset({_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANES, _JPEG_TABLES})
_USED |= {_STRIPS, _STRIP_ROWS, _STRIP_SIZES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES}
_JPEG = 7
_FAXES = frozenset({2, 4})
_GROUP_3 = frozenset({3, 32771})
_APART = 2


class UnfitTiff(Exception):
    """A TIFF is not taken as it is; the text says what it is like."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is said of the strips or tiles; ``tile`` is (width, height), of strips None."""

    pieces: int = 0
    tile: tuple[int, int] | None = None
    compression: int = 1

    def check(self, size: tuple[int, int]) -> None:
        """Raise ``UnfitTiff`` where a picture of ``size`` should not be decoded from them."""
        if self.compression in _GROUP_3 or (self.compression in _FAXES and self.tile):
            raise UnfitTiff("packed like a fax, in a way that shows no damage")
        if self.compression == _JPEG and self.pieces > MOST_JPEGS:
            raise UnfitTiff(f"of {self.pieces} JPEGs, at most {MOST_JPEGS}")
        width, height = self.tile or (0, 0)
        if width * height > max(MOST_TILE, 2 * size[0] * size[1]):
            raise UnfitTiff(
                f"of {size[0]} × {size[1]} pixels in tiles of {width} × {height}, at most "
                f"{MOST_TILE} pixels each or twice the picture's"
            )


def layout(data: bytes) -> Layout | None:
    """Return how a TIFF or BigTIFF is laid out; of anything else None.

    Raises:
        UnfitTiff: what is said twice is read one way by Pillow, another by libtiff.
    """
    said: dict[int, tuple[int, int]] = {}
    for tag, count, value in _tags(data):
        if tag in said:
            raise UnfitTiff(f"that has the tag {tag} twice")
        said[tag] = count, value
    if not said:
        return None
    pieces = max(said.get(tag, (0, 0))[0] for tag in (_STRIPS, _TILES))
    sides = [said[tag][1] for tag in (_TILE_WIDTH, _TILE_HEIGHT) if tag in said]
    tile = (sides[0], sides[-1]) if sides else None
    return Layout(pieces, tile, said.get(_COMPRESSION, (1, 1))[1])


def is_whole(data: bytes, image: Image.Image) -> bool:
    """Tell whether all pixels are there, of a kind of data of which libtiff would not tell."""
    tags: Any = getattr(image, "tag_v2", {})
    compression = tags.get(_COMPRESSION)
    if compression in _FAXES:
        return _fax_is_whole(data)
    return compression != _JPEG or _jpegs_are_whole(data, image.size, tags)


def _tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Give each tag of the first directory with its count and, if it is a number, its value."""
    order, big = _ORDERS.get(data[:4]), data[:4] == _BIG
    if data[:4] == _MISREAD:  # by Pillow, as if it were no BigTIFF
        raise UnfitTiff("of the kind BigTIFF, in the order of bytes that is called MM")
    if order is None:
        return
    entry = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    except (struct.error, OverflowError):
        return
    start += 8 if big else 2
    size = min(count, MOST_TAGS, (len(data) - start) // entry.size) * entry.size
    for tag, kind, held, inline in entry.iter_unpack(data[start : start + size]):
        if tag not in _USED:
            continue
        form = struct.Struct(order + _NUMBERS.get(kind, "L"))
        if form.size > len(inline):
            raise UnfitTiff(f"whose tag {tag} is of a type that only a BigTIFF has")
        yield tag, held, form.unpack_from(inline)[0]


def _fax_is_whole(data: bytes) -> bool:
    import av  # noqa: PLC0415  # FFmpeg: loaded by the first picture or video that needs it

    context = av.CodecContext.create("tiff", "r")
    context.thread_count = 1
    context.options = {"err_detect": "explode"}
    try:
        return bool(context.decode(av.Packet(data)))
    except av.FFmpegError:
        return False


def _jpegs_are_whole(data: bytes, size: tuple[int, int], tags: Any) -> bool:
    tiled = _TILES in tags
    starts = tags[_TILES if tiled else _STRIPS]
    sizes = tags[_TILE_SIZES if tiled else _STRIP_SIZES]
    width, height = size
    rows = tags[_TILE_HEIGHT] if tiled else min(tags.get(_STRIP_ROWS, height), height)
    columns = tags[_TILE_WIDTH] if tiled else width
    across, down = -(-width // columns), -(-height // rows)
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANES) == _APART else 1
    if not across * down * planes <= min(len(starts), len(sizes)):
        return False
    tables = bytes(tags.get(_JPEG_TABLES, b"")).removesuffix(b"\xff\xd9")
    for number in range(across * down * planes):
        top = number // across % down * rows
        needed = rows if tiled else min(rows, height - top)
        piece = data[starts[number] : starts[number] + sizes[number]]
        coded = tables + piece[2:] if tables else piece
        if not _jpeg_is_whole(coded, columns, needed, rows):
            return False
    return True


def _jpeg_is_whole(coded: bytes, width: int, needed: int, most: int) -> bool:
    """Tell whether a JPEG is as wide as a piece, of its rows, and whole."""
    with Image.open(io.BytesIO(coded), formats=["JPEG"]) as image:
        if image.width != width or not needed <= image.height <= most:
            return False
        if not jpeg.has_few_scans(coded):
            return False
        image.load()
        return jpeg.is_whole(coded, image)
