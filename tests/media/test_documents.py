"""PDFs in a request: each page a picture, in its place, counted like the others."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from qwen2vl_serve.errors import InvalidImage, InvalidValue, TooManyItems
from qwen2vl_serve.media.documents import Documents
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from tests.media.movies import movie
from tests.media.test_loader import BOUNDS, data_url, part
from tests.media.test_pdf import PDF, colour

LIMITS = RequestLimits(max_messages=99, max_n=1, max_tokens=None, images=99, videos=0)


def pdf_url(data: bytes) -> str:
    return "data:application/pdf;base64," + base64.b64encode(data).decode()


class Loading:
    """A loader that draws PDFs, as the application uses it."""

    def __init__(
        self,
        max_pages: int = 8,
        max_pictures: int = 9,
        files: FileStore | None = None,
        max_videos: int = 1,
    ) -> None:
        self.loader = MediaLoader(Fetcher(FetchPolicy()), BOUNDS, 10**8, files=files)
        self.documents = Documents(self.loader, max_pages, max_pictures, max_videos)

    def load(self, *parts: dict[str, Any]) -> tuple[ChatRequest, list[Picture]]:
        async def load() -> tuple[ChatRequest, list[Picture]]:
            async with self.loader.ledger.account() as account:
                chat = await self.documents.with_pages(request, account)
                pictures = await self.loader.fetch(chat, account)
                await self.loader.ready(pictures)
                return chat, list(pictures)

        body = {"messages": [{"role": "user", "content": list(parts)}]}
        request = parse_chat(json.dumps(body).encode(), LIMITS)
        return asyncio.run(load())


TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    "shown",
    [
        part(pdf_url(PDF), pages="2-3"),
        part("data:;base64," + pdf_url(PDF).partition(",")[2], pages="2-3"),
        {"type": "input_image", "image_url": pdf_url(PDF), "pages": "2-3"},
        {"type": "file", "file": {"file_data": pdf_url(PDF), "filename": "a.pdf"}, "pages": "2-3"},
    ],
    ids=["image_url", "by its bytes", "input_image", "file"],
)
def test_each_page_is_a_picture_of_the_request(shown: dict[str, Any]) -> None:
    """In the place of the document, in order, with a part for each that an engine will count."""
    chat, pictures = Loading().load(part(data_url("red")), TEXT, shown, TEXT)
    kinds = [one.type for one in chat.messages[0].content]  # type: ignore[union-attr]
    assert kinds == ["image_url", "text", "image_url", "image_url", "text"]
    assert [colour(one.pixels()[100, 100]) for one in pictures] == ["red", "lime", "blue"]
    assert len({one.key for one in pictures}) == 3


def test_sizes_hold_for_each_page() -> None:
    """Fields beside the document bound each of its pages."""
    _, pictures = Loading().load(part(pdf_url(PDF), max_pixels=20_000))
    assert len(pictures) == 4
    assert all(one.sizing.height * one.sizing.width <= 20_000 for one in pictures)


def test_pages_count_as_pictures() -> None:
    """Together with the others of the request, against the same limit."""
    Loading(max_pictures=5).load(part(data_url("red")), part(pdf_url(PDF)))
    with pytest.raises(TooManyItems) as caught:
        Loading(max_pictures=4).load(part(data_url("red")), part(pdf_url(PDF)))
    assert "5 images" in caught.value.message


def test_errors_name_the_clients_places() -> None:
    """A document of four pages does not move what comes after it."""
    with pytest.raises(InvalidImage) as caught:
        Loading().load(part(pdf_url(PDF)), TEXT, part("data:;base64,AAAA"))
    assert caught.value.param == "messages[0].content[2].image_url"


def test_what_a_video_url_or_a_reader_takes_is_known_as_a_file() -> None:
    """A QuickTime that begins with another box than ``ftyp``, a PDF behind a blank line."""
    mov = movie(8)
    loading = Loading()
    loading.documents.inspect(mov[:4] + b"free" + mov[8:], "file")
    loading.documents.inspect(b"\r\n" + PDF, "file")
    file = {"file_data": "data:;base64," + base64.b64encode(b"\n" + PDF).decode()}
    _, pictures = loading.load({"type": "file", "file": file, "pages": "2"})
    assert [colour(one.pixels()[100, 100]) for one in pictures] == ["lime"]


def test_pages_of_a_picture_are_refused() -> None:
    """Not ignored: the client took it for something else."""
    with pytest.raises(InvalidValue, match="no PDF"):
        Loading().load(part(data_url("red"), pages="1"))


def test_a_pdf_that_is_not_drawn_is_named() -> None:
    """Switched off: by which field; sent as an ordinary picture: what to say."""
    with pytest.raises(InvalidImage, match="max_pdf_pages is 0"):
        Loading(max_pages=0).load(part(pdf_url(PDF)))
    disguised = "data:image/png;base64," + pdf_url(PDF).partition(",")[2]
    with pytest.raises(InvalidImage, match="Of a PDF say which pages"):
        Loading().load(part(disguised))


def test_a_pdf_can_be_uploaded(tmp_path: Any) -> None:
    """It is drawn once to see that it can be, and shown by its id like a picture."""
    store = FileStore(tmp_path, max_files=9, max_bytes=10**6, ttl_seconds=99)
    loading = Loading(files=store)
    loading.documents.inspect(PDF, "file")
    for data in (b"%PDF-1.7", b"hello"):
        with pytest.raises(InvalidImage):
            loading.documents.inspect(data, "file")
    with pytest.raises(InvalidImage):
        Loading(max_pages=0).documents.inspect(PDF, "file")
    file = store.add(PDF, "a.pdf", "user_data")
    _, pictures = loading.load({"type": "file", "file": {"file_id": file.id}})
    assert len(pictures) == 4
    store.close()
