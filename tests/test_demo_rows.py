"""Packed rows: every branch is a conversation of its own, and says where it looks."""

from __future__ import annotations

import numpy as np
import torch  # noqa: F401  (hides what cannot load before transformers asks what there is)
from transformers import AutoTokenizer

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.rows import Encoder, Media, Row, pack
from qwen2vl_serve.demo.wording import (
    COPY_END,
    COPY_START,
    GIVEN,
    LOOK_AWAY,
    SPELL_END,
    SPELL_START,
    Dialogue,
    Turn,
    look_at,
    plain,
)

ENCODER = Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
LEFT, RIGHT = (0.0, 0.4, 0.2, 0.6), (0.8, 0.4, 1.0, 0.6)


def test_marks_change_no_token():
    """An answer has the same tokens with and without marks; a mark counts from its place on."""
    answer = f"It shows {look_at(LEFT)}a red circle and {look_at(RIGHT, 1)}a blue square."
    coded = ENCODER.answer(answer)
    assert tuple(said.token for said in coded) == ENCODER.encode(plain(answer))
    pictures = [said.look[0] if said.look else None for said in coded]
    assert pictures == sorted(pictures, key=lambda p: -1 if p is None else p)
    assert set(pictures) == {None, 0, 1}


def test_each_spelt_letter_is_looked_at():
    """Letters are single tokens, each with its own mark."""
    letters = f"{look_at(LEFT)}t{look_at(RIGHT)}h"
    coded = ENCODER.answer(f'"{SPELL_START}{letters}{SPELL_END}"')
    known = {ENCODER.encode(letter)[0]: look for letter, look in zip("th", (0.1, 0.9), strict=True)}
    found = {said.token: said.look[1] for said in coded[1:3] if said.look}
    assert found.keys() == known.keys()
    assert all(abs(found[token] - known[token]) < 0.02 for token in known)


def test_nothing_is_looked_at_where_a_text_is_read():
    """From its mark on, until the next look."""
    answer = f"{look_at(LEFT)}A star.{LOOK_AWAY} It costs 5 and{look_at(RIGHT)} is red."
    coded = ENCODER.answer(answer)
    assert tuple(said.token for said in coded) == ENCODER.encode(plain(answer))
    parts = [ENCODER.encode(text) for text in ("A star.", " It costs 5 and", " is red.")]
    seen = [look for part, look in zip(parts, (0.1, None, 0.9), strict=True) for _ in part]
    for said, expected in zip(coded, seen, strict=True):
        assert (said.look is None) == (expected is None)
        assert said.look is None or abs(said.look[1] - expected) < 0.02


def test_a_copied_number_is_looked_at_where_it_stands():
    """Digit by digit, in its own place: not in a longer number, nor in another branch."""
    row = Row()
    row.text(ENCODER.opening("A star costs 17 yuan, a heart 170."))
    row.seal()
    for number in ("170", "17"):
        row.begin()
        answer = f"It costs {COPY_START}{number}{COPY_END} yuan."
        row.dialogue(ENCODER, Dialogue("use", "en", (Turn("How much?", answer),)))
    digits = [ENCODER.encode(digit)[0] for digit in "17170"]
    short, long = (
        start
        for start in range(len(row.ids))
        if row.branch[start] == 0 and row.ids[start : start + 2] == digits[:2]
    )
    seen = [place for _, place in row.looks]
    assert seen == [long, long + 1, long + 2, short, short + 1]
    assert all(row.ids[said] == row.ids[place] for said, place in row.looks)
    assert all(row.taught[said] for said, _ in row.looks)


def test_what_is_given_is_not_taught():
    """Its tokens stand in the row as they would be said; the loss asks for what follows alone."""
    row = Row()
    row.text(ENCODER.opening("S"))
    row.seal()
    row.begin()
    answer = f"One is a star and the other is a star{GIVEN} too: yes."
    row.dialogue(ENCODER, Dialogue("compare", "en", (Turn("Same?", answer),)))
    packed = pack([row], ENCODER.pad)
    assert tuple(packed.answers.tolist()) == ENCODER.encode(" too: yes.") + ENCODER.stop
    said = ENCODER.encode(plain(answer)) + ENCODER.stop
    assert tuple(row.ids[-len(said) :]) == said


def test_looks_point_at_the_cell_of_the_right_picture():
    """From the token before a name to the visual token that holds the thing's middle."""
    row = Row()
    row.text(ENCODER.opening("S"))
    for index in range(2):
        row.medium(ENCODER, Media(index, 1, 2, 5, video=False))
    row.seal()
    answers = [f"{look_at(RIGHT, 1)}yes", f"{look_at(LEFT)}no"]
    for answer in answers:
        row.begin()
        row.dialogue(ENCODER, Dialogue("colour", "en", (Turn("Which?", answer),)))
    packed = pack([row], ENCODER.pad)
    rows, said, seen = packed.looking.numpy()
    assert set(rows) == {0}
    answered = packed.ids[0].numpy()[said + 1]
    first = {token: int(seen[np.flatnonzero(answered == token)[0]])
             for token in (ENCODER.encode("yes")[0], ENCODER.encode("no")[0])}  # fmt: skip
    # The middle of a box half way down lies in the second of two rows.
    assert list(first.values()) == [row.starts[1] + 5 + 4, row.starts[0] + 5]


def test_a_branch_with_its_own_picture_looks_at_that():
    """Where a question comes before its picture, numbers count the branch's own pictures."""
    row = Row()
    row.text(ENCODER.opening("S"))
    row.seal()
    for index in range(2):
        row.begin()
        row.text(ENCODER.encode("Which?"))
        row.medium(ENCODER, Media(index, 1, 1, 1, video=False))
        row.answers(ENCODER, Dialogue("colour", "en", (Turn("Which?", f"{look_at(LEFT)}yes"),)))
    _, said, seen = pack([row], ENCODER.pad).looking.numpy()
    assert set(seen) == set(row.starts)
    assert all(place < at for place, at in zip(seen, said, strict=True))


def test_a_look_at_a_video_goes_to_its_pair_of_frames():
    """A mark's number counts pairs where one video is shown."""
    row = Row()
    row.medium(ENCODER, Media(0, 3, 2, 5, video=True))
    row.seal()
    row.begin()
    row.dialogue(ENCODER, Dialogue("motion", "en", (Turn("Which?", f"{look_at(RIGHT, 2)}yes"),)))
    _, _, seen = pack([row], ENCODER.pad).looking.numpy()
    assert set(seen) == {row.starts[0] + 2 * 10 + 5 + 4}
