"""Drawing a PDF: its pages in order, and whatever is wrong with one stays with it."""

from __future__ import annotations

import io
import random
import sys
from typing import Any

import pytest
from PIL import Image

from qwen2vl_serve.errors import InvalidImage, InvalidValue, RequestError, TooManyItems
from qwen2vl_serve.media import pdf
from qwen2vl_serve.media.pdf import draw_pages

pytest.importorskip("pypdfium2")

COLOURS = ["red", "lime", "blue", "black"]


def document(*colours: str, size: tuple[int, int] = (300, 200)) -> bytes:
    """A PDF with one page a colour."""
    pages = [Image.new("RGB", size, one) for one in colours]
    data = io.BytesIO()
    pages[0].save(data, "PDF", save_all=True, append_images=pages[1:])
    return data.getvalue()


PDF = document(*COLOURS)


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
            assert 1 <= len(drawn(bytes(data), "1-2")) <= 2
        except RequestError as error:
            assert error.code in ("invalid_image", "invalid_value")
