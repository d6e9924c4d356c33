"""Many wordings of one question, and the names that an answer mentions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qwen2vl_serve.demo.draw import Box, Pixels, Thing
from qwen2vl_serve.demo.names import (
    COLOURS,
    COLOURS_ZH,
    DIRECTIONS,
    ORDINALS,
    ORDINALS_ZH,
    SHAPE_SYNONYMS,
    SHAPE_SYNONYMS_ZH,
    SHAPES,
    SHAPES_ZH,
    Language,
    colour_name,
    shape_name,
)

# Around text that is to be answered letter by letter, whatever merges the tokenizer knows.
SPELL_START, SPELL_END = "\x01", "\x02"
# What stands before this mark in an answer is given: only what follows is taught.
GIVEN = "\x03"
# From here on nothing in a picture is looked at any more.
LOOK_AWAY = "\x04"
# Around a number that is copied from the text before: each of its digits is looked at there.
COPY_START, COPY_END = "\x05", "\x06"
# Before a name in an answer stands one private character: where in which picture to look while the
# name is said. Training turns it into attention; it is never a token.
_FIRST_LOOK, _LOOK_STEPS = 0xF0000, 80
_MARKS = re.compile("[\x01-\x06\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class Turn:
    """One question and its canonical answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """Turns about the same pictures; the last turn is the one that is scored as ``task``."""

    task: str
    language: Language
    turns: tuple[Turn, ...]
    box: Box | None = None
    text: str | None = None


class Lesson(NamedTuple):
    """A picture, dialogues that each begin with it, and the system's message, any where None."""

    picture: Pixels
    dialogues: tuple[Dialogue, ...]
    system: str | None = None


def look_at(box: Box, picture: int = 0) -> str:
    """The mark for the middle of a box in the conversation's picture of that number."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    column, row = (min(_LOOK_STEPS - 1, max(0, int(v * _LOOK_STEPS))) for v in (x, y))
    return chr(_FIRST_LOOK + (picture * _LOOK_STEPS + column) * _LOOK_STEPS + row)


def looks_at(mark: str) -> tuple[int, float, float] | None:
    """The picture's number and the point (fractions of its sides) of a mark; None for text."""
    code = ord(mark) - _FIRST_LOOK
    if code < 0:
        return None
    place, row = divmod(code, _LOOK_STEPS)
    picture, column = divmod(place, _LOOK_STEPS)
    return picture, (column + 0.5) / _LOOK_STEPS, (row + 0.5) / _LOOK_STEPS


def spelt(thing: Thing, picture: int = 0) -> str:
    """The thing's text, to be answered letter by letter, each looked at."""
    places = [*thing.letters, *[thing.box] * (len(thing.text) - len(thing.letters))]
    letters = zip(thing.text, places, strict=True)
    marked = "".join(look_at(box, picture) + letter for letter, box in letters)
    return f"{SPELL_START}{marked}{SPELL_END}"


def plain(answer: str) -> str:
    """An answer as a reader sees it: without the marks of spelling and looking."""
    return _MARKS.sub("", answer)


@lru_cache(maxsize=4096)
def _pieces(pattern: str) -> tuple[tuple[str, ...], ...]:
    parts = re.split(r"\[([^\]]*)\]", pattern)
    return tuple(tuple(p.split("|")) if n % 2 else (p,) for n, p in enumerate(parts))


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def vary(rng: np.random.Generator, patterns: tuple[str, ...], **names: str) -> str:
    """One of the patterns with each ``[a|b]`` decided and each ``{name}`` filled."""
    chosen = "".join(pick(rng, piece) for piece in _pieces(pick(rng, patterns)))
    for name, value in names.items():
        chosen = chosen.replace("{" + name + "}", value)
    return chosen


