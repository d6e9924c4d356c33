"""From a picture's bytes to the pixels that the model sees."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from qwen2vl_serve.errors import ImageTooLarge, InvalidImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Pillow's names of what is decoded, as far as the installed Pillow can."""

_SWAPPED = frozenset({5, 6, 7, 8})
_NO_PICTURE = (
    "holds no picture that can be decoded; send a JPEG, PNG, WebP, GIF, BMP or TIFF file, as "
    "data:image/jpeg;base64,… or by URL."
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a file says; sides in pixels, after the EXIF orientation is applied."""

    format: str
    width: int
    height: int


def read_header(data: bytes, max_pixels: int, param: str) -> Header:
    """Return format and size without decoding a pixel.

    Raises:
        InvalidImage: no picture of a served format.
        ImageTooLarge: more than ``max_pixels``.
    """
    with _opened(data, param) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(
                f"{param} holds a picture of {width} × {height} pixels; at most {max_pixels} "
                "pixels are decoded: send it smaller.",
                param=param,
            )
        if _orientation(image) in _SWAPPED:
            width, height = height, width
        return Header(str(image.format), width, height)


def decode(data: bytes, size: tuple[int, int], param: str) -> np.ndarray:
    """Return the picture at ``size`` (height, width) as RGB, uint8 [height, width, 3].

    The steps are those of the reference (qwen_vl_utils 0.0.14 ``fetch_image``: RGB, transparent
    parts on white, Pillow's bicubic resize), after the EXIF orientation is applied. Of an
    animation the first frame is taken; 16-bit samples are scaled to 8 bits.

    Raises:
        InvalidImage: the data is corrupt or cut short.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        _verify(data, param)
    with _opened(data, param) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            rgb = _to_rgb(upright)
            height, width = size
            if rgb.size != (width, height):
                rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise _invalid(param) from error


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(data: bytes, param: str) -> Image.Image:
    with warnings.catch_warnings():
        # Size is judged by ``read_header``, against the profile's limit rather than Pillow's.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=_installed())
        except Image.DecompressionBombError:
            raise ImageTooLarge(
                f"{param} holds a picture of more pixels than are ever decoded: send it smaller.",
                param=param,
            ) from None
        except (OSError, SyntaxError, ValueError, TypeError, OverflowError) as error:
            raise _invalid(param) from error


def _verify(data: bytes, param: str) -> None:
    """Refuse a PNG whose data ends early: Pillow leaves the rest black without a word."""
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        raise _invalid(param)


def _invalid(param: str) -> InvalidImage:
    return InvalidImage(f"{param} {_NO_PICTURE}", param=param)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # any damage of the EXIF block means: as it is
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(image)
    if image.mode == "RGBA" or "transparency" in image.info or image.mode in ("LA", "PA", "La"):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Scale wide samples to 8 bits; Pillow's own conversion clips them to white."""
    samples = np.asarray(image).astype(np.float64)
    # 16 bits of a PNG or TIFF arrive in modes "I;16" and "I"; "F" holds any range.
    top = 65535.0 if image.mode != "F" and samples.max(initial=0) > 255 else 255.0
    if image.mode == "F" and samples.max(initial=0) <= 1:
        top = 1.0
    grey = np.clip(np.rint(samples * (255.0 / top)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
