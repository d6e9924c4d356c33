"""A file in more parts than any program writes is refused before it takes time."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qwen2vl_serve.errors import InvalidImage
from qwen2vl_serve.media.image import decode, read_header
from qwen2vl_serve.media.parts import MOST_STRIPS
from tests.media.test_image import LIMIT, chunk, encoded, ours, photo, png


def stuffed(name: str, times: int) -> bytes:
    """A picture with that many empty parts before its pixels."""
    kind, _, part = name.partition(", ")
    data = encoded(Image.new("P" if kind == "GIF" else "RGB", (64, 64)), kind)
    at = {"PNG": 33, "JPEG": 2, "GIF": data.index(b"\x2c") if kind == "GIF" else 0}[kind]
    piece = {"chunks": chunk(b"prVt", b""), "comments": b"\xff\xfe\0\2", "padding": b"\xff"}
    piece |= {"text": chunk(b"tEXt", b"a\0b"), "extensions": b"!\xfe\x01a\0"}
    return data[:at] + piece[part] * times + data[at:]


PARTS = ["PNG, chunks", "PNG, text", "JPEG, comments", "JPEG, padding", "GIF, extensions"]


@pytest.mark.parametrize("name", PARTS)
def test_more_parts_than_any_program_writes_are_refused(name: str) -> None:
    """Each costs Pillow a step in Python: 48 MiB of them were minutes; hundreds are no matter."""
    assert read_header(stuffed(name, 300), LIMIT, "p").width == 64
    for way in (
        lambda data: read_header(data, LIMIT, "p"),
        lambda data: decode(data, (56, 56), "p"),
    ):
        with pytest.raises(
            InvalidImage, match=r"more parts than any program writes \(more than \d+ "
        ):
            way(stuffed(name, 100_000))


def test_the_chunks_of_a_png_may_be_small_but_not_empty() -> None:
    """The pixels' own too: half a kilobyte each is well, thousands with nothing in them are not."""
    rows = np.asarray(photo(300, 200)).reshape(200, 900)
    packed = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())
    data = png(300, 200, packed)
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    small = b"".join(chunk(b"IDAT", packed[at : at + 512]) for at in range(0, len(packed), 512))
    assert np.array_equal(ours(data[:start] + small + data[end:]), ours(data))
    empty = chunk(b"IDAT", b"") * 100_000
    for at in (start, end):
        with pytest.raises(InvalidImage, match="more parts than any program writes"):
            decode(data[:at] + empty + data[at:], (196, 308), "p")


def test_metadata_of_a_photographers_tools_is_let_through() -> None:
    """400 KiB of XMP in a GIF, in blocks as long as its letters say; a PNG with a chunk a row."""
    data = encoded(Image.new("P", (64, 64)), "GIF")
    at = data.index(b"\x2c")
    xmp = b"<x:xmpmeta>" + b"<rdf:li>xmp.did:0123456789</rdf:li>" * 12_000
    trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
    packet = b"!\xff\x0bXMP DataXMP" + xmp + trailer
    assert read_header(data[:at] + packet + data[at:], LIMIT, "p").width == 64
    packer = zlib.compressobj()
    rows = [
        packer.compress(bytes(1 + 3 * 100)) + packer.flush(zlib.Z_SYNC_FLUSH) for _ in range(9000)
    ]
    rows[-1] += packer.flush()
    tall = png(100, 9000, b"")
    start, end = tall.index(b"IDAT") - 4, tall.index(b"IEND") - 4
    tall = tall[:start] + b"".join(chunk(b"IDAT", row) for row in rows) + tall[end:]
    assert decode(tall, (5600, 56), "p").shape == (5600, 56, 3)


@pytest.mark.parametrize("kind", ["<HHL", "<HHQ"], ids=["TIFF", "BigTIFF"])
@pytest.mark.parametrize("strips", [140_000, 600_000])
def test_a_tiff_comes_in_so_many_strips_at_most(kind: str, strips: int) -> None:
    """Pillow makes an object of each, whatever the picture's height; of one row each they pass."""
    wide = "Q" if kind.endswith("Q") else "L"
    values = {256: 300, 257: strips, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 300}
    size = struct.calcsize(f"<HH{wide}{wide}")
    start, end = (16, 8) if wide == "Q" else (8, 2)
    tables = start + end + size * len(values)
    counts = {273: (strips, tables), 279: (strips, tables + struct.calcsize(wide) * strips)}
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) if wide == "Q" else b"II*\0\x08\0\0\0"
    data = head + struct.pack("<Q" if wide == "Q" else "<H", len(values))
    for tag, value in values.items():
        count, held = counts.get(tag, (1, value))
        data += struct.pack(f"<HH{wide}{wide}", tag, 16 if wide == "Q" else 4, count, held)
    data += struct.pack(f"<{strips}{wide}", *[64] * strips)
    data += struct.pack(f"<{strips}{wide}", *[300] * strips)
    if strips < MOST_STRIPS:
        assert read_header(data, LIMIT, "p").height == strips
    else:
        with pytest.raises(InvalidImage, match=f"{strips} strips, at most {MOST_STRIPS}"):
            read_header(data, LIMIT, "p")
