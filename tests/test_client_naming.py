"""Which pictures a text names: by number and in words, in English and in Chinese."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2vl_client.naming import named_pictures

NAMINGS = [
    "what is in picture {number}?", "Image #{number}", "photo no. {number} again",
    "the {number}th picture", "图{number}里有什么", "图{chinese}里有什么", "第{number}张图片",
    "第{chinese}张图", "第 {chinese} 幅照片呢", "看图片 {number}。",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("what is in picture 3?", [3]),
        ("Images #2 and photo no. 12", [2, 12]),
        ("the third photo, then the 1st image", [3, 1]),
        ("图片3 和 第二张图，还有第 10 幅照片", [3, 10, 2]),
        ("3 pictures", []),
        ("a pictured 3", []),
        ("compare pictures 2 and 3", [2, 3]),
        ("images 1-3, then photos #5 & #7", [1, 2, 3, 5, 7]),
        ("pictures 1, 2, and 4; photo 6 to 8", [1, 2, 4, 6, 7, 8]),
        ("the first and the third picture, the 2nd to 4th images", [1, 3, 2, 3, 4]),
        ("图三里有什么", [3]),
        ("what about picture one?", [1]),
        ("Image two and photos three, four to six", [2, 3, 4, 5, 6]),
        ("picture number ten, image no. seven", [10, 7]),
        ("one picture, two images and three photos", []),
        ("picture seventeen, images tend to be", []),
        ("图一和图十二", [1, 12]),
        ("图1、2，图片3到5", [1, 2, 3, 4, 5]),
        ("第十一张图，第二十张照片", [11, 20]),
        ("第3、第4张图片，第一张和第二张图", [3, 4, 1, 2]),
        ("第1至3幅图像", [1, 2, 3]),
        ("这两张图一样吗，照片十分清楚，图片三张，图片 3 张", []),
        (f"picture {'1' * 5000}", []),
    ],
)
def test_how_a_picture_is_named(text: str, numbers: list[int]) -> None:
    """Numbers, ordinals, lists and ranges count; how many there are (图片三张) does not."""
    assert sorted(named_pictures(text)) == sorted(numbers)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("what about the last picture?", True),
        ("The previous image and the latest photo", True),
        ("the first and the last figure", True),
        ("上一张图呢", True),
        ("上张照片", True),
        ("最后一张图片里有什么", True),
        ("刚才那张照片", True),
        ("刚才的那幅 图", True),
        ("the last pictures", False),
        ("at last, a picture", False),
        ("the lasting image", False),
        ("这张图", False),
        ("最后一张纸", False),
    ],
)
def test_the_last_picture_is_the_last_that_was_shown(text: str, named: bool) -> None:
    """Whichever number that has; before the first there is none."""
    assert sorted(set(named_pictures(text, last=7))) == ([7] if named else [])
    assert list(named_pictures(text)) == []


@given(st.integers(1, 99), st.sampled_from(NAMINGS))
def test_every_number_is_heard_in_both_languages(number: int, naming: str) -> None:
    """From 1 to 99, in digits or in Chinese numerals: that one number and no other."""
    tens, ones = divmod(number, 10)
    numerals = "零一二三四五六七八九"
    chinese = numerals[ones] if ones else ""
    if tens:
        chinese = f"{numerals[tens] if tens > 1 else ''}十{chinese}"
    said = naming.format(number=number, chinese=chinese)
    assert list(named_pictures(said)) == [number]


LONG = [
    "第1、", "第一、", "第1张、 ", "第 ", "图1、", "图一 ", "一十", "first, ", "the ", "1st and ",
    "1, ", "picture 1 ", "first      ,      ", "image 1-9999 ", "pictures 1-9999,", "图1到9999、",
    " ", "picture one ", "one and ", "the last ", "上一张 ", "刚才那",
]  # fmt: skip


@pytest.mark.parametrize("beginning", ["", "picture 1", "first", "图", "第一"])
@pytest.mark.parametrize("said", LONG)
def test_a_long_text_takes_no_longer_than_its_length(said: str, beginning: str) -> None:
    """A pattern that is tried again from each member of a list takes minutes, deaf to Ctrl-C."""
    text = beginning + said * (100_000 // len(said))
    began = time.process_time()
    assert sum(1 for _ in named_pictures(text)) < 20 * len(text)
    assert time.process_time() - began < 3


def test_a_range_names_a_hundred_pictures_at_most() -> None:
    """``1-9999`` is hardly meant: 1 to 99 and its end, so that a few words cost no memory."""
    assert sorted(named_pictures("images 1-9999")) == [*range(1, 100), 9999]


@given(st.text("图片第张一二十分3,、to-and picture# fhirst"))
def test_whatever_is_said_names_no_more_than_there_could_be(text: str) -> None:
    """Any mixture of such characters raises nothing and names no number outside 0 to 9999."""
    assert all(0 <= number <= 9999 for number in named_pictures(text))
