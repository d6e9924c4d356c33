"""Pictures of every unusual kind, drawn and saved by Pillow or written byte by byte."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageDraw


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return a file."""
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def png(size: tuple[int, int] = (56, 56), colour: Any = "red", mode: str = "RGB") -> bytes:
    """Return a PNG of one colour."""
    return saved(Image.new(mode, size, colour), "PNG")


def inline(data: bytes, kind: str = "image/png") -> str:
    """Return a file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png_url() -> str:
    """Return a good small picture as a data URL."""
    return inline(png())


def noise(size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Return what no format makes small."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG's chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(data: bytes, extra: bytes) -> bytes:
    """Return a PNG with one more chunk behind its header."""
    return data[:33] + extra + data[33:]


def header(width: int, height: int) -> bytes:
    """Return a PNG that says these sides and holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def text_bomb(kind: bytes) -> bytes:
    """Return a good PNG with a comment that unpacks to 80 MB."""
    before = b"k\0\0" if kind == b"zTXt" else b"k\0\1\0\0\0"
    return with_chunk(png(), chunk(kind, before + zlib.compress(b"\0" * 80_000_000, 9)))


def shapes() -> Image.Image:
    """Return a picture that looks another way from every side."""
    drawn = Image.new("RGB", (168, 224), "white")
    pen = ImageDraw.Draw(drawn)
    pen.ellipse((10, 10, 90, 90), fill=(220, 20, 20))
    pen.rectangle((100, 120, 160, 214), fill=(20, 20, 220))
    pen.polygon([(10, 200), (60, 200), (10, 130)], fill=(20, 160, 20))
    return drawn


TURNS = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}
"""EXIF's orientations: by which transposition of Pillow's the file differs from its looks."""


def turned(orientation: int) -> bytes:
    """Return ``shapes`` stored as a camera held another way stores it."""
    stored = shapes()
    for one in TURNS[orientation]:
        stored = stored.transpose(Image.Transpose(one))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(stored, "PNG", exif=exif)


def wide() -> bytes:
    """Return a grey PNG of 16 bits a sample whose high bytes are ``grey``'s."""
    samples = np.asarray(shapes().convert("L"), np.uint16) * 257
    return saved(Image.fromarray(samples), "PNG")


def grey() -> bytes:
    """Return the same in 8 bits and three channels."""
    return saved(shapes().convert("L").convert("RGB"), "PNG")


def clear() -> bytes:
    """Return ``shapes`` with its white cut out, and red where nobody shall look."""
    drawn = shapes().convert("RGBA")
    pixels = np.array(drawn)
    pixels[(pixels[..., :3] == 255).all(-1)] = (255, 0, 0, 0)
    return saved(Image.fromarray(pixels), "PNG")


def animated(form: str) -> bytes:
    """Return an animation whose first frame is ``shapes`` in 64 colours."""
    first = few_colours().convert("RGB")
    more = [Image.new("RGB", first.size, colour) for colour in ("blue", "red")]
    options = {"lossless": True} if form == "WEBP" else {}
    return saved(first, form, save_all=True, append_images=more, duration=50, **options)


def few_colours() -> Image.Image:
    """Return ``shapes`` with a palette."""
    return shapes().quantize(8, dither=Image.Dither.NONE)
