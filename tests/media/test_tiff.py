"""A TIFF is shown if all of its strips or tiles are there, and none takes more than its picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_serve.errors import InvalidImage
from qwen2vl_serve.media import tiff
from qwen2vl_serve.media.image import decode, read_header
from tests.media.test_image import LIMIT, encoded, ours, photo

Tags = dict[int, tuple[int, ...]]


def written(tags: Tags, pieces: list[bytes], *, tiled: bool = False, twice: int = 0) -> bytes:
    """A TIFF of these tags, all of the type LONG, and of these strips or tiles."""
    starts, data = [], bytearray(b"II*\0\0\0\0\0")
    for piece in pieces:
        starts.append(len(data))
        data += piece
    where, sizes = (324, 325) if tiled else (273, 279)
    held = {**tags, where: tuple(starts), sizes: tuple(map(len, pieces))}
    entries = sorted([*held.items(), *([(twice, held[twice])] if twice else [])])
    packed = []
    for tag, values in entries:
        value = values[0] if len(values) == 1 else len(data)
        if len(values) > 1:
            data += struct.pack(f"<{len(values)}L", *values)
        packed.append(struct.pack("<HHLL", tag, 4, len(values), value))
    data[4:8] = struct.pack("<L", len(data))
    return bytes(data + struct.pack("<H", len(packed)) + b"".join(packed) + bytes(4))


def grey(width: int, height: int, compression: int, **more: tuple[int, ...]) -> Tags:
    """The tags of a grey picture; ``more`` by number, behind a t."""
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    return {tag: (value,) for tag, value in tags.items()} | {
        int(name[1:]): values for name, values in more.items()
    }


def changed(data: bytes, **values: int) -> bytes:
    """A small TIFF of Pillow's with other values of some tags, by number behind a t."""
    (start,) = struct.unpack_from("<L", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, at)
        if (value := values.get(f"t{tag}")) is not None:
            data = data[:at] + struct.pack("<HHLL", tag, 4, 1, value) + data[at + 12 :]
    return data


