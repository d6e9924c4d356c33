"""Whether a JPEG holds all of its pixels: libjpeg paints missing ones grey and says nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from PIL import Image, ImageChops

SMALL = 256 * 256
"""Pixels up to which the coded data are always read: one block would be much of the picture."""

MOST_SCANS = 100
"""libjpeg goes over all pixels for each; programs write up to ten, optimisers a few dozen."""

MOST_SEGMENTS = 4096

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_MORE = b"\x55" * 64
_END, _SCAN, _INTERVAL, _COMMENT = 0xD9, 0xDA, 0xDD, 0xFE
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APPLICATION = range(0xE0, 0xF0)
_NO_LENGTH = frozenset({0x01, 0xD8})
_BEFORE_SCAN = frozenset({*range(0xC0, 0xF0), _COMMENT}) - {0xC8, *range(0xD0, 0xDB)}


def has_few_scans(data: bytes) -> bool:
    """Tell whether a JPEG can be decoded in a bounded time a pixel."""
    if _head(data).in_one_piece():
        return True
    return sum(marker == _SCAN for _, marker in _segments(data)) <= MOST_SCANS


def scan_begins_within(data: bytes, size: int) -> bool:
    """Tell whether a file is a JPEG whose coded data begin in its first ``size`` bytes.

    False where a marker comes before that no JPEG has there: Pillow takes it to have no length.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    for place, marker in _segments(data):
        if place > size or marker not in _BEFORE_SCAN:
            return place <= size and marker == _SCAN
    return False


def is_whole(data: bytes, decoded: Image.Image) -> bool:
    """Tell whether a JPEG has all of its scans, each up to its last block.

    ``decoded`` is what came of it, perhaps at a fraction of its size. Where libjpeg runs out of
    data it leaves all further blocks at zero, so that the last pixel is of middle grey: one that
    comes in a single piece and ends otherwise costs nothing. Else FFmpeg reads the coded data, at
    1/8 of the sides: half of the time that decoding took. What is missing within the very last
    block passes, unless the picture is small.
    """
    coded = _head(data)
    if coded.pixels > SMALL and coded.in_one_piece() and not _ends_grey(decoded):
        return True
    return _reads_to_the_end(data, decoded)


def _head(data: bytes) -> _Coded:
    """Return what is said up to the first scan."""
    coded = _Coded()
    for place, marker in _segments(data):
        coded.add(marker, data, place + 2)
        if marker == _SCAN:
            break
    return coded


@dataclass(slots=True)
class _Coded:
    """What the headers say; ``sent`` has the lowest bit told of each coefficient, by component."""

    frame: int = 0
    pixels: int = 0
    interval: int = 0
    sent: dict[int, list[int | None]] = field(default_factory=dict)
    scans: int = 0
    together: bool = False

    def add(self, marker: int, data: bytes, start: int) -> None:
        """Read the segment whose length field is at ``start``."""
        if marker in _FRAMES:
            self.frame = marker
            height, width = (int.from_bytes(data[start + n : start + n + 2]) for n in (3, 5))
            self.pixels = width * height
            ids = data[start + 8 : start + 8 + 3 * data[start + 7] : 3]
            self.sent = {component: [None] * 64 for component in ids}
        elif marker == _INTERVAL:
            self.interval = int.from_bytes(data[start + 2 : start + 4])
        elif marker == _SCAN:
            count = data[start + 2]
            first, last, bits = data[start + 3 + 2 * count : start + 6 + 2 * count]
            if self.frame != _PROGRESSIVE:
                first, last, bits = 0, 63, 0
            for component in data[start + 3 : start + 3 + 2 * count : 2]:
                self.sent[component][first : last + 1] = [bits & 15] * (last + 1 - first)
            self.scans += 1
            self.together = count == len(self.sent)

    def in_one_piece(self) -> bool:
        """Tell whether the first scan holds everything, block after block up to the last one."""
        one = self.frame in _SEQUENTIAL and self.scans == 1 and self.together
        return one and not self.interval and len(self.sent) != 4  # CMYK is no grey

    def says_all(self) -> bool:
        """Tell whether every coefficient is told to its last bit."""
        return all(bits == [0] * 64 for bits in self.sent.values())


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Give the place and the code of each marker up to the one that ends the picture.

    The coded data of a scan are skipped once the next marker is asked for. Raises ``ValueError``
    for more than ``MOST_SEGMENTS``.
    """
    place = 2
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None:
            yield len(data), _END
            return
        place, code = found.start(), data[found.start() + 1]
        yield place, code
        if code == _END:
            return
        length = 0 if code in _NO_LENGTH else int.from_bytes(data[place + 2 : place + 4])
        place += 2 + length
    raise ValueError(f"more than {MOST_SEGMENTS} segments")


def _ends_grey(decoded: Image.Image) -> bool:
    """Tell whether the last pixel has the luma of a block of zeros, 128.

    Its colour may have been mixed with that of a block before.
    """
    last = decoded.crop((decoded.width - 1, decoded.height - 1, decoded.width, decoded.height))
    luma = last.convert("L").getpixel((0, 0))
    return isinstance(luma, (int, float)) and abs(luma - 128) <= 1


def _reads_to_the_end(data: bytes, decoded: Image.Image) -> bool:
    coded, picture, longer = _Coded(), [b"\xff\xd8"], [b"\xff\xd8"]
    for (start, marker), (end, _) in pairwise(_segments(data)):
        coded.add(marker, data, start + 2)
        segment = data[start:end]
        # What is not of the picture may be damaged, and FFmpeg is to see nothing to dislike in it.
        if marker not in _APPLICATION and marker != _COMMENT:
            picture.append(segment)
        if marker == _SCAN:
            if not coded.interval and _RESTART.search(segment):
                return False  # libjpeg stops there
            segment = _RESTART.sub(lambda found: _MORE + found[0], segment) + _MORE
        longer.append(segment)
    if not coded.says_all():
        return False
    if coded.frame not in (*_SEQUENTIAL, _PROGRESSIVE):
        return True  # arithmetic coding, which leaves out zeros at the end by rule
    if coded.pixels <= SMALL and not _same(data, b"".join(longer) + b"\xff\xd9", decoded):
        return False
    if coded.pixels <= SMALL and not coded.interval:
        return True
    # Behind the end, for FFmpeg refuses a file of less than two bits a block, as even ones may be.
    return _decodes(b"".join(picture) + b"\xff\xd9" + bytes(coded.pixels // 256 + 64))


def _same(data: bytes, longer: bytes, decoded: Image.Image) -> bool:
    """Tell whether more bits at the ends of the coded data change nothing: none were missing."""
    second = Image.open(io.BytesIO(longer), formats=["JPEG"])
    first = decoded if decoded.size == second.size else Image.open(io.BytesIO(data))
    return ImageChops.difference(first, second).getbbox() is None


def _decodes(data: bytes) -> bool:
    import av  # noqa: PLC0415  # FFmpeg: loaded by the first picture or video that needs it

    context = av.CodecContext.create("mjpeg", "r")
    context.thread_count = 1
    context.options = {"err_detect": "explode", "lowres": "3"}
    try:
        context.decode(av.Packet(data))
    except av.InvalidDataError:
        return False
    except av.FFmpegError:
        return True  # a sampling that FFmpeg cannot do
    return True
