"""Half a JPEG is an error, though libjpeg makes a picture of it."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from qwen2vl_serve.errors import InvalidImage
from qwen2vl_serve.media.image import decode
from qwen2vl_serve.media.jpeg import SMALL, scan_begins_within
from tests.media.test_image import encoded, photo

END = b"\xff\xd9"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "4:2:0": ("RGB", {}),
    "4:4:4": ("RGB", {"subsampling": 0}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
    "RGB": ("RGB", {"keep_rgb": True}),
    "progressive": ("RGB", {"progressive": True}),
    "progressive, grey": ("L", {"progressive": True}),
    "intervals": ("RGB", {"restart_marker_rows": 1}),
    "progressive intervals": ("RGB", {"progressive": True, "restart_marker_blocks": 7}),
    "best tables": ("RGB", {"optimize": True}),
}
SIZES = {"one block": (16, 16), "small": (201, 117), "one row over": (401, 305)}


def jpeg(name: str, size: tuple[int, int]) -> bytes:
    mode, options = KINDS[name]
    return encoded(photo(*size, mode), "JPEG", quality=85, **options)


def scans(data: bytes) -> list[tuple[int, int]]:
    """Where the coded data of each scan begin and end."""
    found = []
    for start in re.finditer(rb"\xff\xda", data):
        begin = start.end() + int.from_bytes(data[start.end() : start.end() + 2])
        end = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, begin)
        assert end is not None
        found.append((begin, end.start()))
    return found


def whole(data: bytes, *, fast: bool = False) -> bool:
    try:
        decode(data, (28, 56), "p", fast=fast)
    except InvalidImage:
        return False
    return True


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_a_scan_cut_short_is_damage(name: str, size: str) -> None:
    """At any place and with an end put behind it: never grey where there were pixels."""
    data = jpeg(name, SIZES[size])
    assert whole(data)
    for begin, end in scans(data):
        for part in (0.0, 0.1, 0.5, 0.9):
            cut = begin + int((end - begin) * part)
            if cut < end - 2:
                assert not whole(data[:cut] + END), (begin, cut)
                assert not whole(data[:cut] + data[end:]), (begin, cut)


@pytest.mark.parametrize("name", [one for one in KINDS if one.startswith("progressive")])
def test_every_scan_has_to_be_there(name: str) -> None:
    """Without the later ones a progressive JPEG is a coarse picture of itself."""
    data = jpeg(name, (401, 305))
    for _, end in scans(data)[:-1]:
        assert not whole(data[:end] + END)


def test_a_cut_is_found_in_a_fast_decode() -> None:
    """At a fraction of the size the end is as grey."""
    data = jpeg("4:2:0", (801, 609))
    assert whole(data, fast=True)
    assert not whole(data[: len(data) // 2] + END, fast=True)


@pytest.mark.parametrize("name", ["intervals", "progressive intervals"])
def test_an_interval_may_not_be_missing(name: str) -> None:
    """Behind a restart marker libjpeg goes on, and leaves the gap grey."""
    data = jpeg(name, (401, 305))
    begin, end = scans(data)[-1]
    marks = [one.start() for one in re.finditer(rb"\xff[\xd0-\xd7]", data) if begin < one.start()]
    marks = [one for one in marks if one < end]
    third, fourth = marks[2], marks[3]
    assert not whole(data[:third] + data[fourth:])
    assert not whole(data[: (third + fourth) // 2] + data[fourth:])


@pytest.mark.parametrize("size", [(16, 16), (256, 256), (257, 256), (400, 304)])
@pytest.mark.parametrize("colour", [(128, 128, 128), (255, 255, 255), (0, 0, 0), (9, 200, 77)])
@pytest.mark.parametrize("name", KINDS)
def test_even_pictures_are_whole(
    name: str, colour: tuple[int, int, int], size: tuple[int, int]
) -> None:
    """What is grey by itself is no damage; nor is what takes next to no bytes."""
    mode, options = KINDS[name]
    assert whole(encoded(Image.new("RGB", size, colour).convert(mode), "JPEG", **options))


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_sampling_is_whole(sampling: str, progressive: bool) -> None:
    """Small ones, whose data are read."""
    for width, height in ((1, 1), (9, 31), (255, 257), (250, 250)):
        try:
            options = {"subsampling": sampling, "progressive": progressive}
            data = encoded(photo(width, height), "JPEG", **options)
        except (TypeError, ValueError):
            pytest.skip("this Pillow does not write it")
        assert whole(data), (width, height)


def test_damage_beside_the_picture_is_no_damage() -> None:
    """EXIF and comments are not of the pixels; nor is what follows the end."""
    data = jpeg("progressive", (400, 200))
    exif = b"\xff\xe1\x00\x0cExif\0\0\xff\xff\xff\xff"
    comment = b"\xff\xfe\x00\x05\xff\xd9\x00"
    assert whole(data[:2] + exif + comment + data[2:] + b"trailing \xff\xda")


def test_of_a_large_picture_the_data_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pixel tells; FFmpeg's second reading is for the others."""
    read: list[bytes] = []

    def decodes(data: bytes) -> bool:
        read.append(data)
        return True

    monkeypatch.setattr("qwen2vl_serve.media.jpeg._decodes", decodes)
    bright = np.full((300, 300, 3), 200, np.uint8)
    assert bright.size // 3 > SMALL
    decode(encoded(Image.fromarray(bright), "JPEG"), (56, 56), "p")
    assert not read
    decode(encoded(Image.fromarray(bright), "JPEG", progressive=True), (56, 56), "p")
    assert len(read) == 1