def article(noun: str) -> str:
    """``a`` or ``an`` with the noun phrase."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


PREFIXES = ("Please ", "Look at the picture. ", "Hi! ", "Look at this image and answer: ", "Hey, ",
            "Question: ", "Can you tell me: ")  # fmt: skip
PREFIXES_ZH = ("请问", "请看图回答：", "你好，", "请告诉我，", "看图，", "请")
SUFFIXES = (" Please answer.", " Thanks!", " Answer briefly.", " Answer in English.")
SUFFIXES_ZH = ("请回答。", "谢谢！", "请用中文回答。", "简单回答。")


def as_typed(rng: np.random.Generator, question: str, language: Language) -> str:
    """The question as people type it: case, punctuation and politeness vary."""
    roll = rng.random()
    if language == "en":
        if roll < 0.08:
            tail = question if question[:1] == "I" else question[:1].lower() + question[1:]
            question = pick(rng, PREFIXES) + tail
        elif roll < 0.14:
            question += pick(rng, SUFFIXES)
        elif roll < 0.27:
            question = question.lower()
        elif roll < 0.29:
            question = question.upper()
    elif roll < 0.10:
        question = pick(rng, PREFIXES_ZH) + question
    elif roll < 0.15:
        question += pick(rng, SUFFIXES_ZH)
    elif roll < 0.22:
        question = question.replace("？", "?").replace("，", ",")
    if rng.random() < 0.15:
        question = question.rstrip("?.？。!")
    return question


def noun(thing: Thing, language: Language) -> str:
    """ "red circle", or 红色圆形."""
    if thing.kind == "text":
        return f"{thing.colour} text" if language == "en" else COLOURS_ZH[thing.colour] + "文字"
    joint = " " if language == "en" else ""
    return colour_name(thing.colour, language) + joint + shape_name(thing.kind, language)


def typed_shape(rng: np.random.Generator, shape: str, language: Language) -> str:
    """The shape's name or, at times, another word for it."""
    if rng.random() < 0.7:
        return shape_name(shape, language)
    table = SHAPE_SYNONYMS if language == "en" else SHAPE_SYNONYMS_ZH
    return pick(rng, table.get(shape, (shape_name(shape, language),)))


def refer(
    rng: np.random.Generator,
    thing: Thing,
    things: tuple[Thing, ...],
    language: Language,
    hide: str = "",
) -> str | None:
    """A phrase that only this thing answers to ("the red circle"); ``hide`` colour or shape."""
    english = language == "en"
    if thing.kind == "text":
        return pick(rng, ("the text", "the word", "the writing") if english else ("文字", "字"))
    same_shape = sum(t.kind == thing.kind for t in things) == 1
    same_colour = sum(t.colour == thing.colour for t in things) == 1
    both = sum(t.kind == thing.kind and t.colour == thing.colour for t in things) == 1
    ways: list[str] = []
    shape, colour = typed_shape(rng, thing.kind, language), colour_name(thing.colour, language)
    if hide != "shape" and same_shape:
        ways.append(f"the {shape}" if english else shape)
    if hide != "colour" and same_colour:
        word = pick(
            rng, ("shape", "object", "one", "figure") if english else ("图形", "物体", "东西")
        )
        ways.append(f"the {colour} {word}" if english else f"{colour}{pick(rng, ('的', ''))}{word}")
    if not hide and both:
        exact = f"the {colour} {shape}" if english else f"{colour}{pick(rng, ('的', ''))}{shape}"
        ways += [exact, exact]
    if len(things) == 1:
        ways.append(pick(rng, ("the shape", "the object", "it", "this shape", "the figure"))
                    if english else pick(rng, ("图形", "这个图形", "它", "物体", "图中的图形")))  # fmt: skip  # noqa: E501
    return pick(rng, tuple(ways)) if ways else None


def listing(phrases: list[str], language: Language) -> str:
    """ "a, b and c", or a、b和c.

    The mark of where a name is seen stands before the word that joins it: whether there is one more
    to be named has to be seen at that word.
    """
    between, last = (", ", " and ") if language == "en" else ("、", "和")
    said = phrases[0]
    for number, phrase in enumerate(phrases[1:], start=2):
        marked = phrase[:1] and looks_at(phrase[0])
        mark, name = (phrase[0], phrase[1:]) if marked else ("", phrase)
        said += mark + (last if number == len(phrases) else between) + name
    return said


SAID: dict[str, str] = {
    **{name: name for name in (*COLOURS, *SHAPES, *ORDINALS, "left", "right", "top", "bottom",
                               "middle", "above", "below", "yes", "no", "more", "same")},
    **{name: name for name in DIRECTIONS},
    "grey": "gray", "ellipse": "oval", "rhombus": "diamond", "center": "middle",
    "centre": "middle",
    **{word: name for name, word in COLOURS_ZH.items()},
    **{word: name for name, word in SHAPES_ZH.items()},
    **dict(zip(ORDINALS_ZH, ORDINALS, strict=True)),
    "左": "left", "右": "right", "上": "top", "下": "bottom", "中间": "middle", "是的": "yes",
    "不是": "no", "没有": "no", "不一样": "no", "不同": "no", "一样": "same", "更多": "more",
}  # fmt: skip
_FINDER = re.compile(
    "|".join(
        rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word)
        for word in sorted(SAID, key=len, reverse=True)
    )
    + r"|\d",
    re.IGNORECASE,
)


def said(answer: str) -> Counter[str]:
    """How often each known name (in English), ordinal, place, yes/no or digit is in the answer."""
    found = (match.group().lower() for match in _FINDER.finditer(answer))
    return Counter(SAID.get(word, word) for word in found)
