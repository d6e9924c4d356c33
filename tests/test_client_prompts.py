"""Prompts are data: two languages of one shape, replaceable, checked when they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from qwen2vl_client import InvalidArgumentError
from qwen2vl_client.prompts import PLACES, Prompts, chosen, filled, prompt_names


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_prompt_ships_in_both_languages(language: str) -> None:
    """Each holds Chinese in ``zh`` and none in ``en``; no blanks stand around it."""
    prompts = Prompts.shipped(language)
    for name in prompt_names():
        text = getattr(prompts, name)
        assert text == text.strip()
        chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
        assert chinese == (language == "zh"), name


def test_a_file_replaces_what_it_names(tmp_path: Path) -> None:
    """The rest is that of the language it is based on; Chinese and a byte order mark are read."""
    path = tmp_path / "mine.toml"
    path.write_text('read = "抄下这张收据。"\n', "utf-8-sig")
    mine = Prompts.load(path, base="zh")
    assert mine == replace(Prompts.shipped("zh"), read="抄下这张收据。")
    assert chosen(mine) is mine
    assert chosen("en") == Prompts.shipped("en")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("read = 7", "'read' must be a text"),
        ('read = "  "', "'read' must be a text"),
        ('reed = "a"', "has a prompt 'reed'; known are read, translate"),
        ('locate = "Find it."', "'locate' must hold {what}"),
        ("read = ", "cannot read the prompts"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_of(tmp_path: Path, text: str, words: str) -> None:
    """Wrong type, empty text, unknown name, lost place or no TOML: the error says which."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=words):
        Prompts.load(path)


def test_an_unknown_language_and_a_missing_file() -> None:
    """Both are ``InvalidArgumentError``; that of a language names those that ship."""
    with pytest.raises(InvalidArgumentError, match="en and zh ship"):
        Prompts.shipped("fr")
    with pytest.raises(InvalidArgumentError, match="cannot read the prompts"):
        Prompts.load("no/such.toml")


def test_places_are_filled_once_and_other_braces_stay() -> None:
    """Braces within what is filled in stay too, so a caller's own text is never filled."""
    text = 'Find {what} as {"label": …} or {x}.'
    assert filled(text, what="a {what} {x}") == 'Find a {what} {x} as {"label": …} or {x}.'


def test_no_prompt_has_a_place_that_nobody_fills() -> None:
    """With its own places filled, no prompt that ships shows the model a brace."""
    for language in ("en", "zh"):
        for name in prompt_names():
            given = dict.fromkeys(PLACES.get(name, ()), "X")
            assert "{" not in filled(getattr(Prompts.shipped(language), name), **given), name
