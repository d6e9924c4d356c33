"""PDFs: their pages are pictures, and whatever is wrong with one stays with it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys
from typing import Any

import pytest
from PIL import Image

from qwen2vl_serve.errors import InvalidImage, InvalidValue, RequestError, TooManyItems
from qwen2vl_serve.media import pdf
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.loader import MediaLoader, Picture
from qwen2vl_serve.media.pdf import draw_pages
from qwen2vl_serve.protocol import ChatRequest
from qwen2vl_serve.validation import RequestLimits, parse_chat
from tests.media.test_loader import BOUNDS, data_url, part

pytest.importorskip("pypdfium2")

COLOURS = ["red", "lime", "blue", "black"]
LIMITS = RequestLimits(max_messages=99, max_n=1, max_tokens=None, images=99, videos=0)


def document(*colours: str, size: tuple[int, int] = (300, 200)) -> bytes:
    """A PDF with one page a colour."""
    pages = [Image.new("RGB", size, one) for one in colours]
    data = io.BytesIO()
    pages[0].save(data, "PDF", save_all=True, append_images=pages[1:])
    return data.getvalue()


PDF = document(*COLOURS)


def pdf_url(data: bytes) -> str:
    return "data:application/pdf;base64," + base64.b64encode(data).decode()


def drawn(data: bytes, pages: str | None, most: int = 9, pixels: int = 60_000) -> list[Image.Image]:
    found = draw_pages(data, pages, max_pages=most, max_pixels=pixels, param="p")
    return [Image.open(io.BytesIO(one)) for one in found]


def colour(pixel: Any) -> str:
    """Name a pixel, which JPEG has moved a little."""
    named = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (0, 0, 0): "black"}
    return named[tuple(255 * (one > 127) for one in pixel)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("pages", "shown"),
    [(None, COLOURS), ("1", ["red"]), ("2-3", ["lime", "blue"]), ("3-", ["blue", "black"])],
)
def test_pages_are_drawn_in_their_order(pages: str | None, shown: list[str]) -> None:
    """One, a range, from one to the end, or all; at about the size asked for."""
    pictures = drawn(PDF, pages)
    assert [colour(one.getpixel((20, 20))) for one in pictures] == shown
    for one in pictures:
        assert abs(one.width / one.height - 1.5) < 0.01
        assert 58_000 < one.width * one.height < 62_000


@pytest.mark.parametrize("pages", ["5", "4-5", "3-2", "5-", "99999"])
def test_pages_that_are_not_there_are_refused(pages: str) -> None:
    """The error names what was asked for and how many there are."""
    with pytest.raises(InvalidValue) as caught:
        drawn(PDF, pages)
    assert repr(pages) in caught.value.message
    assert "4 pages" in caught.value.message


def test_more_pages_than_the_cap_are_refused() -> None:
    """By the pages that are asked for, not by those that the document has."""
    assert len(drawn(PDF, "2-3", most=2)) == 2
    with pytest.raises(TooManyItems) as caught:
        drawn(PDF, None, most=3)
    assert "4 pages" in caught.value.message
    assert "at most 3" in caught.value.message


def test_a_huge_page_costs_no_more_than_a_small_one() -> None:
    """The size of the drawing is the server's choice; a sliver of a page is still drawn."""
    for size in ((9000, 9000), (9000, 10), (10, 9000)):
        (one,) = drawn(document("red", size=size), None)
        assert one.width * one.height < 80_000


