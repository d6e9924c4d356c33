"""Where vLLM asks for media: it is handed what is loaded already, and fetches nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from qwen2vl_serve.engine import Video
from qwen2vl_serve.errors import InternalError

MEDIA_CONNECTOR = "qwen2vl_serve"
"""Name under which vLLM finds our connector (environment ``VLLM_MEDIA_CONNECTOR``)."""


def register() -> None:
    """Let vLLM know the connector."""
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(Connector)


class Sampled(np.ndarray):
    """Frames of ours, at the model's size already: uint8 [frames, height, width, 3]."""


class Frames(MediaWithBytes):  # type: ignore[misc]  # vLLM ships no type information
    """A video in vLLM's wrapper, which decodes when its frames are first asked for.

    vLLM does not ask for those of a video whose processed form it has cached under its key
    (``start_engine`` takes away the check that would).
    """

    def __init__(self, video: Video) -> None:
        # The bytes it would hash are not needed: the key (``uuid``) comes with it.
        self.original_bytes = b""
        self.io_config = None
        self._video = video

    def __repr__(self) -> str:
        # asyncio prints what its tasks hold; vLLM's own would decode for that.
        return f"Frames({self._video.key})"

    @property
    def media(self) -> NDArray[np.uint8]:
        """The frames; decodes them once."""
        return self._video.frames().view(Sampled)

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers' ``VideoMetadata`` holds: by it Qwen2.5-VL knows the frames' time.

        As if the video had no other frames, so that nobody samples once more.
        """
        count = self._video.frames_taken
        return {
            "total_num_frames": count,
            "fps": self._video.sampled_fps,
            "frames_indices": list(range(count)),
        }


class Connector(MediaConnector):  # type: ignore[misc]  # vLLM ships no type information
    """Passes on what stands in the place of an address; of pictures vLLM never asks for it."""

    async def fetch_video_async(self, video_url: object, **options: Any) -> Any:  # noqa: ARG002
        """Return a video as (frames, metadata), without a look at the frames."""
        if not isinstance(video_url, Frames):
            raise self._refusal()
        return video_url, video_url.metadata

    async def load_from_url_async(self, *_: Any, **__: Any) -> Any:
        """Refuse: addresses are fetched before vLLM is asked."""
        raise self._refusal()

    def load_from_url(self, *_: Any, **__: Any) -> Any:
        """Refuse, in the same way."""
        raise self._refusal()

    def _refusal(self) -> InternalError:
        return InternalError("The engine asked for a medium that was not loaded.")
