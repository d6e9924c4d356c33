"""What the model saw of a picture or video, as the server tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class MediaInfo:
    """One picture or video of a request; sides in pixels, None where it was not told.

    ``clamped``: a bound of the server changed the size that was asked for; ``cached``: it was
    not decoded again. Of a video, ``duration`` is in seconds, ``fps`` and ``source_frames`` are
    the file's, ``frames`` what the model saw.
    """

    type: str | None = None
    width: int | None = None
    height: int | None = None
    resized_width: int | None = None
    resized_height: int | None = None
    visual_tokens: int | None = None
    clamped: bool | None = None
    cached: bool | None = None
    duration: float | None = None
    fps: float | None = None
    source_frames: int | None = None
    frames: int | None = None


_NAMES = frozenset(one.name for one in fields(MediaInfo))


def media_of(raw: Mapping[str, Any]) -> tuple[MediaInfo, ...]:
    """Read the list ``media`` of an answer or explanation; empty where there is none."""
    listed = raw.get("media")
    if not isinstance(listed, list):
        return ()
    return tuple(
        MediaInfo(**{name: one[name] for name in _NAMES & one.keys()})
        for one in listed
        if isinstance(one, dict)
    )
