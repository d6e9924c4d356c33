"""What ``bench.fuzz`` found in the media path, each as a test of its own."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import subprocess
import sys
import zlib
from typing import Any

import pytest
from PIL import Image

from qwen2vl_serve.errors import ImageTooLarge, InvalidImage
from qwen2vl_serve.media.image import decode, installed_formats, read_header


def encoded(kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("AVIF", {"speed": 10}), ("HEIF", {})])
def test_damage_of_any_byte_is_a_picture_or_a_clear_error(
    kind: str, options: dict[str, Any]
) -> None:
    """AVIF's and HEIC's decoders raise ``RuntimeError`` and ``EOFError``, unlike the others."""
    if kind not in installed_formats():
        pytest.skip(f"{kind} is not decoded here")
    data = encoded(kind, **options)
    refused = 0
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]
        try:
            read_header(damaged, 4_000_000, "p")
            assert decode(damaged, (28, 28), "p").shape == (28, 28, 3)
        except (InvalidImage, ImageTooLarge):
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_tags_of_another_type_are_a_picture_or_a_clear_error(compression: str | None) -> None:
    """A TIFF's tag may be text where Pillow goes on to count with it: a ``TypeError``."""
    data = encoded("TIFF", compression=compression)
    start = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[start : start + 2], "little")
    assert entries > 8
    for entry, kind in itertools.product(range(entries), range(14)):
        at = start + 2 + 12 * entry + 2
        damaged = data[:at] + bytes([kind, 0]) + data[at + 2 :]
        with contextlib.suppress(InvalidImage, ImageTooLarge):
            read_header(damaged, 4_000_000, "p")
            decode(damaged, (28, 28), "p")


PROGRAM = """
import resource, sys
from qwen2vl_serve.errors import InvalidImage
from qwen2vl_serve.media.image import decode
data = sys.stdin.buffer.read()
decode(bytes.fromhex(sys.argv[1]), (28, 28), "p")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data, (28, 28), "p")
except InvalidImage:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"IDAT", b"PLTE", b"fdAT", b"eXIf"])
def test_a_chunk_that_claims_gigabytes_costs_none(kind: bytes) -> None:
    """Half a kilobyte of PNG made OpenCV fill as much memory as one chunk's length promised."""
    good = encoded("PNG")
    at = good.index(b"IDAT") - 4
    bomb = good[:at] + chunk(kind, b"x", 0x7FFFFFFF) + good[at:]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, good.hex()], input=bomb, capture_output=True, check=True
    )
    assert int(done.stdout) < 64 * 1024, "KiB"
