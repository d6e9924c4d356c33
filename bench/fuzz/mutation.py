"""Valid files made invalid: in their bytes, and in the structure that each format has.

Where a format guards its parts by lengths and checksums, most mutations set them right again, so
that the damage gets past the first look.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

TOKENS = (
    b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xd8\xff",
    b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdd", b"\xff\xe1",
    b"Exif\0\0",
    b"\x89PNG\r\n\x1a\n", b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt",
    b"acTL", b"fcTL", b"fdAT", b"eXIf", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANMF",
    b"ALPH", b"GIF89a", b"NETSCAPE2.0", b"\x21\xf9\x04", b"BM", b"II*\0", b"MM\0*", b"II+\0",
    b"ftyp", b"moov", b"mdat", b"trak", b"stbl", b"stsz", b"stco", b"elst", b"dref", b"url ",
    b"avcC", b"meta", b"iloc", b"ipma", b"grid", b"iovl", b"avif", b"heic", b"mif1",
    b"\x1aE\xdf\xa3", b"matroska", b"\x01\xff\xff\xff\xff\xff\xff\xff", b"%PDF-", b"endobj",
    b"/Length 99999999", b"http://127.0.0.1/", b"file:///etc/passwd", b"\x00\x00\x01\xb3",
)  # fmt: skip
"""What means something to one decoder or another."""

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)

LARGEST = 256 * 1024
"""No mutation makes a file longer than this, in bytes."""

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

Order = Literal["little", "big"]
_ORDERS: tuple[Order, Order] = ("little", "big")


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return ``data`` after one to a few mutations; ``others`` give parts to splice in."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 9))):
        data = rng.choices(_MUTATIONS, _WEIGHTS)[0](rng, data, others)[:LARGEST]
    return data


def _flip(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if made else 0):
        made[_place(rng, len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _scramble(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at = _place(rng, len(data))
    size = rng.choice((1, 2, 4, 16, 64))
    return data[:at] + rng.randbytes(size) + data[at + size :]


def _truncate(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _number(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Put a number of two to eight bytes where a length or a side may stand."""
    width = rng.choice((1, 2, 2, 4, 4, 8))
    at = _place(rng, len(data))
    value = rng.choice((*NUMBERS, len(data), rng.randrange(2**16))) % 256**width
    order = rng.choice(_ORDERS)
    number: bytes = value.to_bytes(width, order)
    return data[:at] + number + data[at + width :]


def _token(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    token, at = rng.choice(TOKENS), _place(rng, len(data))
    return data[:at] + token + data[at + rng.choice((0, len(token))) :]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def _concatenate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return rng.choice((data + data, data + rng.choice(others), rng.choice(others)[:32] + data))


def _repeat(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.choice((1, 2, 20)) + data[end:]


def _cut_out(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 4, 12, 100)) :]