def test_a_file_of_several_pictures_is_its_first() -> None:
    """MPO, as stereo cameras and some phones write it."""
    data = io.BytesIO()
    photo(400, 300).save(data, "MPO", save_all=True, append_images=[photo(400, 300, seed=1)])
    assert whole(data.getvalue())
    begin, end = scans(data.getvalue())[0]
    half = (begin + end) // 2
    assert not whole(data.getvalue()[:half] + data.getvalue()[end:])


@pytest.mark.parametrize("name", ["progressive", "4:2:0"])
def test_only_so_many_scans_are_decoded(name: str) -> None:
    """libjpeg goes over all pixels for each, though a scan may be a dozen bytes of the file."""
    data = jpeg(name, (401, 305))
    start = data.index(b"\xff\xda")
    one = data[start:] if name == "progressive" else b"\xff\xda\0\x08\1\1\0\0\x3f\0" + END
    made = data[:start] + one[:-2] * 120 + END
    with pytest.raises(InvalidImage, match="more parts than any program writes"):
        decode(made, (28, 56), "p")


def test_segments_between_scans_are_bounded_as_well() -> None:
    """Thousands that hold nothing are no picture; dozens do no harm."""
    data = jpeg("progressive", (401, 305))
    _, end = scans(data)[0]
    comment = b"\xff\xfe\0\2"
    assert whole(data[:end] + comment * 90 + data[end:])
    assert not whole(data[:end] + comment * 20_000 + data[end:])


def test_where_the_coded_data_begin_is_told_without_reading_on() -> None:
    """Before a bound, at it, behind it; of what is no JPEG never, however it continues."""
    data = jpeg("4:2:0", SIZES["small"])
    begin = data.index(b"\xff\xda")
    assert scan_begins_within(data, begin)
    assert not scan_begins_within(data, begin - 1)
    assert not scan_begins_within(b"GIF89a" + data, len(data))
    assert not scan_begins_within(data[:begin], len(data))


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(content) + 2).to_bytes(2) + content


SCAN, LONG = segment(0xDA, b""), b"\xff\xe0\x01\x00"
WORDS = st.sampled_from([SCAN, LONG, b"\xff", b"\0"]) | st.binary(max_size=2)
PIECES = st.builds(segment, st.integers(0, 255), st.lists(WORDS, max_size=4).map(b"".join)) | WORDS
"""Of which the beginning of a JPEG is made; ``LONG`` begins a segment that is not all there."""


REST = jpeg("4:2:0", SIZES["small"])[2:]


class Watched(io.BytesIO):
    """Takes note of the last place from which it was read."""

    last = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.last = self.tell()
        return super().read(size)


@settings(max_examples=1000, deadline=None)
@given(st.lists(PIECES, max_size=8).map(b"".join))
@example(segment(0xF0, LONG) + SCAN)
@example(segment(0xC8, LONG) + SCAN)
def test_pillow_goes_no_farther_than_told(head: bytes) -> None:
    """Coded data that are said to begin within a bound: there Pillow has found them or given up.

    Behind a marker that it does not know it looks for the next at once, whatever its length.
    """
    data = b"\xff\xd8" + head + REST
    source, bound = Watched(data), 2 + len(head)
    with contextlib.suppress(Exception):
        JpegImageFile(source)
    assert source.last <= bound + len(SCAN) or not scan_begins_within(data, bound)
