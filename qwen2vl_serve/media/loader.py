"""From the media parts of a request to pictures that an engine can take.

Pictures are known by their content: the key hashes the bytes and names the size, never anything
that a client says. A picture's pixels are decoded when they are first needed; of a key that was
decoded before, the engine's own cache usually needs no pixels at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from qwen2vl_serve.errors import (
    ImageDownloadTimeout,
    InvalidImage,
    InvalidImageURL,
    UnknownFile,
)
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchTimeout
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.image import FORMATS, Header, decode, read_header
from qwen2vl_serve.media.sizing import Bounds, Sizing, shrunk, size_for
from qwen2vl_serve.media.sources import DataURLError, Sources, UnknownFileID
from qwen2vl_serve.protocol import ChatRequest, ImagePart

logger = logging.getLogger(__name__)

KNOWN_KEYS = 65_536
"""How many keys are remembered as decodable; 64 hex digits and a size each."""

DECODE_THREADS = 4


@dataclass(slots=True)
class Picture:
    """One picture of a request; ``digest`` is the hash of its bytes."""

    data: bytes = field(repr=False)
    header: Header
    sizing: Sizing
    digest: str
    param: str
    decoded: bool = False
    _pixels: np.ndarray | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Stands for its content at its size."""
        return f"{self.digest}-{self.sizing.height}x{self.sizing.width}"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of ``pixels``."""
        return self.sizing.width, self.sizing.height

    def pixels(self) -> np.ndarray:
        """Return RGB at the model's size, uint8 [height, width, 3]; decodes once.

        Raises:
            InvalidImage: the data is corrupt.
        """
        if self._pixels is None:
            size = self.sizing.height, self.sizing.width
            self._pixels = decode(self.data, size, self.param)
            self.decoded = True
        return self._pixels

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


class MediaLoader:
    """Loads what requests show; one for a server.

    ``folders`` are those that ``file:`` addresses may lead into, ``files`` what clients uploaded,
    ``formats`` the kinds of pictures that are taken, by Pillow's names.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        bounds: Bounds,
        max_image_pixels: int,
        *,
        folders: Sequence[str] = (),
        files: FileStore | None = None,
        formats: Collection[str] = FORMATS.keys(),
    ) -> None:
        self.fetcher = fetcher
        self.sources = Sources(fetcher, folders, files)
        self.files = files
        self.formats = formats
        self.bounds = bounds
        self._max_image_pixels = max_image_pixels
        self._known: OrderedDict[str, None] = OrderedDict()
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")

    async def load(self, request: ChatRequest) -> Sequence[Picture]:
        """Return the pictures of ``request`` in the order of its text.

        Raises:
            RequestError: one of them cannot be fetched, decoded or sized; the message names it.
        """
        parts = list(_images(request))
        if not parts:
            return ()
        if len(parts) == 1:
            return (await self._picture(*parts[0], request),)
        tasks = [asyncio.ensure_future(self._picture(*one, request)) for one in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def resized(self, picture: Picture, max_pixels: int) -> Picture:
        """Return ``picture`` at its own size or under ``max_pixels``, whichever is smaller."""
        sizing = shrunk(picture.header, picture.sizing, max_pixels, self.bounds)
        if sizing == picture.sizing:
            return picture
        return Picture(picture.data, picture.header, sizing, picture.digest, picture.param)

    async def close(self) -> None:
        """Close connections and threads."""
        await self.sources.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _picture(self, part: ImagePart, param: str, request: ChatRequest) -> Picture:
        if part.page is None:
            data = await self.read(part.image_url.address, param)
            header = self.inspect(data, param)
        else:
            data = part.page
            header = read_header(data, self._max_image_pixels, param)
        sizing = size_for(header, part, request, self.bounds, param)
        picture = Picture(data, header, sizing, blake3(data).hexdigest(), param)
        if picture.key in self._known:
            self._known.move_to_end(picture.key)
            return picture
        # New bytes are decoded here, where threads are many and errors still have a status.
        await asyncio.get_running_loop().run_in_executor(self._pool, picture.pixels)
        self._known[picture.key] = None
        if len(self._known) > KNOWN_KEYS:
            self._known.popitem(last=False)
        return picture

    def inspect(self, data: bytes, param: str) -> Header:
        """Return the header of a picture that this server takes.

        Raises:
            InvalidImage: no picture of a format that is taken.
            ImageTooLarge: more pixels than the profile lets be decoded.
        """
        return read_header(data, self._max_image_pixels, param, self.formats)

    async def read(self, address: str, param: str) -> bytes:
        """Return the bytes at an address, wherever it leads.

        Raises:
            InvalidImage: a malformed ``data:`` URL.
            InvalidImageURL: blocked, missing or out of reach, which are not told apart.
            ImageDownloadTimeout: the other side was too slow.
            UnknownFile: no such upload.
        """
        try:
            return await self.sources.read(address)
        except DataURLError as error:
            raise InvalidImage(f"{param} {error}", param=param) from None
        except UnknownFileID:
            raise UnknownFile(
                f"{param} names a file that is not here: it was never uploaded, was deleted, has "
                "expired or made room for others; upload it again.",
                param=param,
            ) from None
        except FetchTimeout:
            raise ImageDownloadTimeout(
                f"{param} names a host that was too slow; try again or send the picture as "
                "data:image/jpeg;base64,….",
                param=param,
            ) from None
        except FetchError as error:
            logger.info("not fetched: %s", error)
            raise InvalidImageURL(
                f"{param} cannot be fetched; give a public http(s) address of a picture, or send "
                "it as data:image/jpeg;base64,….",
                param=param,
            ) from None


def _images(request: ChatRequest) -> Iterator[tuple[ImagePart, str]]:
    for m, message in enumerate(request.messages):
        if message.role == "user" and not isinstance(message.content, str):
            further = 0
            for p, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    # Errors name the client's places, which the pages of a PDF have moved.
                    further += part.further
                    yield part, f"messages[{m}].content[{p - further}].{part.key}"
