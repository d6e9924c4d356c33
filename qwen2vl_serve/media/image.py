"""From a picture's bytes to the pixels that the model sees."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Collection
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from qwen2vl_serve.errors import ImageTooLarge, InvalidImage
from qwen2vl_serve.media import jpeg, parts, tiff
from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.media.resample import ROWS, resize

FORMATS = MappingProxyType(
    {
        "JPEG": "JPEG",
        "PNG": "PNG",
        "WEBP": "WebP",
        "GIF": "GIF",
        "BMP": "BMP",
        "TIFF": "TIFF",
        "AVIF": "AVIF",
        "HEIF": "HEIC",
    }
)
"""Pillow's names of what is decoded, as far as the installed Pillow can; with each, ours."""

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_TEXT = PngImagePlugin.MAX_TEXT_CHUNK
_MOST_TEXTS = 1000
_BITS_PER_SAMPLE = 258
_JPEGS = frozenset({"JPEG", "MPO"})
_SWAPPED = frozenset({5, 6, 7, 8})


def read_header(
    data: bytes, max_pixels: int, param: str, formats: Collection[str] = FORMATS.keys()
) -> Header:
    """Return format and size without decoding a pixel; ``formats`` are Pillow's names.

    Raises:
        InvalidImage: no picture of one of ``formats``; the message names what it is. Or there are
            more than ``parts.MOST_PARTS`` parts before the pixels.
        ImageTooLarge: more than ``max_pixels``, or a text that unpacks to too much.
    """
    accepted = tuple(name for name in installed_formats() if name in formats)
    with _opened(data, param, accepted) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(
                f"{param} holds a picture of {width} × {height} pixels; at most {max_pixels} "
                "pixels are decoded: send it smaller.",
                param=param,
            )
        # Of a TIFF Pillow tells the upright size already.
        if image.format != "TIFF" and _orientation(image, data) in _SWAPPED:
            width, height = height, width
        return Header(str(image.format), width, height, image.mode)


def decode(data: bytes, size: tuple[int, int], param: str, *, fast: bool = False) -> np.ndarray:
    """Return the picture at ``size`` (height, width) as RGB, uint8 [height, width, 3].

    The steps are those of the reference (qwen_vl_utils 0.0.14 ``fetch_image``: RGB, transparent
    parts on white, Pillow's bicubic resize), after the EXIF orientation is applied. Of an
    animation the first frame is taken; 16-bit samples are scaled to 8 bits. With ``fast`` a JPEG
    is decoded at the smallest of libjpeg's scales (1/2, 1/4, 1/8) that is not below ``size``: its
    pixels then differ from the reference's.

    Raises:
        InvalidImage: the data is corrupt or cut short, or of more parts than any program writes.
    """
    if data.startswith(_PNG):
        _verify(data, param)
    with _opened(data, param, installed_formats()) as image:
        try:
            if image.format == "PNG" and not _shows_its_own(image, data):
                raise _invalid(param)
            if image.format in _JPEGS and not jpeg.has_few_scans(data):
                raise _cluttered(param, f"more than {jpeg.MOST_SCANS} scans")
            orientation = _orientation(image, data)
            height, width = size
            if fast and image.format == "JPEG":
                turned = orientation in _SWAPPED
                image.draft(None, (height, width) if turned else (width, height))
            if image.format == "TIFF" and not tiff.is_whole(data, image):
                raise _invalid(param)
            image.load()
            if image.format in _JPEGS and not jpeg.is_whole(data, image):
                raise _invalid(param)
            upright = ImageOps.exif_transpose(image) if orientation != 1 else image
            rgb = _to_rgb(upright)
            return np.asarray(rgb) if rgb.size == (width, height) else resize(rgb, size)
        except InvalidImage:
            raise
        except Exception as error:  # each format's decoder raises what it likes
            raise _invalid(param) from error


