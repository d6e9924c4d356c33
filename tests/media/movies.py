"""Video files for tests, drawn and encoded by PyAV."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np


def picture(number: int, size: tuple[int, int]) -> np.ndarray:
    """A frame that differs from every other: a bar moves, the ground changes its tone."""
    width, height = size
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = (number * 5 % 200, 255 - number * 3 % 200, 90)
    left = number * 7 % max(width - 20, 1)
    frame[height // 4 : height // 2, left : left + 20] = (255, 20, 20)
    frame[::9, ::5] = 255
    return frame


def movie(
    frames: int | Iterable[np.ndarray] = 30,
    size: tuple[int, int] = (160, 120),
    form: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    **options: str,
) -> bytes:
    """Return a video file; ``size`` is (width, height), ``options`` are the muxer's."""
    if isinstance(frames, int):
        frames = (picture(number, size) for number in range(frames))
    speed = {"preset": "ultrafast"} if codec in ("libx264", "libx265") else {}
    with tempfile.NamedTemporaryFile() as file:  # some muxers read again what they wrote
        with av.open(file.name, "w", format=form, options=options) as container:
            stream: Any = container.add_stream(codec, rate=rate, options=speed)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return Path(file.name).read_bytes()


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    """Return the file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
