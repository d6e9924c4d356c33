"""What the index of an mp4 or QuickTime file takes once FFmpeg expands it, told from its bytes.

A few bytes may announce any number of samples: FFmpeg keeps an entry for each as it opens a file.
Boxes are looked for by their names, not by their nesting, for FFmpeg takes them nearly anywhere;
but for what it takes as text (``mov_read_default`` in its ``mov.c``), which may hold any word.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterable, Iterator

_NAMES = re.compile(rb"trak|hdlr|elst|st(?:sz|z2|ts|sc|co)|co64|ctts|trun|cmov")

_PER_ENTRY = 1024
"""Samples of plain sound (PCM) that FFmpeg keeps as one entry."""

_NO_SOUND = {b"vide", b"subp", b"clcp"}

_WAYS = {
    b"": (b"moov",),
    b"moov": (b"trak", b"udta", b"meta"),
    b"trak": (b"udta", b"meta"),
    b"udta": (b"meta",),
    b"meta": (b"ilst",),
}
_TEXT = re.compile(rb"\xa9|\0\0\0|desc|ldes|cprt|keyw|XMP_")
"""How names begin of boxes within ``udta`` or ``ilst`` that hold a text; a key's is a number."""

_MOST_BOXES = 100_000
"""So many are walked through; what lies behind them is searched, whatever it is."""


def index_entries(data: bytes, most: int) -> int:
    """Return how many entries FFmpeg's index of a file has at most.

    It is a number above ``most`` where there are more, or where the index is packed (``cmov``).
    """
    entries, edits, seen, covered = 0, 1, 0, 0
    track = _Track(data, 0, nested=True)
    for begin, end in _parts(data):
        for hit in _NAMES.finditer(data, begin, end):
            name, at = hit.group(), hit.start()
            seen += 1
            if name == b"trak":
                entries += track.entries
                track = _Track(data, at, nested=at < covered)
                covered = max(covered, track.end)
            elif name == b"elst":
                edits = max(edits, (_end(data, at) - at - 12) // 12)
            else:
                track.add(name, at)
            if name == b"cmov" or seen > most or (entries + track.rows) * edits > most:
                return most + 1
    return (entries + track.entries) * edits


class _Track:
    """What is told of one track, up to the next: its boxes belong to it wherever they lie."""

    def __init__(self, data: bytes, at: int, *, nested: bool) -> None:
        self._data, self.end = data, _end(data, at)
        self.samples = self.rows = self.chunks = self.in_chunk = 0
        # A track within a track is made up: only FFmpeg knows which of them it takes.
        self.sound = not nested and _handler(data, at) == b"soun"
        self.times: list[tuple[int, int]] = []

    def add(self, name: bytes, at: int) -> None:
        """Take in the box whose name lies at ``at``."""
        data = self._data
        if name == b"hdlr":
            self.sound = self.sound and data[at + 12 : at + 16] not in _NO_SOUND
        elif name == b"stts":
            self.times.append((_number(data, at + 8), _number(data, at + 16)))
        elif name == b"ctts":
            self.sound = False
        elif name == b"stsc":
            self._add_chunks(at)
        elif name in (b"stco", b"co64"):
            self.chunks += _number(data, at + 8)
        elif name == b"trun":
            self.rows += _number(data, at + 8)
        elif name != b"cmov":
            self.samples += _number(data, at + 12)

    def _add_chunks(self, at: int) -> None:
        rows = min(_number(self._data, at + 8), max(len(self._data) - at - 12, 0) // 12)
        table = memoryview(self._data)[at + 12 : at + 12 + 12 * rows]
        counts = (count for _, count, _ in struct.iter_unpack(">III", table))
        self.in_chunk = max(self.in_chunk, max(counts, default=0))
        self.rows += rows

    @property
    def entries(self) -> int:
        """Entries of the index; those of plain sound, a sample for each value, are grouped."""
        if self.sound and len(self.times) == 1 and self.times[0] == (1, 1):
            return self.rows + self.chunks * -(-self.in_chunk // _PER_ENTRY)
        return self.rows + self.samples


def _handler(data: bytes, at: int) -> bytes:
    """Return the kind of the track whose name lies at ``at``, as FFmpeg finds it."""
    for name in (b"mdia", b"hdlr"):
        end, at = _end(data, at), at + 8
        while data[at : at + 4] != name:
            after = _end(data, at) + 4
            if not at < after < end:
                return b""
            at = after
    return data[at + 12 : at + 16]


def _parts(data: bytes) -> Iterator[tuple[int, int]]:
    """Give where FFmpeg may read boxes: everywhere but in pictures, sound and texts.

    An index of fragments (``sidx``, ``tfra``) may lead it into those as well.
    """
    if any(_holds(data, part, b"sidx", b"tfra") for part in _between(data, _media(data))):
        yield from _between(data, _media(data))
        yield from (part for part in _media(data) if _holds(data, part, b"moof", b"trak"))
    else:
        texts = _texts(data, 0, len(data), b"", iter(range(_MOST_BOXES)))
        yield from _between(data, heapq.merge(_media(data), texts))


def _between(data: bytes, skipped: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begun = 0
    for first, last in skipped:
        yield begun, first
        begun = last
    yield begun, len(data)


def _media(data: bytes) -> Iterator[tuple[int, int]]:
    for name, begin, end in _boxes(data, 0, len(data), iter(range(_MOST_BOXES))):
        if name == b"mdat":
            yield begin, end


def _texts(
    data: bytes, at: int, end: int, within: bytes, budget: Iterator[int]
) -> Iterator[tuple[int, int]]:
    for name, begin, last in _boxes(data, at, end, budget):
        if name == b"uuid" or (within in (b"udta", b"ilst") and _TEXT.match(name)):
            yield begin, last
        elif name in _WAYS.get(within, ()):
            # FFmpeg looks for the first box of this one, before which there may be a version.
            skipped = 4 if name == b"meta" and data[begin + 8 : begin + 12] == b"hdlr" else 0
            yield from _texts(data, begin + skipped, last, name, budget)


def _boxes(
    data: bytes, at: int, end: int, budget: Iterator[int]
) -> Iterator[tuple[bytes, int, int]]:
    """Give boxes that lie one after another: name, and where the content begins and ends."""
    for _ in budget:
        size, head = _number(data, at), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        last = min(at + size, end) if size else end
        if at + 8 > end or last < at + head:
            return
        yield data[at + 4 : at + 8], at + head, last
        at = last


def _holds(data: bytes, part: tuple[int, int], *names: bytes) -> bool:
    return any(data.find(name, *part) >= 0 for name in names)


def _end(data: bytes, at: int) -> int:
    """Return where the box ends whose name lies at ``at``; a size told otherwise has no end."""
    size = _number(data, at - 4) if at >= 4 else 0
    return min(at - 4 + size, len(data)) if size >= 8 else len(data)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4])
