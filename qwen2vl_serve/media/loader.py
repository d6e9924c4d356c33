"""From the media parts of a request to pictures that an engine can take.

Pictures are known by their content: the key hashes the bytes and names the size, never anything
that a client says. A picture's pixels are decoded when they are first needed; of a key that was
decoded before, the engine's own cache usually needs no pixels at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from blake3 import blake3

from qwen2vl_serve.errors import (
    ImageDownloadTimeout,
    InvalidImage,
    InvalidImageURL,
    InvalidValue,
    TooManyItems,
    UnknownFile,
)
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchTimeout
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.image import FORMATS, Header, decode, file_kind, read_header
from qwen2vl_serve.media.pdf import draw_pages
from qwen2vl_serve.media.sizing import Bounds, Sizing, shrunk, size_for
from qwen2vl_serve.media.sources import DataURLError, Sources, UnknownFileID
from qwen2vl_serve.protocol import ChatRequest, ImagePart
from qwen2vl_serve.vision import FACTOR

logger = logging.getLogger(__name__)

KNOWN_KEYS = 65_536
"""How many keys are remembered as decodable; 64 hex digits and a size each."""

DECODE_THREADS = 4

PDF_PROCESSES = 2


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
    ``formats`` the kinds of pictures that are taken, by Pillow's names; of a PDF at most
    ``max_pdf_pages`` are drawn, with 0 none is taken.
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
        max_pdf_pages: int = 0,
    ) -> None:
        self.fetcher = fetcher
        self.sources = Sources(fetcher, folders, files)
        self.files = files
        self.formats = formats
        self.max_pdf_pages = max_pdf_pages
        self.bounds = bounds
        self._max_image_pixels = max_image_pixels
        self._known: OrderedDict[str, None] = OrderedDict()
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        # Apart from the decoders: one document may take its whole time.
        self._drawers = ThreadPoolExecutor(PDF_PROCESSES, thread_name_prefix="pdf")

    async def with_pages(self, request: ChatRequest, most: int) -> ChatRequest:
        """Return ``request`` with each PDF's pages as pictures of their own.

        Looked at is what may be one: a part with ``pages``, a ``file``, a ``data:`` URL of that
        type, an address that ends in ``.pdf``.

        Raises:
            RequestError: it cannot be fetched or drawn, or makes more than ``most`` pictures.
        """
        shown = [(m, p, part) for m, p, part in _pictures(request) if _may_be_pdf(part)]
        if not shown:
            return request
        messages = list(request.messages)
        for m, p, part in reversed(shown):  # from the end, so that places stay what they are
            pages = await self._pages(part, f"messages[{m}].content[{p}].{part.key}")
            content = [*messages[m].content]
            content[p : p + 1] = pages
            messages[m] = messages[m].model_copy(update={"content": content})
        expanded = request.model_copy(update={"messages": messages})
        count = sum(1 for _ in _pictures(expanded))
        if count > most:
            raise TooManyItems(
                f"messages hold {count} images, each page of a PDF counted as one; at most {most} "
                'per request: name fewer pages, as "1-3", or raise '
                "media.limit_mm_per_prompt.image in the server's profile.",
                param="messages",
            )
        return expanded

    async def _pages(self, part: ImagePart, param: str) -> list[ImagePart]:
        data = await self._bytes(part.image_url.address, param)
        if file_kind(data) != "PDF":
            if part.pages is not None:
                raise InvalidValue(f"{param} is no PDF; leave pages out.", param=param)
            return [part]
        if self.max_pdf_pages == 0:
            self.inspect(data, param)  # says what is taken instead
        draw = partial(
            draw_pages,
            max_pages=self.max_pdf_pages,
            max_pixels=self.bounds.limits.max_pixels,
            param=param,
        )
        loop = asyncio.get_running_loop()
        drawn = await loop.run_in_executor(self._drawers, draw, data, part.pages)
        return part.showing(drawn)

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
        self._drawers.shutdown(wait=False, cancel_futures=True)

    async def _picture(self, part: ImagePart, param: str, request: ChatRequest) -> Picture:
        if part.page is None:
            data = await self._bytes(part.image_url.address, param)
            if self.max_pdf_pages and file_kind(data) == "PDF":
                raise InvalidImage(
                    f'{param} holds a PDF; say which pages are to be shown: pages, as "1-3".',
                    param=param,
                )
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

    def inspect_upload(self, data: bytes, param: str) -> None:
        """See that a file is a picture, or a PDF, that this server can show; may take seconds.

        Raises:
            RequestError: it is not.
        """
        if file_kind(data) == "PDF" and self.max_pdf_pages:
            draw_pages(data, "1", max_pages=1, max_pixels=FACTOR**2, param=param)
        else:
            self.inspect(data, param)

    async def _bytes(self, address: str, param: str) -> bytes:
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
    further: Counter[int] = Counter()
    for m, p, part in _pictures(request):
        # Errors name the client's places, which the further pages of a PDF have moved.
        further[m] += part.further
        yield part, f"messages[{m}].content[{p - further[m]}].{part.key}"


def _pictures(request: ChatRequest) -> Iterator[tuple[int, int, ImagePart]]:
    """Yield each picture with the places of its message and of its part."""
    for m, message in enumerate(request.messages):
        if message.role == "user" and not isinstance(message.content, str):
            for p, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield m, p, part


def _may_be_pdf(part: ImagePart) -> bool:
    address = part.image_url.address
    return (
        part.pages is not None
        or part.key == "file"
        or address[:20].lower() == "data:application/pdf"
        or address[-4:].lower() == ".pdf"
    )
