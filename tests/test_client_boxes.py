"""Boxes are read from all three of Qwen's ways to write them, whatever else the answer holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2vl_client import InvalidArgumentError
from qwen2vl_client.boxes import (
    CONVENTIONS,
    Box,
    Convention,
    Mark,
    boxes_in,
    convention_of,
    marks_in,
    written,
)

# Short answers of Qwen's models, as its own pages print them.
# QwenLM/Qwen-VL at aa00ed0: TUTORIAL.md, lines 175, 248, 706 and 752.
SHANGHAI = (
    "<ref>上海环球金融中心</ref><box>(667,437),(760,874)</box>和"
    "<ref>东方明珠</ref><box>(506,75),(582,946)</box>"
)
APPLES = (
    "<ref> Two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box> and"
    "<ref> a bowl</ref><box>(2,269),(304,674)</box>"
)
HIGH_FIVE = "<ref>击掌</ref><box>(536,509),(588,602)</box>"
BEACH = (
    "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref>"
    "<box>(219,424),(576,896)</box> playing on the beach<|endoftext|>"
)
# The report of Qwen2-VL (arXiv 2409.12191) prints this as the form of a box.
GIRAFFE = (
    "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|>"
    "<|box_start|>(176,106),(232,160)<|box_end|>"
)
# QwenLM/qwenlm.github.io at 1f89f8c: content/blog/qwen2.5-vl/cases/grounding_brave.json,
# grounding_box_safety.json (two of its four) and ocr_grounding1.json (its last two; the comma
# after the last item is Qwen's).
BRAVE = '```json\n[\n\t{"bbox_2d": [74, 58, 526, 619], "label": "person who act bravely"}\n]\n```'
SAFETY = (
    '```json\n[\n\t{"bbox_2d": [341, 258, 397, 360], "label": "motorcyclist", '
    '"sub_label": "not wearing helmat "},\n\t{"bbox_2d": [5, 235, 63, 320], '
    '"label": "motorcyclist", "sub_label": "wearing helmat "}\n]\n```'
)
RECEIPT = (
    '```json\n[\n\t{"bbox_2d": [21, 676, 169, 698], "text_content": "CHANGE DUE"},\n'
    '\t{"bbox_2d": [471, 682, 529, 704], "text_content": "3,000"},\n]\n```'
)


@pytest.mark.parametrize(
    ("answer", "convention", "marks"),
    [
        (
            SHANGHAI,
            "qwen-vl",
            [(667, 437, 760, 874, "上海环球金融中心"), (506, 75, 582, 946, "东方明珠")],
        ),
        (
            APPLES,
            "qwen-vl",
            [
                (302, 257, 582, 671, "Two apples"),
                (603, 252, 878, 642, "Two apples"),
                (2, 269, 304, 674, "a bowl"),
            ],
        ),
        (HIGH_FIVE, "qwen-vl", [(536, 509, 588, 602, "击掌")]),
        (BEACH, "qwen-vl", [(451, 379, 731, 806, "Woman"), (219, 424, 576, 896, "her dog")]),
        (GIRAFFE, "qwen2-vl", [(176, 106, 232, 160, "the eyes on a giraffe")]),
        (BRAVE, "qwen2.5-vl", [(74, 58, 526, 619, "person who act bravely")]),
        (
            SAFETY,
            "qwen2.5-vl",
            [(341, 258, 397, 360, "motorcyclist"), (5, 235, 63, 320, "motorcyclist")],
        ),
        (
            RECEIPT,
            "qwen2.5-vl",
            [(21, 676, 169, 698, "CHANGE DUE"), (471, 682, 529, 704, "3,000")],
        ),
    ],
)
def test_answers_that_qwen_has_published(
    answer: str, convention: Convention, marks: list[tuple[int, int, int, int, str]]
) -> None:
    """Each is recognised by its marks and read whole, labels and several boxes of one name."""
    assert convention_of(answer) == convention
    assert list(marks_in(answer, convention)) == [Mark(*one) for one in marks]


def test_thousandths_become_pixels_of_the_source() -> None:
    """Qwen2-VL's box on a picture of 2000 × 500: half way across and a tenth down."""
    answer = "<|box_start|>(500,100),(750,200)<|box_end|>"
    assert boxes_in(answer, (2000, 500)) == (Box(1000, 50, 1500, 100),)
    # The size that the model saw plays no part in thousandths.
    assert boxes_in(answer, (2000, 500), (28, 28)) == (Box(1000, 50, 1500, 100),)


def test_the_resize_is_undone_for_pixels_of_the_picture_as_seen() -> None:
    """Qwen2.5-VL saw 2000 × 500 as 504 × 140: each side by its own factor."""
    answer = '[{"bbox_2d": [126, 14, 252, 70], "label": "a"}]'
    assert boxes_in(answer, (2000, 500), (504, 140)) == (Box(500, 50, 1000, 250, "a"),)
    with pytest.raises(InvalidArgumentError, match="seen="):
        boxes_in(answer, (2000, 500))


