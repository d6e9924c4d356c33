"""The PDFs of a request: each becomes its pages, pictures of their own from there on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from qwen2vl_serve.errors import InvalidImage, InvalidValue, TooManyItems
from qwen2vl_serve.media.image import file_kind
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.media.pdf import draw_pages
from qwen2vl_serve.protocol import ChatRequest, ImagePart
from qwen2vl_serve.vision import FACTOR

PROCESSES = 2
"""How many documents are drawn at a time."""


class Documents:
    """Draws PDFs: ``max_pages`` of one at most (0: none is taken), ``max_pictures`` a request."""

    def __init__(self, loader: MediaLoader, max_pages: int, max_pictures: int) -> None:
        self.loader = loader
        self.max_pages = max_pages
        self.max_pictures = max_pictures
        self._pool = ThreadPoolExecutor(PROCESSES, thread_name_prefix="pdf")

    async def with_pages(self, request: ChatRequest) -> ChatRequest:
        """Return ``request`` with a part for each page of its PDFs.

        Looked at is what may be one: a part with ``pages``, a ``file``, a ``data:`` URL of that
        type, an address that ends in ``.pdf``.

        Raises:
            RequestError: a PDF cannot be read or drawn, or its pages are too many.
        """
        found = [(m, p, part) for m, p, part in _pictures(request) if _may_be_pdf(part)]
        if not found:
            return request
        messages = list(request.messages)
        for m, p, part in reversed(found):  # from the end, so that places stay what they are
            content = [*messages[m].content]
            content[p : p + 1] = await self._pages(part, f"messages[{m}].content[{p}].{part.key}")
            messages[m] = messages[m].model_copy(update={"content": content})
        expanded = request.model_copy(update={"messages": messages})
        count = sum(1 for _ in _pictures(expanded))
        if count > self.max_pictures:
            raise TooManyItems(
                f"messages hold {count} images, each page of a PDF counted as one; at most "
                f'{self.max_pictures} per request: name fewer pages, as "1-3", or raise '
                "media.limit_mm_per_prompt.image in the server's profile.",
                param="messages",
            )
        return expanded

    def inspect(self, data: bytes, param: str) -> None:
        """See that a file is a picture or a PDF that this server can show; may take seconds.

        Raises:
            RequestError: it is not.
        """
        if file_kind(data) == "PDF":
            self._draw(data, "1", FACTOR**2, param)
        else:
            self.loader.inspect(data, param)

    async def _pages(self, part: ImagePart, param: str) -> list[ImagePart]:
        data = await self.loader.read(part.image_url.address, param)
        if file_kind(data) != "PDF":
            if part.pages is not None:
                raise InvalidValue(f"{param} is no PDF; leave pages out.", param=param)
            return [part]
        most = self.loader.bounds.limits.max_pixels
        loop = asyncio.get_running_loop()
        pages = await loop.run_in_executor(self._pool, self._draw, data, part.pages, most, param)
        return part.showing(pages)

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


def _may_be_pdf(part: ImagePart) -> bool:
    address = part.image_url.address
    return (
        part.pages is not None
        or part.key == "file"
        or address[:20].lower() == "data:application/pdf"
        or address[-4:].lower() == ".pdf"
    )
