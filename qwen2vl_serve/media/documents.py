"""Files that are told apart by a look at them: a PDF becomes its pages, pictures of their own.

A video that is sent as a ``file`` part becomes one that is sent as a ``video_url``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from qwen2vl_serve.errors import InvalidImage, InvalidValue, TooManyItems
from qwen2vl_serve.media.image import VIDEO_KINDS, file_kind
from qwen2vl_serve.media.ledger import Account
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.media.lru import LRU
from qwen2vl_serve.media.pdf import draw_pages
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.content import FramesPart, ImagePart, VideoPart
from qwen2vl_serve.vision import FACTOR

PROCESSES = 2
"""How many documents are drawn at a time."""


class Documents:
    """Draws PDFs: ``max_pages`` of one at most (0: none is taken).

    A request holds at most ``max_pictures`` and ``max_videos``, whatever its files turn out to be.
    Drawn pages are kept, in ``cache_bytes`` of memory, for when the same document comes again.
    """

    def __init__(
        self,
        loader: MediaLoader,
        max_pages: int,
        max_pictures: int,
        max_videos: int,
        cache_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.loader = loader
        self.max_pages = max_pages
        self.max_pictures = max_pictures
        self.max_videos = max_videos
        self.drawn: LRU[list[bytes]] = LRU(cache_bytes)
        self._pool = ThreadPoolExecutor(PROCESSES, thread_name_prefix="pdf")

    async def with_pages(self, request: ChatRequest, account: Account) -> ChatRequest:
        """Return ``request`` with a part for each page of its PDFs, and each video in one's part.

        Looked at is what may be one: a part with ``pages``, a ``file``, a ``data:`` URL of that
        type, an address that ends in ``.pdf``. The bytes of the pages are taken from ``account``.

        Raises:
            RequestError: a PDF cannot be read or drawn, or its pages are too many.
        """
        found = [(m, p, part) for m, p, part in _pictures(request) if _needs_a_look(part)]
        if not found:
            return request
        messages = list(request.messages)
        for m, p, part in reversed(found):  # from the end, so that places stay what they are
            content = [*messages[m].content]
            param = f"messages[{m}].content[{p}].{part.key}"
            content[p : p + 1] = await self._told_apart(part, param, account)
            messages[m] = messages[m].model_copy(update={"content": content})
        expanded = request.model_copy(update={"messages": messages})
        self._refuse_excess(expanded)
        return expanded

    def _refuse_excess(self, request: ChatRequest) -> None:
        count = sum(1 for _ in _pictures(request))
        if count > self.max_pictures:
            raise TooManyItems(
                f"messages hold {count} images, each page of a PDF counted as one; at most "
                f'{self.max_pictures} per request: name fewer pages, as "1-3", or raise '
                "media.limit_mm_per_prompt.image in the server's profile.",
                param="messages",
            )
        count = sum(1 for _ in _videos(request))
        if count > self.max_videos:
            raise TooManyItems(
                f"messages hold {count} videos; at most {self.max_videos} per request: send fewer, "
                "or raise media.limit_mm_per_prompt.video in the server's profile.",
                param="messages",
            )

    def inspect(self, data: bytes, param: str) -> None:
        """See that a file is something that this server can show; may take seconds.

        Raises:
            RequestError: it is not.
        """
        kind = file_kind(data)
        if kind == "PDF":
            self._draw(data, "1", FACTOR**2, param)
        elif kind in VIDEO_KINDS and self.max_videos > 0:
            self.loader.inspect_video(data, param)
        else:
            self.loader.inspect(data, param)

    async def _told_apart(
        self, part: ImagePart, param: str, account: Account
    ) -> Sequence[ImagePart | VideoPart]:
        data = await self.loader.read(part.image_url.address, param, account)
        kind = file_kind(data)
        if kind != "PDF":
            account.give_back(len(data))  # the loader reads it anew
            if part.pages is not None:
                raise InvalidValue(f"{param} is no PDF; leave pages out.", param=param)
            is_video = part.key == "file" and kind in VIDEO_KINDS and self.max_videos > 0
            return [VideoPart.of_file(part) if is_video else part]
        pages = await self._drawn(data, part.pages, param)
        await self.loader.hold(sum(map(len, pages)), account)
        account.give_back(len(data))
        return part.showing(pages)

    async def _drawn(self, data: bytes, pages: str | None, param: str) -> list[bytes]:
        """Draw pages, or return those that were drawn before."""
        most = self.loader.bounds.limits.max_pixels
        key = f"{blake3(data).hexdigest()} {pages} {most}"
        if (drawn := self.drawn.get(key)) is None:
            loop = asyncio.get_running_loop()
            drawn = await loop.run_in_executor(self._pool, self._draw, data, pages, most, param)
            self.drawn.put(key, drawn, sum(map(len, drawn)))
        return drawn

    def _draw(self, data: bytes, pages: str | None, max_pixels: int, param: str) -> list[bytes]:
        if self.max_pages == 0:
            raise InvalidImage(
                f"{param} holds a PDF, which this server does not take (media.max_pdf_pages is 0 "
                "in its profile); send the pages as pictures.",
                param=param,
            )
        return draw_pages(data, pages, max_pages=self.max_pages, max_pixels=max_pixels, param=param)


def _pictures(request: ChatRequest) -> Iterator[tuple[int, int, ImagePart]]:
    """Yield each picture with the places of its message and of its part."""
    for m, message in enumerate(request.messages):
        if not isinstance(message.content, str):
            for p, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield m, p, part


def _videos(request: ChatRequest) -> Iterator[VideoPart | FramesPart]:
    for message in request.messages:
        if not isinstance(message.content, str):
            yield from (one for one in message.content if isinstance(one, VideoPart | FramesPart))


def _needs_a_look(part: ImagePart) -> bool:
    address = part.image_url.address
    return (
        part.pages is not None
        or part.key == "file"
        or address[:20].lower() == "data:application/pdf"
        or address[-4:].lower() == ".pdf"
    )