def test_objects_may_hold_others() -> None:
    """Details beside the box, boxes of parts within it, or a list in an object of its own."""
    part = '{"bbox_2d": [2, 2, 3, 3], "label": "door"}'
    car = f'{{"bbox_2d": [1, 2, 5, 6], "label": "a {{car}}", "of": {{"n": 1}}, "parts": [{part}]}}'
    for answer in (f"[{car}]", f'{{"objects": [{car}]}}', f"```json\n{car}\n```"):
        assert marks_in(answer, "qwen2.5-vl") == (
            Mark(1, 2, 5, 6, "a {car}"),
            Mark(2, 2, 3, 3, "door"),
        )


def test_a_box_is_cut_to_the_picture_and_one_outside_is_left_out() -> None:
    """One without area is left out as well, and corners in the other order are put right."""
    answer = (
        "<|box_start|>(-50,900),(500,1200)<|box_end|>"  # reaches over two sides
        "<|box_start|>(1001,5),(1100,9)<|box_end|>"  # lies outside
        "<|box_start|>(40,40),(40,90)<|box_end|>"  # has no area
        "<|box_start|>(300,400),(100,200)<|box_end|>"  # its corners in the other order
    )
    assert [box.pixels for box in boxes_in(answer, (100, 100))] == [
        (0, 90, 50, 100),
        (10, 20, 30, 40),
    ]


def test_what_is_left_of_boxes_without_their_tokens_is_read() -> None:
    """A server that drops special tokens leaves the two points."""
    assert boxes_in("the red circle(100,200),(300,400)", (100, 100)) == (Box(10, 20, 30, 40),)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "a"}, {"bbox_2d": [5, 6', ["a"]),
        (APPLES[:-20], ["Two apples", "Two apples"]),
        (GIRAFFE[:-11], [""]),  # cut after the second point: two bare points, without a name
        (GIRAFFE[:-16], []),  # cut within it
    ],
)
def test_of_an_answer_that_was_cut_the_whole_boxes_are_read(answer: str, labels: list[str]) -> None:
    """A half box is left out; a single one without its last token is read, but not its name."""
    marks = marks_in(answer, convention_of(answer) or "qwen2-vl")
    assert [mark.label for mark in marks] == labels


def test_nothing_is_made_of_an_answer_without_boxes() -> None:
    """Points of a formula, empty tags or a ``bbox_2d`` in words are no boxes, and no error."""
    for answer in (
        "",
        "There is no circle.",
        "f(1,2) = (3,4)",
        '{"bbox_2d": "none"}',
        "<box></box>",
    ):
        assert boxes_in(answer, (10, 10), (10, 10)) == ()


labels = st.text(
    st.characters(exclude_characters="<>|", exclude_categories=("Cs", "Cc", "Z")), max_size=12
)
corner = st.integers(0, 1000)
marks = st.builds(
    lambda x, y, label: Mark(*map(float, (min(x), min(y), max(x), max(y))), label),
    st.tuples(corner, corner),
    st.tuples(corner, corner),
    labels,
)
conventions = st.sampled_from(CONVENTIONS)


@given(st.lists(marks, max_size=6), conventions, st.text(max_size=40), st.text(max_size=40))
def test_what_is_written_is_read_back(
    found: list[Mark], convention: Convention, before: str, after: str
) -> None:
    """Among any words that are not boxes or names themselves."""
    before, after = (junk.translate(str.maketrans("", "", '<>{}()"')) for junk in (before, after))
    text = before + written(found, convention) + after
    assert list(marks_in(text, convention)) == found


@given(st.lists(marks, min_size=1, max_size=4), conventions, st.integers(0, 400))
def test_a_cut_answer_gives_a_beginning_of_the_whole_one(
    found: list[Mark], convention: Convention, length: int
) -> None:
    """Boxes that are read are whole; only a first one without its last token is left aside here."""
    text = written(found, convention)[:length]
    if convention == "qwen2-vl" and "<|box_end|>" not in text:
        return  # a first box without its last token is read from its points: see above
    read = list(marks_in(text, convention))
    assert read == found[: len(read)]


PIECES = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<ref>", "</ref>", "<box>", "</box>", "(1,2)", ",", "(12,3", "(999999999,0),(0,1)"),
    *('{"bbox_2d":', "[1,2,3,4]", "[1e999,NaN,2,-Infinity]", "[" + "9" * 400 + ",1,2,3]"),
    *("[true,1,2,3]", '"label":', '"', "\\", "{", "}", "[" * 50, "```json\n"),
    "(1.5,2.5),(3.5,4.5)",
)
piece = st.sampled_from(PIECES)


@given(
    st.one_of(st.text(), st.lists(st.one_of(piece, st.text(max_size=5))).map("".join)),
    st.one_of(st.none(), conventions),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_no_text_makes_it_fail_and_every_box_lies_in_the_picture(
    text: str, convention: Convention | None, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    """Torn marks, NaN, huge numbers, deep nesting: no exception, and each box has an area."""
    for box in boxes_in(text, size, seen, convention):
        assert 0 <= box.left < box.right <= size[0]
        assert 0 <= box.top < box.bottom <= size[1]


def test_a_long_hostile_answer_is_read_at_once() -> None:
    """No pattern runs away; pytest's own limit would end this test."""
    for text in (
        '{"a":' * 20_000,
        "<ref>" * 30_000,
        '{"' * 20_000,
        "(1," * 50_000,
        "<|box_start|>(1,2)," * 20_000,
    ):
        for convention in CONVENTIONS:
            assert boxes_in(text, (10, 10), (10, 10), convention) == ()
