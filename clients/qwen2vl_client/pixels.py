"""Arrays of pixels as PNG, without numpy or Pillow: whoever has an array has numpy loaded."""

from __future__ import annotations

import struct
import sys
import zlib
from typing import Any

from qwen2vl_client.errors import MediaError

_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
_MOST_SIDE = 2**31 - 1


def is_array(source: object) -> bool:
    """Tell whether something is a numpy array."""
    module = sys.modules.get("numpy")
    return module is not None and isinstance(source, module.ndarray)


def png(array: Any) -> bytes:
    """Return the pixels as a PNG file, losslessly.

    ``array`` is uint8 [height, width] (grey), [height, width, 3] (RGB) or [height, width, 4]
    (RGBA). ``MediaError`` for anything else.
    """
    shape = tuple(array.shape)
    channels = shape[2] if len(shape) == 3 else 1
    usable = len(shape) in (2, 3) and channels in _COLOUR_TYPES and all(shape)
    if not usable or str(array.dtype) != "uint8" or max(shape) > _MOST_SIDE:
        raise MediaError(
            f"an array of {array.dtype} {list(shape)} is no picture: give uint8 [height, width], "
            "[height, width, 3] (RGB; OpenCV's BGR reversed) or [height, width, 4]"
            + ("; a video's frames go into videos=" if len(shape) == 4 else "")
        )
    height, width = shape[:2]
    row = width * channels
    data = array.tobytes()
    # Each row begins with its filter: 0, none.
    rows = b"".join(b"\0" + data[at : at + row] for at in range(0, height * row, row))
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", head),
            _chunk(b"IDAT", zlib.compress(rows, 1)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
