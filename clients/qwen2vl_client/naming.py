"""Which pictures a text names: "picture 3", "the third photo", 第3张图, 图三, "the last image"."""

from __future__ import annotations

import re
from collections.abc import Iterator

_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_WORDS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10,
}  # fmt: skip
_NUMERALS = {numeral: number for number, numeral in enumerate("一二三四五六七八九", 1)}

_DIGITS = r"\d{1,4}(?!\d)"
# Up to 99; 十分 means "very", 一样 "the same", 一起 "together" and so on.
_CHINESE = (
    r"(?!一[样起共直般些点下定切边致])"
    r"(?:[一二三四五六七八九]?十(?!分)[一二三四五六七八九]?|[一二三四五六七八九])"
    r"(?![一二三四五六七八九十])"
)
_NUMBER = re.compile(rf"{_DIGITS}|{'|'.join((*_ORDINALS, *_WORDS))}|{_CHINESE}")
_WIDEST = 99
"""So many pictures a range names at most; ``1-9999`` is something else."""
_RANGE = re.compile(r"\bto\b|[-–~～到至]")


def _listed(number: str, joint: str) -> str:
    """Return the pattern of numbers, one or several with something between them."""
    return rf"(?P<listed>{number}(?:\s*(?:{joint})\s*{number})*)"


_PICTURE = r"(?:pictures?|images?|photos?|figures?)"
_PICTURE_ZH = r"(?:图片|图像|照片|图)"
_AND = r",\s*and\b|,|&|and\b|or\b|to\b|-|–"
_AND_ZH = r"、|,|，|以及|和|与|及|跟|到|至|-|–|~|～"
_CARDINAL = rf"(?:(?:no\.?|number|#)\s*)?(?:{_DIGITS}|\b(?:{'|'.join(_WORDS)})\b)"
_ORDINAL = rf"(?:the\s+)?(?:{'|'.join(_ORDINALS)}|\d{{1,4}}(?:st|nd|rd|th))\b"
_NUMBER_ZH = rf"(?:{_DIGITS}|{_CHINESE})"
# 图片三张 and 图片3张 are three pictures, not the third.
_CARDINAL_ZH = rf"{_NUMBER_ZH}(?!\s*[张幅个])"
_ORDINAL_ZH = rf"(?:第\s*)?{_NUMBER_ZH}(?:\s*[张幅个])?"
# A list in front of no picture is matched as well, with no ``picture``: a pattern that failed there
# would be tried again from each of its members, which takes minutes for a long text.
_NAMED = (
    re.compile(rf"\b(?P<picture>{_PICTURE})\s*{_listed(_CARDINAL, _AND)}"),
    re.compile(rf"\b{_listed(_ORDINAL, _AND)}(?P<picture>\s+{_PICTURE}\b)?"),
    re.compile(rf"(?P<picture>{_PICTURE_ZH})\s*{_listed(_CARDINAL_ZH, _AND_ZH)}"),
    re.compile(rf"(?=第){_listed(_ORDINAL_ZH, _AND_ZH)}(?P<picture>\s*{_PICTURE_ZH})?"),
)
_LAST = re.compile(
    r"\b(?:last|latest|previous)\s+(?:picture|image|photo|figure)\b"
    rf"|(?:上一?|最后[一那]|(?:刚才|刚刚)的?那一?)\s*[张幅]\s*{_PICTURE_ZH}"
)


def named_pictures(text: str, last: int = 0) -> Iterator[int]:
    """Yield the numbers of the pictures that a text names, one by one, in lists or in ranges.

    ``last`` is the number of the last picture that was shown before the text was said (0: none).
    """
    lowered = text.lower()
    if last and _LAST.search(lowered):
        yield last
    for pattern in _NAMED:
        for found in pattern.finditer(lowered):
            if found["picture"]:
                yield from _numbers(found["listed"])


def _numbers(listed: str) -> Iterator[int]:
    last, end = 0, 0
    for found in _NUMBER.finditer(listed):
        number = _value(found[0])
        if end and _RANGE.search(listed, end, found.start()):
            yield from range(last + 1, min(number, last + _WIDEST))
        yield number
        last, end = number, found.end()


def _value(word: str) -> int:
    if word.isdigit():
        return int(word)
    if word.isalpha() and word.isascii():
        return _ORDINALS.get(word) or _WORDS[word]
    tens, ten, ones = word.rpartition("十")
    return 10 * _NUMERALS.get(tens, bool(ten)) + _NUMERALS.get(ones, 0)
