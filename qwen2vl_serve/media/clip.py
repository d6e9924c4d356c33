"""A video of a request: its bytes, which frames are shown at which size, frames on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2vl_serve.media import video
from qwen2vl_serve.media.headers import VideoHeader
from qwen2vl_serve.media.sampling import Sampling
from qwen2vl_serve.media.video import VideoLimits, WorkTime
from qwen2vl_serve.media.weights import FRAME_WEIGHT, LISTED_FRAME_WEIGHT, MADE_WEIGHT


@dataclass(slots=True)
class Video:
    """One video of a request: a container's bytes, or those of each frame.

    ``digest`` is the hash of them all, ``work`` the time that all work on it shares.
    """

    data: Sequence[bytes] = field(repr=False)
    header: VideoHeader
    sampling: Sampling
    limits: VideoLimits
    digest: str
    param: str
    work: WorkTime | None = field(default=None, repr=False, compare=False)
    decoded: bool = False
    _frames: np.ndarray | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Stands for its content, the frames that are taken and their size."""
        # A file could be made whose hash is that of a list: the kind tells them apart.
        kind = "frames" if self.sampling.listed else "video"
        return f"{kind}-{self.digest}-{self.sampling.key}"

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        return self.sampling.visual_tokens

    @property
    def size_bytes(self) -> int:
        """Size of the file, or of all frames' files."""
        return sum(map(len, self.data))

    @property
    def source_pixels(self) -> int:
        """Pixels of the frames that are taken, at their own size."""
        return self.sampling.frames * self.header.width * self.header.height

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding takes at most: frames are read one by one, and kept as made."""
        weight = LISTED_FRAME_WEIGHT if self.sampling.listed else FRAME_WEIGHT
        made = self.sampling.frames * self.sampling.sizing.width * self.sampling.sizing.height
        return self.header.width * self.header.height * weight + made * MADE_WEIGHT

    @property
    def frames_taken(self) -> int:
        """How many frames are shown to the model."""
        return self.sampling.frames

    @property
    def sampled_fps(self) -> float:
        """Frames a second of the video that are shown."""
        return self.sampling.fps

    def decode(self) -> None:
        """Have ``frames`` ready."""
        self.frames()

    def frames(self) -> np.ndarray:
        """Return RGB at the model's size, uint8 [frames, height, width, 3]; decodes once.

        Raises:
            InvalidVideo, InvalidImage: the data is damaged.
            VideoTooLarge: decoding takes too long.
        """
        if self._frames is None:
            sizing, limits = self.sampling.sizing, self.limits
            size = sizing.height, sizing.width
            if self.sampling.listed:
                self._frames = video.decode_listed(
                    self.data, self.sampling.shape, size, limits, self.param, work=self.work
                )
            else:
                indices = video.frame_indices(self.header.frames, self.sampling.frames)
                self._frames = video.decode(
                    self.data[0], indices, size, limits, self.param, work=self.work
                )
            self.decoded = True
        return self._frames

    def forget(self) -> None:
        """Let go of bytes and frames, once the engine has them; what was told of it stays."""
        self.data, self._frames = (), None

    def info(self) -> dict[str, object]:
        """What ``include_media_info`` reports; sides in pixels, duration in seconds."""
        return {
            "type": "video",
            "width": self.header.width,
            "height": self.header.height,
            "duration": self.header.duration,
            "fps": round(self.header.fps, 3) or None,
            "source_frames": self.header.frames,
            "frames": self.sampling.frames,
            "resized_width": self.sampling.sizing.width,
            "resized_height": self.sampling.sizing.height,
            "visual_tokens": self.visual_tokens,
            "clamped": self.sampling.clamped,
            "cached": not self.decoded,
        }