def _structure(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Take a file apart at the joints of its format, change some parts, put it together again."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[:8] + b"".join(_changed(rng, _png_parts(data[8:]), _png_edit))
    if data[:4] == b"RIFF":
        body = b"".join(_changed(rng, _riff_parts(data[12:]), _riff_edit))
        return b"RIFF" + struct.pack("<I", len(body) + 4) + data[8:12] + body
    if data[4:8] == b"ftyp":
        return b"".join(_changed(rng, _boxes(data), _box_edit))
    if data[:2] == b"\xff\xd8":
        return b"\xff\xd8" + b"".join(_changed(rng, _jpeg_parts(data[2:]), _jpeg_edit))
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_entry(rng, data)
    return _number(rng, data, others)


def _changed(
    rng: random.Random,
    parts: list[bytes],
    edit: Callable[[random.Random, bytes], bytes],
) -> list[bytes]:
    if not parts:
        return parts
    at = rng.randrange(len(parts))
    match rng.randrange(6):
        case 0:
            del parts[at]
        case 1:
            parts.insert(rng.randrange(len(parts)), parts[at])
        case 2:
            rng.shuffle(parts)
        case _:
            parts[at] = edit(rng, parts[at])
    return parts


def _png_parts(data: bytes) -> list[bytes]:
    parts = []
    while len(data) >= 12:
        end = 12 + int.from_bytes(data[:4])
        parts.append(data[:end])
        data = data[end:]
    return parts


def _png_edit(rng: random.Random, part: bytes) -> bytes:
    kind, body = part[4:8], part[8:-4]
    if kind == b"IDAT" and rng.random() < 0.7:
        try:
            body = zlib.compress(_bytes_changed(rng, zlib.decompress(body)))
        except zlib.error:
            body = _bytes_changed(rng, body)
    else:
        body = _bytes_changed(rng, body)
    if rng.random() < 0.1:
        kind = rng.choice((b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"acTL", b"fcTL", b"eXIf", b"zTXt"))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _riff_parts(data: bytes) -> list[bytes]:
    parts = []
    while len(data) >= 8:
        end = 8 + int.from_bytes(data[4:8], "little")
        end += end % 2
        parts.append(data[:end])
        data = data[end:]
    return parts


def _riff_edit(rng: random.Random, part: bytes) -> bytes:
    body = _bytes_changed(rng, part[8:])
    return part[:4] + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


_CONTAINERS = frozenset(b"moov trak mdia minf stbl dinf edts moof traf iprp ipco".split())


def _boxes(data: bytes) -> list[bytes]:
    parts = []
    while len(data) >= 8:
        end = max(int.from_bytes(data[:4]), 8)
        parts.append(data[:end])
        data = data[end:]
    return [*parts, data] if data else parts


def _box_edit(rng: random.Random, part: bytes) -> bytes:
    """Change a box, or one within it."""
    kind, body = part[4:8], part[8:]
    if kind in _CONTAINERS and rng.random() < 0.9:
        body = b"".join(_changed(rng, _boxes(body), _box_edit))
    elif kind == b"meta" and rng.random() < 0.9:
        body = body[:4] + b"".join(_changed(rng, _boxes(body[4:]), _box_edit))
    else:
        body = _bytes_changed(rng, body)
    return struct.pack(">I", len(body) + 8) + kind + body


def _jpeg_parts(data: bytes) -> list[bytes]:
    """Return the segments up to the scan, then the rest as one."""
    parts = []
    while len(data) >= 4 and data[0] == 0xFF and data[1] != 0xDA:
        end = 2 + int.from_bytes(data[2:4])
        parts.append(data[:end])
        data = data[end:]
    return [*parts, data]


def _jpeg_edit(rng: random.Random, part: bytes) -> bytes:
    if part[1:2] == b"\xda":
        return _bytes_changed(rng, part)
    body = _bytes_changed(rng, part[4:])[:65533]
    return part[:2] + struct.pack(">H", len(body) + 2) + body


def _tiff_entry(rng: random.Random, data: bytes) -> bytes:
    """Change tag, type, count or value of one entry of the first directory."""
    order: Order = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[start : start + 2], order)
    at = start + 2 + 12 * rng.randrange(max(count, 1)) + rng.choice((0, 2, 4, 8, 8, 8))
    value = rng.choice((*NUMBERS, rng.randrange(350), len(data)))
    width = rng.choice((2, 4))
    number: bytes = (value % 256**width).to_bytes(width, order)
    return data[:at] + number + data[at + width :]


def _bytes_changed(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return rng.randbytes(rng.choice((1, 4, 13)))
    change = rng.choice((_flip, _flip, _number, _number, _scramble, _truncate, _token, _repeat))
    return change(rng, data, (data,))


def _place(rng: random.Random, size: int) -> int:
    """Return an offset, mostly near the beginning, where the headers are."""
    if size == 0:
        return 0
    return rng.randrange(min(size, rng.choice((16, 64, 512, size))))


_WEIGHTED: Sequence[tuple[Mutation, int]] = (
    (_structure, 8),
    (_flip, 4),
    (_number, 4),
    (_scramble, 2),
    (_truncate, 2),
    (_token, 2),
    (_splice, 1),
    (_concatenate, 1),
    (_repeat, 1),
    (_cut_out, 1),
)
_MUTATIONS = [mutation for mutation, _ in _WEIGHTED]
_WEIGHTS = [weight for _, weight in _WEIGHTED]