def strip_size(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        (size,) = image.tag_v2[279]  # type: ignore[attr-defined]
        return int(size)


@pytest.mark.parametrize("compression", ["jpeg", "group4", "tiff_ccitt"])
@pytest.mark.parametrize("size", [(64, 64), (300, 500)])
def test_a_strip_that_is_cut_or_said_to_be_longer_is_refused(
    compression: str, size: tuple[int, int]
) -> None:
    """libtiff would paint the rest grey, black or white; the whole one is shown as Pillow does."""
    picture = photo(*size, "RGB" if compression == "jpeg" else "1")
    data = encoded(picture, "TIFF", compression=compression, strip_size=10**6)
    with Image.open(io.BytesIO(data)) as image:
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(data, size[::-1], "p"), shown)
    twice = 2 * size[1]
    for damaged in (
        changed(data, t279=strip_size(data) // 2),
        changed(data, t257=twice, t278=twice),
    ):
        with pytest.raises(InvalidImage, match="damaged picture"):
            ours(damaged)


@pytest.mark.parametrize("options", [{}, {"strip_size": 10**9}, {"big_tiff": True}])
@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
def test_jpegs_in_strips_are_shown(mode: str, options: dict[str, Any]) -> None:
    """Of each mode, of many strips with common tables and of one, in a BigTIFF as well."""
    data = encoded(photo(333, 517, mode), "TIFF", compression="jpeg", **options)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode(data, (517, 333), "p"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("side", [64, 512])
def test_jpegs_in_tiles_are_shown_if_each_is_whole(side: int) -> None:
    """One that is cut, or smaller than its tile, would be grey or black in part."""
    picture = photo(333, 517, "L")
    corners = [(x, y) for y in range(0, 517, side) for x in range(0, 333, side)]
    tiles = [
        encoded(picture.crop((x, y, x + side, y + side)), "JPEG", quality=80) for x, y in corners
    ]
    tags = grey(333, 517, 7, t322=(side,), t323=(side,))
    assert ours(written(tags, tiles, tiled=True)).std() > 20
    small = encoded(picture.crop((0, 0, side, side // 2)), "JPEG")
    for first in (tiles[0][: len(tiles[0]) * 2 // 3], small, b""):
        with pytest.raises(InvalidImage, match="damaged picture"):
            ours(written(tags, [first, *tiles[1:]], tiled=True))
    with pytest.raises(InvalidImage, match="damaged picture"):
        ours(written(tags | {257: (517 + side,)}, tiles, tiled=True))


def test_so_many_jpegs_are_looked_at() -> None:
    """Each takes time in Python."""
    tags = grey(16, 16 * 9000, 7, t278=(16,))
    with pytest.raises(InvalidImage, match="TIFF of 9000 JPEGs, at most 8192; save it anew"):
        read_header(written(tags, [b""] * 9000), LIMIT, "p")


def test_a_fax_that_shows_no_damage_is_refused() -> None:
    """Group 3 goes on at the next line, whatever was before; junk of Group 4 takes no time."""
    data = encoded(photo(300, 200, "1"), "TIFF", compression="group3")
    with pytest.raises(InvalidImage, match="packed like a fax, in a way that shows no damage"):
        read_header(data, LIMIT, "p")
    junk = grey(707, 141_421, 4, t278=(141_421,)) | {258: (1,)}
    with pytest.raises(InvalidImage, match="damaged picture"):
        decode(written(junk, [b"\x55\xaa" * 500]), (280, 280), "p")


@pytest.mark.parametrize("side", [512, 2048, 2064, 40_000])
def test_a_tile_is_no_larger_than_a_picture_needs(side: int) -> None:
    """libtiff unpacks a whole one, and the budget counts the picture's pixels."""
    rows = zlib.compress(bytes(side * min(side, 2048)))
    data = written(grey(100, 100, 8, t322=(side,), t323=(side,)), [rows], tiled=True)
    if side <= 2048:
        assert read_header(data, LIMIT, "p").width == 100
        assert (ours(data) == 0).all()
    else:
        with pytest.raises(
            InvalidImage, match=f"100 × 100 pixels in tiles of {side} × {side}, at most {2048**2} "
        ):
            read_header(data, LIMIT, "p")


def test_a_large_picture_may_be_a_tile() -> None:
    """Its own size, rounded up to what a tile may be."""
    assert tiff.Layout(1, (20_000, 5_008)).check((20_000, 5_000)) is None
    with pytest.raises(tiff.UnfitTiff):
        tiff.Layout(1, (20_000, 20_000)).check((20_000, 5_000))


@pytest.mark.parametrize("tag", [256, 259, 273, 279, 322])
def test_what_is_said_twice_is_refused(tag: int) -> None:
    """Pillow takes the last, libtiff the first: neither's word would bound the other."""
    tags = grey(64, 64, 8, t322=(64,), t323=(64,)) if tag == 322 else grey(64, 64, 8, t278=(64,))
    piece = [zlib.compress(bytes(64 * 64))]
    assert ours(written(tags, piece, tiled=tag == 322)).shape == (56, 56, 3)
    with pytest.raises(InvalidImage, match=f"TIFF that has the tag {tag} twice"):
        read_header(written(tags, piece, tiled=tag == 322, twice=tag), LIMIT, "p")


def test_a_number_is_of_a_type_that_every_reader_knows() -> None:
    """LONG8 outside of a BigTIFF; and a BigTIFF in the order that Pillow takes for a TIFF."""
    data = written(grey(64, 64, 8, t278=(64,)), [zlib.compress(bytes(64 * 64))])
    for bad in (data.replace(b"\x16\1\4\0", b"\x16\1\x10\0"), b"MM\0+" + data[4:]):
        with pytest.raises(InvalidImage, match="BigTIFF"):
            read_header(bad, LIMIT, "p")
