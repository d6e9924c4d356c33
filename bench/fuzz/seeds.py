"""Small valid files of every format that the server takes: what mutation begins with."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, features

from qwen2vl_serve.media.image import installed_formats
from tests.media.movies import movie


@lru_cache(maxsize=1)
def seeds() -> Mapping[str, tuple[bytes, ...]]:
    """Return valid files by format; those of formats that cannot be written here are left out."""
    made = _pictures()
    for form, codec in _MOVIES:
        made.setdefault(form, []).append(movie(8, (64, 48), _MUXERS.get(form, form), codec))
    made["mp4"].append(movie(8, (64, 48), "mp4", "libx264", movflags="frag_keyframe+empty_moov"))
    return {kind: tuple(files) for kind, files in made.items()}


def _pictures() -> dict[str, list[bytes]]:
    drawn = _drawing()
    made: dict[str, list[bytes]] = {}

    def add(kind: str, image: Image.Image, form: str, **options: Any) -> None:
        target = io.BytesIO()
        image.save(target, form, **options)
        made.setdefault(kind, []).append(target.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    add("jpeg", drawn, "JPEG", quality=80)
    add("jpeg", drawn, "JPEG", progressive=True, subsampling=0)
    add("jpeg", drawn.convert("CMYK"), "JPEG")
    add("jpeg", drawn.convert("L"), "JPEG", optimize=True, restart_marker_rows=1)
    add("jpeg", drawn, "JPEG", exif=exif, dpi=(72, 72), comment=b"hello", icc_profile=b"x" * 200)
    add("png", drawn, "PNG")
    add("png", drawn.quantize(17), "PNG", bits=8, transparency=3)
    add("png", drawn.quantize(4), "PNG", bits=2)
    add("png", drawn.convert("1"), "PNG")
    add("png", drawn.convert("LA"), "PNG", exif=exif)
    add("png", _see_through(), "PNG", pnginfo=_texts())
    add("png", Image.fromarray(_wide()), "PNG")
    add("png", drawn, "PNG", save_all=True, append_images=[drawn.rotate(90)], duration=50)
    made["png"].append(_interlaced())
    add("webp", drawn, "WEBP", quality=70)
    add("webp", _see_through(), "WEBP", lossless=True)
    add("webp", _see_through(), "WEBP", quality=50, exif=exif, xmp=b"<x/>")
    add("webp", drawn, "WEBP", save_all=True, append_images=[drawn.rotate(90)], duration=50)
    add("gif", drawn.quantize(32), "GIF", comment=b"hello")
    add("gif", drawn.quantize(8), "GIF", interlace=1, transparency=1)
    add("gif", drawn, "GIF", save_all=True, append_images=[drawn.rotate(90)], duration=50, loop=2)
    add("bmp", drawn, "BMP")
    add("bmp", drawn.quantize(200), "BMP")
    add("bmp", drawn.convert("1"), "BMP")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        add("tiff", drawn, "TIFF", compression=compression)
    add("tiff", drawn.convert("1"), "TIFF", compression="group4")
    add("tiff", Image.fromarray(_wide()), "TIFF")
    add("tiff", Image.fromarray(_wide().astype(np.float32) / 65535), "TIFF")
    add("tiff", _see_through(), "TIFF", big_tiff=True, tiffinfo={274: 5, 270: "text"})
    add("tiff", drawn, "TIFF", save_all=True, append_images=[drawn])
    if features.check("avif"):
        add("avif", drawn, "AVIF", speed=10)
        add("avif", _see_through(), "AVIF", speed=10, exif=exif)
        add("avif", drawn, "AVIF", speed=10, save_all=True, append_images=[drawn.rotate(90)])
    if "HEIF" in installed_formats():
        add("heic", drawn, "HEIF", quality=60)
        add("heic", _see_through(), "HEIF", quality=60)
    add("pdf", drawn, "PDF")
    add("pdf", drawn, "PDF", save_all=True, append_images=[drawn.convert("L")])
    return made


VIDEOS = frozenset({"mp4", "webm", "mkv"})
_MUXERS = {"mkv": "matroska"}
_MOVIES = (
    ("mp4", "libx264"),
    ("mp4", "libx265"),
    ("mp4", "mpeg4"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("mkv", "libx264"),
    ("mkv", "libvpx"),
)


def _drawing() -> Image.Image:
    """A picture with an edge, a gradient and noise, of odd sides."""
    rng = np.random.default_rng(0)
    made = np.zeros((53, 67, 3), np.uint8)
    made[..., 0] = np.linspace(0, 255, 67).astype(np.uint8)
    made[10:30, 10:30, 1] = 220
    made[40:, 40:] = rng.integers(0, 255, (13, 27, 3), np.uint8)
    return Image.fromarray(made)


def _see_through() -> Image.Image:
    made = _drawing().convert("RGBA")
    made.putalpha(made.getchannel("R"))
    return made


def _wide() -> np.ndarray:
    return (np.arange(53 * 67, dtype=np.uint32).reshape(53, 67) * 17 % 65536).astype(np.uint16)


def _texts() -> Any:
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415  (beside its only use)

    info = PngInfo()
    info.add_text("Comment", "hello " * 20, zip=True)
    info.add_itxt("Title", "Grüße", "de", "Titel", zip=True)
    return info


def _interlaced() -> bytes:
    """A PNG in Adam7's seven passes, which Pillow reads and does not write."""
    pixels = np.asarray(_drawing())
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in (*passes, (1, 0, 2, 1))
        for row in pixels[top::down, left::right]
    )
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
