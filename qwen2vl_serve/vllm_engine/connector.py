"""Where vLLM asks for media: it is handed what is loaded already, and fetches nothing."""

from __future__ import annotations

from typing import Any

from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from qwen2vl_serve.engine import Video
from qwen2vl_serve.errors import InternalError

MEDIA_CONNECTOR = "qwen2vl_serve"
"""Name under which vLLM finds our connector (environment ``VLLM_MEDIA_CONNECTOR``)."""


def register() -> None:
    """Let vLLM know the connector."""
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(Connector)


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
    def media(self) -> Any:
        """Frames, uint8 [frames, height, width, 3]."""
        return self._video.frames()


class Connector(MediaConnector):  # type: ignore[misc]  # vLLM ships no type information
    """Passes on what stands in the place of an address; of pictures vLLM never asks for it."""

    async def fetch_video_async(self, video_url: object, **options: Any) -> Any:  # noqa: ARG002
        """Return a video as (frames, metadata), without a look at the frames."""
        if not isinstance(video_url, Frames):
            raise self._refusal()
        # Without metadata there is nothing that the processor could sample by once more.
        return video_url, {}

    async def load_from_url_async(self, *_: Any, **__: Any) -> Any:
        """Refuse: addresses are fetched before vLLM is asked."""
        raise self._refusal()

    def load_from_url(self, *_: Any, **__: Any) -> Any:
        """Refuse, in the same way."""
        raise self._refusal()

    def _refusal(self) -> InternalError:
        return InternalError("The engine asked for a medium that was not loaded.")
