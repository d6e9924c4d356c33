"""What the adapter ``clerk`` is taught: true, and in the form that the client's functions read."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from qwen2vl_client import Answer
from qwen2vl_client.tasks import extract_table, moderate, solve, to_html, translate
from qwen2vl_client.tasks.moderate import CATEGORIES, VERDICTS

from qwen2vl_serve.demo import clerk
from qwen2vl_serve.demo.draw import Thing
from qwen2vl_serve.demo.names import SHADES, WORDS, Language
from qwen2vl_serve.demo.wording import plain

LANGUAGES: tuple[Language, ...] = ("en", "zh")
PICTURE = b"\xff\xd8\xff\xe0 a picture"


class Told:
    """A client that gives one answer and keeps what it was asked."""

    def __init__(self, answer: str) -> None:
        choice = {"message": {"content": plain(answer)}, "finish_reason": "stop"}
        self.answer = Answer.from_raw({"choices": [choice]}, None, 0.1)
        self.question: Any = None

    def chat(self, text: str, **fields: Any) -> Answer:
        self.question = text
        return self.answer


def text(of: str, colour: str = "red") -> Thing:
    """A printed text, a letter a tenth of the picture wide."""
    boxes = tuple((n / 10, 0.4, (n + 1) / 10, 0.6) for n in range(len(of)))
    return Thing("text", colour, (0.0, 0.4, len(of) / 10, 0.6), of, boxes)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sign_is_translated_as_the_client_asks(language: Language) -> None:
    """Into Chinese from the dictionary; into English it stays as it is, in its own case."""
    into = {"en": ("Chinese", "English"), "zh": ("中文", "英文")}[language]
    for into_language, use, expected in zip(
        into, (clerk.translation, clerk.copied), ("蓝色", "Blue"), strict=True
    ):
        question, answer = use(text("Blue"), language)
        client = Told(answer)
        reply = translate(client, PICTURE, into_language, prompts=language)
        assert reply.text == expected
        assert client.question == question


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_table_and_a_product_are_read(language: Language) -> None:
    """Six cells by rows; the step before the result."""
    words = ("item", "cost", "TEA", "12", "CUP", "7")
    question, answer = clerk.table([text(word) for word in words], language)
    client = Told(answer)
    found = extract_table(client, PICTURE, prompts=language)
    assert (found.columns, found.rows) == (words[:2], (words[2:4], words[4:]))
    assert client.question == question
    question, answer = clerk.product(text("6x5"), 6, 5, language)
    client = Told(answer)
    solution = solve(client, PICTURE, prompts=language)
    assert (solution.steps, solution.answer) == (("6 x 5 is 30",), "30")
    assert client.question == question


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_is_written(language: Language) -> None:
    """A document with the heading, a banner of its colour, and a button with its label."""
    banner = Thing("rectangle", "green", (0.1, 0.4, 0.9, 0.6))
    question, answer = clerk.page(text("SHOP", "black"), banner, text("Open", "black"), language)
    client = Told(answer)
    assert to_html(client, PICTURE, prompts=language).html == (
        '<html><body><h1>SHOP</h1><div style="background: green; height: 3em"></div>'
        "<button>Open</button></body></html>"
    )
    assert client.question == question


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("word", ["Knife", "SALE", "tea", "12345"])
def test_a_text_is_judged(word: str, language: Language) -> None:
    """What is refused has its category and a reason that names it; all else neither."""
    question, answer = clerk.judgement(text(word), language)
    client = Told(answer)
    found = moderate(client, PICTURE, prompts=language)
    expected = {"Knife": ("weapons", "block"), "SALE": ("advertising", "review")}.get(word)
    assert client.question == question
    if expected:
        assert (found.categories, found.verdict) == ((expected[0],), expected[1])
        assert word in found.reasons[0]
    else:
        assert (found.categories, found.verdict, found.reasons) == ((), "allow", ())


def test_words_can_be_printed_and_categories_are_the_clients() -> None:
    """At most five letters, for more are never drawn; no word is both translated and refused."""
    words = {*clerk.TRANSLATIONS, *clerk.REFUSED, *clerk.HEADINGS, *clerk.SHORT, *clerk.PAGE_WORDS}
    assert all(re.fullmatch("[a-z]{2,5}", word) for word in words)
    assert not clerk.TRANSLATIONS.keys() & clerk.REFUSED.keys()
    assert set(clerk.TRANSLATIONS) <= set(WORDS)
    for category, verdict in clerk.REFUSED.values():
        assert category in CATEGORIES
        assert verdict in VERDICTS


def test_a_lesson_is_its_seeds() -> None:
    """The same seeds give the same picture and dialogues; others give others."""

    def taught(seed: int) -> tuple[bytes, tuple[Any, ...]]:
        picture, dialogues, _ = clerk.lesson(np.random.default_rng(seed), seed)
        return picture.tobytes(), dialogues

    assert taught(3) == taught(3)
    assert taught(3)[0] != taught(4)[0]


def test_every_use_is_taught_in_both_languages() -> None:
    """Within a hundred lessons, of at most two questions each."""
    rng = np.random.default_rng(0)
    asked: set[str] = set()
    for seed in range(100):
        _, dialogues, _ = clerk.lesson(rng, seed)
        assert 1 <= len(dialogues) <= clerk.MOST_ASKED
        asked.update(dialogue.turns[0].question for dialogue in dialogues)
    assert len(asked) == 12  # five uses, and a sign's two directions, in two languages


def test_a_table_is_ruled_and_its_cells_hold_ink() -> None:
    """Each text stands within its own cell of the picture, and there is something dark in it."""
    texts = [["item", "cost"], ["TEA", "12"], ["CUP", "7"]]
    for seed in range(20):
        picture, cells = clerk.draw_table(texts, np.random.default_rng(seed))
        height, width = picture.shape[:2]
        assert [cell.text for cell in cells] == [word for row in texts for word in row]
        for number, cell in enumerate(cells):
            row, column = divmod(number, 2)
            assert column / 2 < cell.centre[0] < (column + 1) / 2
            assert row / 3 < cell.centre[1] < (row + 1) / 3
            x1, y1, x2, y2 = cell.box
            part = picture[int(y1 * height) : int(y2 * height), int(x1 * width) : int(x2 * width)]
            assert int(part.max()) - int(part.min()) > 60
            assert len(cell.letters) == len(cell.text)


def test_a_page_has_its_words_and_its_banner_the_shade_of_its_name() -> None:
    """Heading, banner and button from top to bottom; ink in both words; the banner is plain."""
    for seed in range(20):
        picture, things = clerk.draw_page("Shop", "OPEN", np.random.default_rng(seed))
        height, width = picture.shape[:2]
        heading, banner, button = things
        assert (heading.text, banner.kind, button.text) == ("Shop", "rectangle", "OPEN")
        assert heading.box[3] <= banner.box[1] < banner.box[3] < button.box[1] < button.box[3] < 1
        parts = [
            picture[int(y1 * height) : int(y2 * height), int(x1 * width) : int(x2 * width)]
            for x1, y1, x2, y2 in (thing.box for thing in things)
        ]
        for thing, part in ((heading, parts[0]), (button, parts[2])):
            assert int(part.max()) - int(part.min()) > 60
            assert len(thing.letters) == len(thing.text)
        shade = np.median(parts[1].reshape(-1, 3), axis=0)
        nearest = min(abs(shade - np.array(known)).max() for known in SHADES[banner.colour])
        assert nearest < 60
