"""Where vLLM asks for media: our connector, the only one it may use."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from qwen2vl_serve.errors import InvalidVideo
from qwen2vl_serve.media.fetch import Fetcher

logger = logging.getLogger(__name__)

MEDIA_CONNECTOR = "qwen2vl_serve"
"""Name under which vLLM finds our connector (environment ``VLLM_MEDIA_CONNECTOR``)."""


def register(fetcher: Fetcher) -> None:
    """Let vLLM fetch through ``fetcher``."""
    bound = type("BoundConnector", (Connector,), {"fetcher": fetcher})
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(bound)


class Connector(MediaConnector):  # type: ignore[misc]  # vLLM ships no type information
    """Where vLLM asks for the videos that a request names; pictures it is given.

    Addresses go through our ``Fetcher``, and none of vLLM's or a library's words to a client.
    """

    fetcher: ClassVar[Fetcher]

    async def load_from_url_async(
        self, url: str, media_io: Any, *, fetch_timeout: int | None = None
    ) -> Any:
        """Return the media of a ``data:`` or ``http(s)`` address."""
        if url[:5].lower() == "data:":
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        data = await self.fetcher.fetch(url)
        return await asyncio.get_running_loop().run_in_executor(None, media_io.load_bytes, data)

    async def fetch_video_async(self, video_url: str, **options: Any) -> Any:
        """Return the frames of a video.

        Raises:
            InvalidVideo: the address cannot be fetched, or its bytes not be decoded.
        """
        try:
            return await super().fetch_video_async(video_url, **options)
        except Exception as error:
            logger.info("video refused: %s", type(error).__name__)
            raise InvalidVideo(
                "video_url could not be fetched or decoded; send an mp4 or webm file, or frames "
                "as data:video/jpeg;base64,<frame>,<frame>….",
                param="messages",
            ) from None
