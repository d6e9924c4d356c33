"""A picture of a request: its bytes, the size it is shown at, pixels on demand."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.media.image import decode
from qwen2vl_serve.media.sizing import Sizing
from qwen2vl_serve.media.weights import MADE_WEIGHT, picture_weight


@dataclass(slots=True)
class Picture:
    """One picture of a request; ``digest`` is the hash of its bytes."""

    data: bytes = field(repr=False)
    header: Header
    sizing: Sizing
    digest: str
    param: str
    fast: bool = False
    decoded: bool = False
    _pixels: np.ndarray | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Stands for its content at its size."""
        way = "-fast" if self.fast else ""
        return f"{self.digest}-{self.sizing.height}x{self.sizing.width}{way}"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of ``pixels``."""
        return self.sizing.width, self.sizing.height

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        return self.sizing.visual_tokens

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.data)

    @property
    def source_pixels(self) -> int:
        """Pixels of the file."""
        return self.header.width * self.header.height

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding takes at most."""
        made = self.sizing.width * self.sizing.height
        return self.source_pixels * picture_weight(self.header) + made * MADE_WEIGHT

    @property
    def frames_taken(self) -> int:
        """None: a picture has no frames."""
        return 0

    def decode(self) -> None:
        """Have ``pixels`` ready."""
        self.pixels()

    def pixels(self) -> np.ndarray:
        """Return RGB at the model's size, uint8 [height, width, 3]; decodes once.

        Raises:
            InvalidImage: the data is corrupt.
        """
        if self._pixels is None:
            size = self.sizing.height, self.sizing.width
            self._pixels = decode(self.data, size, self.param, fast=self.fast)
            self.decoded = True
        return self._pixels

    def forget(self) -> None:
        """Let go of bytes and pixels, once the engine has them; what was told of it stays."""
        self.data, self._pixels = b"", None

    def info(self) -> dict[str, object]:
        """What ``include_media_info`` reports; sides in pixels."""
        return {
            "type": "image",
            "width": self.header.width,
            "height": self.header.height,
            "resized_width": self.sizing.width,
            "resized_height": self.sizing.height,
            "visual_tokens": self.sizing.visual_tokens,
            "clamped": self.sizing.clamped,
            "cached": not self.decoded,
        }