@lru_cache(maxsize=1)
def installed_formats() -> tuple[str, ...]:
    """Return those of ``FORMATS`` that can be decoded here; HEIC with the package pillow-heif."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # noqa: PLC0415  (optional)

        pillow_heif.register_heif_opener()
    Image.init()
    # Size is judged by ``read_header``, against the profile's limit rather than Pillow's.
    Image.MAX_IMAGE_PIXELS = None
    # Of damaged tags, in the words of whoever sent them.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(data: bytes, param: str, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    try:
        return parts.opened(data, formats)
    except parts.TooManyParts as error:
        raise _cluttered(param, str(error)) from None
    except tiff.UnfitTiff as error:
        raise InvalidImage(
            f"{param} holds a TIFF {error}; save it anew, in strips packed with LZW or Deflate.",
            param=param,
        ) from None
    except Exception as error:  # each format's parser raises what it likes
        if _holds_text_bomb(data):
            raise ImageTooLarge(
                f"{param} holds a PNG whose text unpacks to more than {_MOST_TEXT} bytes: send "
                "it without.",
                param=param,
            ) from None
        raise _unreadable(data, param, formats) from error


def _holds_text_bomb(data: bytes) -> bool:
    """Tell why Pillow did not open a PNG: a text in it unpacks to more than Pillow reads."""
    place = len(_PNG)
    for _ in range(_MOST_TEXTS):
        if not data.startswith(_PNG) or place + 8 > len(data):
            break
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            text = data[place + 8 : place + 8 + length]
            # Behind a keyword and a few short fields; a stream begins where one can be read.
            packed = text[max(text.find(b"\x78"), 0) :]
            with contextlib.suppress(zlib.error):
                if len(zlib.decompressobj().decompress(packed, _MOST_TEXT + 1)) > _MOST_TEXT:
                    return True
        place += 12 + length
    return False


def _verify(data: bytes, param: str) -> None:
    """Refuse a PNG whose data ends early: Pillow leaves the rest black without a word.

    OpenCV is given the critical chunks alone, those that a decoder may not skip: it would take an
    animation for whole that is cut, and libpng writes what others say, a profile's name for one,
    into the server's log.
    """
    critical, end = [_PNG], len(_PNG)
    most = parts.MOST_PARTS + len(data) // 256
    for _ in range(most):
        start, kind = end, data[end + 4 : end + 8]
        end += 12 + int.from_bytes(data[start : start + 4])
        if not kind[:1].islower():
            critical.append(data[start:end])
        if kind in (b"", b"IEND"):
            break
    else:
        raise _cluttered(param, f"more than {most} chunks")
    if end > len(data):  # OpenCV fills as much memory as a chunk says it is long
        raise _invalid(param)
    coded = np.frombuffer(b"".join(critical), np.uint8)
    if cv2.imdecode(coded, cv2.IMREAD_UNCHANGED) is None:
        raise _invalid(param)


def _shows_its_own(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Tell whether Pillow takes all of a PNG's pixels from where any decoder does.

    An animation may say that its own picture is a smaller one, or have a frame before it.
    """
    own = image.tile[0]
    return own.extents == (0, 0, *image.size) and data[own.offset - 4 : own.offset] == b"IDAT"


def _invalid(param: str) -> InvalidImage:
    return InvalidImage(f"{param} holds a damaged picture; send the file anew.", param=param)


def _cluttered(param: str, what: str) -> InvalidImage:
    return InvalidImage(
        f"{param} holds a picture in more parts than any program writes ({what}); save it anew.",
        param=param,
    )


def _unreadable(data: bytes, param: str, formats: Collection[str]) -> InvalidImage:
    """Return the error for bytes that Pillow does not open as one of ``formats``."""
    kind = file_kind(data)
    if kind in formats:
        return _invalid(param)
    held = f"holds {FORMATS.get(kind, kind)} data" if kind else "holds no picture"
    named = ", ".join(FORMATS[name] for name in formats) or "no format at all"
    hint = ' Of a PDF say which pages to show: pages, as "1-3".' if kind == "PDF" else ""
    return InvalidImage(f"{param} {held}; this server takes {named}.{hint}", param=param)


def file_kind(data: bytes) -> str | None:
    """Name the kind of a file by its first bytes: of ``FORMATS``, or what users mistake for it."""
    if data[4:8] == b"ftyp":
        brands = {data[start : start + 4] for start in (8, *range(16, _ftyp_end(data), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else "MP4"
    for start, kind in _MAGIC:
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF":
        return {b"WEBP": "WEBP", b"AVI ": "AVI"}.get(data[8:12])
    return "MP4" if data[4:8] in MOV_BOXES else _text_kind(data[:1024])


def _text_kind(head: bytes) -> str | None:
    if b"%PDF-" in head:  # behind a blank line or more, of which readers think nothing
        return "PDF"
    return "SVG" if b"<svg" in head.lower() else None


def _ftyp_end(data: bytes) -> int:
    return min(int.from_bytes(data[:4]), 64)


MOV_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})
"""What an MP4 may begin with, or a QuickTime, which needs no ``ftyp``."""

VIDEO_KINDS = frozenset({"MP4", "Matroska", "AVI"})
"""Names that ``file_kind`` gives to videos."""

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "PSD"),
    (b"\0\0\x01\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\x1aE\xdf\xa3", "Matroska"),
)


_PNG_ORIENTED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Chunk and keywords of text chunks, never compressed, from which Pillow reads an orientation."""


def _orientation(image: Image.Image, data: bytes) -> int:
    # Pillow looks for it behind the pixels as well, and decodes all of them on the way there.
    if image.format == "PNG" and not any(mark in data for mark in _PNG_ORIENTED):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # any damage of the EXIF block means: as it is
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # a PNG's see-through colour and all, as the reference has it
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(image)
    if image.mode == "RGBA" or "transparency" in image.info or image.mode in ("LA", "PA", "La"):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Scale wide samples to 8 bits; Pillow's own conversion clips them to white.

    Samples of 16 bits (of 12, in a TIFF) reach to the top that their format says. For those of
    32 bits, integer or float, files keep to no range: 1, 255 and 65535 are all in use, and the
    largest sample tells which.
    """
    clear = image.info.get("transparency")
    grey = Image.new("L", image.size)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        top = float((1 << max(bits)) - 1)
    else:
        high: Any = image.getextrema()[1]
        top = 65535.0 if image.mode == "I" and float(high) > 255 else 255.0
        if image.mode == "F" and float(high) <= 1:
            top = 1.0
    for start in range(0, image.height, ROWS):
        end = min(start + ROWS, image.height)
        samples = np.asarray(image.crop((0, start, image.width, end)))
        scaled = np.clip(np.rint(samples * np.float64(255.0 / top)), 0, 255).astype(np.uint8)
        if isinstance(clear, int):
            scaled[samples == clear] = 255  # a PNG's one see-through sample: on white
        grey.paste(Image.fromarray(scaled), (0, start))
    return grey.convert("RGB")
