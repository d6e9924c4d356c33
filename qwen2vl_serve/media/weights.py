"""How much memory decoding takes, told from what the head of a file says.

Measured in processes of their own, as the peak of resident memory over what it was before, at
4000 × 3000 pixels (Pillow 13.0): in bytes a pixel, upright and turned by EXIF,
which is a copy more. ``tests/media/peak.py`` is how; the file's own bytes are the ledger's.

=====================  =======================================================================
JPEG                   L 6.6, 7.5 turned; RGB 5.5, 9.5 turned, 12.3 progressive; CMYK 9.8, 13.7;
                       13.1 progressive
PNG                    1: 6.6; L 6.5; P 6.4; both 10.3 with tRNS, 11.4 turned; I;16 7.8;
                       LA 13.3, 17.4; RGB 6.3, 9.5; RGBA 9.5, 13.5, 16.3 of 16 bits
WebP                   RGB 16.1, 17.2 turned; RGBA 21.4 turned; 17.4 as an animation
GIF                    P 6.3, 10.0 with a transparent colour
BMP                    1, L, P 6.4; RGB 5.3
TIFF                   1, L, P 6.4, 7.4 turned; I;16 8.0, 9.6; RGB 5.3, 9.4; YCbCr 9.4;
                       LAB 9.4; CMYK and RGBA 9.4, 13.4; I and F 9.9, 13.6; LA 13.0, 17.1
AVIF                   RGB 9.2, 13.2 turned and 4:4:4, 11.1 of 10 bits; RGBA 18.6, 15.6 of 10
HEIC                   RGB 7.8, 9.7 in 4:4:4, 15.7 of 10 bits; RGBA 9.3, 20.7 of 10 bits
=====================  =======================================================================

The weights lie above that, where files could be made that take more: a TIFF in one strip, an AVIF
of 12 bits. HEIC is that of libheif 1.23 with libde265.
"""

from __future__ import annotations

from types import MappingProxyType

from qwen2vl_serve.media.headers import Header

PIXEL_WEIGHTS = MappingProxyType(
    {
        "JPEG": {"L": 9, "RGB": 14, "CMYK": 18},
        "PNG": {"1": 9, "L": 13, "P": 13, "I;16": 12, "RGB": 15, "LA": 19, "RGBA": 19},
        "WEBP": {"RGB": 19, "RGBA": 23},
        "GIF": {"L": 12, "P": 12, "RGB": 12, "RGBA": 14},
        "BMP": {"1": 8, "L": 8, "P": 8, "RGB": 8, "RGBA": 14},
        "TIFF": {
            "1": 10, "L": 10, "P": 10, "I;16": 12, "I;16B": 12, "RGB": 14, "YCbCr": 14, "LAB": 14,
            "CMYK": 16, "RGBA": 16, "RGBX": 16, "I": 16, "F": 16, "LA": 19, "PA": 19,
        },
        "AVIF": {"RGB": 18, "RGBA": 24},
        "HEIF": {"RGB": 19, "RGBA": 24},
    }
)  # fmt: skip
"""Bytes a pixel, by Pillow's names of format and mode."""

MADE_WEIGHT = 6
"""Bytes that a pixel of the model's size takes: it is resized in two passes."""

FRAME_WEIGHT = 192
"""Bytes that a pixel of a video takes, once for all of its frames: those that others refer to or
that FFmpeg's threads are at, and one in floating point, as it is resized.

Measured at 1920 × 1080 on two CPUs: HEVC 43, VP9 37, MPEG-4 36; H.264 with 16 references 91, in
4:4:4 of 10 bits 180. Each further CPU is a further frame, of 1.5 to 6 bytes a pixel.
"""

FIRST_FRAME_WEIGHT = 16
"""The same while a header is read, for which one frame is decoded: 4096 × 2304 of H.264 took 10.3,
on two CPUs. Holding more would make pictures wait for as long as a long film is read through.
"""

LISTED_FRAME_WEIGHT = 32
"""The same for a list of pictures, whatever their format: one, and one in floating point."""


def picture_weight(header: Header) -> int:
    """Return how many bytes a pixel of a picture takes; of an unknown mode, the most."""
    by_mode = PIXEL_WEIGHTS["JPEG" if header.format == "MPO" else header.format]
    return by_mode.get(header.mode, max(by_mode.values()))
