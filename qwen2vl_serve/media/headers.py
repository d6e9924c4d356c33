"""What the head of a picture or a video says, without anything that decodes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a file says; sides in pixels, after the EXIF orientation is applied.

    ``mode`` is Pillow's name of what a pixel holds.
    """

    format: str
    width: int
    height: int
    mode: str = "RGB"


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What a video is: sides in pixels as it is shown, frames, and frames a second.

    Of a list of frames ``fps`` is 0 where nobody says it.
    """

    width: int
    height: int
    frames: int
    fps: float

    @property
    def duration(self) -> float | None:
        """Seconds, where known."""
        return round(self.frames / self.fps, 3) if self.fps else None