@pytest.mark.parametrize(
    "data", [b"%PDF-", b"%PDF-1.7\nhello", PDF[: len(PDF) // 3], b"%PDF-1.7\n" + bytes(5000)]
)
def test_what_cannot_be_drawn_is_an_invalid_image(data: bytes) -> None:
    """None of the library's words, and no half document."""
    with pytest.raises(InvalidImage, match="cannot be drawn"):
        drawn(data, None)


def test_a_locked_document_is_told_as_such() -> None:
    """A password cannot be given."""
    locked = PDF.replace(
        b"trailer\n<<",
        b"trailer\n<</Encrypt <</Filter /Standard /V 1 /R 2 /P -1 /O <%b> /U <%b>>> /ID [<00> <00>]"
        % (b"11" * 32, b"22" * 32),
    )
    assert locked != PDF
    with pytest.raises(InvalidImage, match="locked with a password"):
        drawn(locked, None)


def test_a_document_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is ended, and the document refused like a damaged one."""
    monkeypatch.setattr(pdf, "SECONDS", 0.001)
    with pytest.raises(InvalidImage, match="cannot be drawn"):
        drawn(PDF, None)


def test_without_the_extra_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot draw PDFs names what it lacks."""
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    monkeypatch.setattr(pdf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidImage, match="lacks the extra pdf"):
        drawn(PDF, None)


def test_a_mutated_document_gives_pages_or_a_clear_error() -> None:
    """Random bytes changed: pictures, or one of our errors; never a crash of this process."""
    dice = random.Random(1)
    for _ in range(12):
        data = bytearray(PDF)
        for _ in range(30):
            data[dice.randrange(8, len(data))] = dice.randrange(256)
        try:
            assert all(one.width for one in drawn(bytes(data), "1-2"))
        except RequestError as error:
            assert error.code in ("invalid_image", "invalid_value")


class Loading:
    """A loader that draws PDFs, as the application uses it."""

    def __init__(self, max_pdf_pages: int = 8, files: FileStore | None = None) -> None:
        self.loader = MediaLoader(
            Fetcher(FetchPolicy()), BOUNDS, 10**8, files=files, max_pdf_pages=max_pdf_pages
        )

    def load(self, *parts: dict[str, Any], most: int = 9) -> tuple[ChatRequest, list[Picture]]:
        async def load() -> tuple[ChatRequest, list[Picture]]:
            chat = await self.loader.with_pages(request, most)
            return chat, list(await self.loader.load(chat))

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
    Loading().load(part(data_url("red")), part(pdf_url(PDF)), most=5)
    with pytest.raises(TooManyItems) as caught:
        Loading().load(part(data_url("red")), part(pdf_url(PDF)), most=4)
    assert "5 images" in caught.value.message


def test_errors_name_the_clients_places() -> None:
    """A document of four pages does not move what comes after it."""
    with pytest.raises(InvalidImage) as caught:
        Loading().load(part(pdf_url(PDF)), TEXT, part("data:;base64,AAAA"))
    assert caught.value.param == "messages[0].content[2].image_url"


def test_pages_of_a_picture_are_refused() -> None:
    """Not ignored: the client took it for something else."""
    with pytest.raises(InvalidValue, match="no PDF"):
        Loading().load(part(data_url("red"), pages="1"))


def test_a_pdf_that_is_not_drawn_is_named() -> None:
    """Switched off: what is taken instead; sent as an ordinary picture: what to say."""
    with pytest.raises(InvalidImage, match="holds PDF data; this server takes JPEG"):
        Loading(max_pdf_pages=0).load(part(pdf_url(PDF)))
    disguised = "data:image/png;base64," + pdf_url(PDF).partition(",")[2]
    with pytest.raises(InvalidImage, match="holds a PDF; say which pages"):
        Loading().load(part(disguised))


def test_a_pdf_can_be_uploaded(tmp_path: Any) -> None:
    """It is drawn once to see that it can be, and shown by its id like a picture."""
    store = FileStore(tmp_path, max_files=9, max_bytes=10**6, ttl_seconds=99)
    loading = Loading(files=store)
    loading.loader.inspect_upload(PDF, "file")
    for data in (b"%PDF-1.7", b"hello"):
        with pytest.raises(InvalidImage):
            loading.loader.inspect_upload(data, "file")
    with pytest.raises(InvalidImage):
        Loading(max_pdf_pages=0).loader.inspect_upload(PDF, "file")
    file = store.add(PDF, "a.pdf", "user_data")
    _, pictures = loading.load({"type": "file", "file": {"file_id": file.id}})
    assert len(pictures) == 4
    store.close()
