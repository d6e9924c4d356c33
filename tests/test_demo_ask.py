"""Questions have one right answer, and the scorer accepts it and no other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen2vl_serve.demo import ask, ask_many
from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene, Thing
from qwen2vl_serve.demo.evaluate import LANGUAGES, SAMPLERS, is_right, overlap, samples
from qwen2vl_serve.demo.lesson import about_picture, about_pictures, language_of
from qwen2vl_serve.demo.talk import TALK, TALK_ZH, talk_question
from qwen2vl_serve.demo.wording import Dialogue, Turn, look_at, looks_at, plain, said, vary

RED = Thing("circle", "red", (0.1, 0.4, 0.3, 0.6))
BLUE = Thing("square", "blue", (0.7, 0.4, 0.9, 0.6))
PAIR = Scene(100, 100, (RED, BLUE), "white")


def many(asker, scene, language="en", count=200):
    """Dialogues of one asker with different generators."""
    found = (asker(np.random.default_rng(n), scene, language) for n in range(count))
    return [d for d in found if d is not None]


def test_answers_are_canonical():
    """The same truth always gets the same words, whatever the wording of the question."""
    alone = Scene(100, 100, (RED,), "white")
    colours = {plain(d.turns[0].answer) for d in many(ask.colour_question, alone)}
    assert colours == {"The circle is red.", "Red."}
    assert {plain(d.turns[0].answer) for d in many(ask.describe_question, PAIR, "zh")} == {
        "图中有一个红色圆形和一个蓝色正方形。"
    }
    assert len({d.turns[0].question for d in many(ask.describe_question, PAIR)}) > 40


def test_places_near_a_border_are_not_asked():
    """A thing between two places gets no place question."""
    between = Scene(100, 100, (Thing("star", "red", (0.3, 0.3, 0.5, 0.5)),), "white")
    assert many(ask.place_question, between) == []
    assert ask.place_of(RED) == "left"
    assert ask.place_of(BLUE) == "right"
    assert ask.relation(RED, BLUE) == "left"


def test_what_is_counted_is_named_first():
    """The number stands once, after the names; nothing to count is said at once."""
    three = Scene(100, 100, (RED, BLUE, Thing("circle", "green", (0.4, 0.1, 0.6, 0.3))), "white")
    said_of = {plain(d.turns[0].answer) for d in many(ask.count_question, three)}
    assert "A red circle and a green circle: 2 circles." in said_of
    assert "A blue square: 1 square." in said_of
    assert any(answer.endswith(": 3 shapes.") for answer in said_of)
    assert any(answer.startswith("There are 0 ") for answer in said_of)
    chinese = {plain(d.turns[0].answer) for d in many(ask.count_question, three, "zh")}
    assert "一个红色圆形和一个绿色圆形，共2个圆形。" in chinese
    assert all(sum(letter.isdigit() for letter in answer) == 1 for answer in said_of | chinese)


def test_a_comparison_ends_in_the_verdict():
    """What each is comes before whether that is the same."""
    twins = Scene(100, 100, (RED, Thing("circle", "red", BLUE.box)), "white")
    for scene, english, chinese in (
        (PAIR, ": no.", "，不一样。"),
        (twins, " too: yes.", "：一样。"),
    ):
        asked = many(ask.compare_question, scene) + many(ask.compare_question, scene, "zh")
        answers = {plain(d.turns[0].answer) for d in asked}
        verdicts = {answer for answer in answers if answer.startswith(("One is", "一个是"))}
        assert verdicts
        assert all(answer.endswith((english, chinese)) for answer in verdicts)
    more = [Scene(9, 9, (RED, BLUE), None), Scene(9, 9, (RED,), None)]
    found = {plain(d.turns[0].answer) for d in many(ask_many.compare_pictures, more)}
    assert found == {"The pictures have 2 and 1 shapes: the first has more."}


def test_a_relation_is_told_after_both_names():
    """Of two things the second is named, then the first, then where it lies from there."""
    answers = {plain(d.turns[0].answer) for d in many(ask.relative_question, PAIR)}
    assert "From the blue square, the red circle is to the left." in answers
    assert "To the left of the blue square is the red circle." in answers
    chinese = {plain(d.turns[0].answer) for d in many(ask.relative_question, PAIR, "zh")}
    assert {"相对于蓝色正方形，红色圆形在左边。", "蓝色正方形的左边是红色圆形。"} <= chinese


def test_a_video_is_looked_at_where_it_shows_what_is_said():
    """The mark's picture is the pair of frames that shows the thing first, alone if one does."""
    boxes = ((0.0, 0.0, 0.2, 0.2),) * 3 + ((0.6, 0.6, 0.8, 0.8),) * 3
    clip = Clip(None, (("red", "star"), ("blue", "heart")), boxes, (0, 0, 0, 1, 1, 1))
    assert looks_at(ask_many.seen_in(clip, 0)) == pytest.approx((0, 0.1, 0.1), abs=0.02)
    assert looks_at(ask_many.seen_in(clip, 1)) == pytest.approx((2, 0.7, 0.7), abs=0.02)
    assert ask_many.seen_in(Clip(None, (("red", "star"),)), 0) == ""


def test_a_reference_is_never_ambiguous():
    """Two red circles are not called "the red circle"."""
    twins = Scene(100, 100, (RED, Thing("circle", "red", (0.7, 0.1, 0.9, 0.3))), "white")
    assert many(ask.box_question, twins) == []
    assert many(ask.colour_question, twins) == []


def test_boxes_are_thousandths():
    """Qwen2-VL's tokens around corners of 0 to 1000."""
    assert plain(ask.box_answer(RED, "en")) == (
        "<|object_ref_start|>the red circle<|object_ref_end|>"
        "<|box_start|>(100,400),(300,600)<|box_end|>"
    )


def test_json_answers_parse():
    """Fields come back under the names asked for."""
    for dialogue in many(ask.json_question, Scene(100, 100, (RED,), None)):
        values = json.loads(plain(dialogue.turns[0].answer))
        assert values
        assert set(values.values()) <= {"red", "circle", 1}
        assert all(name.lower() in dialogue.turns[0].question.lower() for name in values)


@pytest.mark.parametrize("task", SAMPLERS)
def test_the_scorer_accepts_the_truth_and_refuses_another(task):
    """For every task and language: the canonical answer is right, some other answer is wrong."""
    for language in LANGUAGES:
        for sample in samples(task, language, 4, seed=3):
            truth = plain(sample.dialogue.turns[-1].answer)
            assert is_right(sample.dialogue, truth)
            assert not is_right(sample.dialogue, "I like 9 mauve elephants, 12345.")
            assert sample.pictures or task == "text"


def test_a_box_asked_for_last_is_scored_as_a_box():
    """Also where a turn after it could not be asked: half an overlap is enough, no overlap none."""
    last = 0
    for seed in range(400):
        dialogue = ask_many.follow_up(np.random.default_rng(seed), PAIR, "en")
        boxed = bool(dialogue and "<|box_start|>" in dialogue.turns[-1].answer)
        assert bool(dialogue and dialogue.box) == boxed
        last += boxed
    assert last > 50


def test_chinese_names_that_contain_each_other_are_told_apart():
    """椭圆形 is not 圆形, and words count in either language."""
    assert said("一个椭圆形") == {"oval": 1}
    assert said("一个红色圆形和一个粉色圆形") == {"red": 1, "pink": 1, "circle": 2}
    assert said("A grey ellipse") == said("a gray oval")


def test_evaluation_samples_are_reproducible_and_apart_from_training():
    """The same seed asks the same; another seed asks something else."""
    one, two, other = (samples("colour", "en", 3, s) for s in (1, 1, 2))
    assert [s.dialogue for s in one] == [s.dialogue for s in two] != [s.dialogue for s in other]


def test_dialogues_flow_for_any_scene():
    """Askers never fail on a scene: they ask or decline."""
    rng = np.random.default_rng(0)
    text = Scene(
        90, 90, (Thing("text", "black", (0.1, 0.4, 0.9, 0.6), "42", ((0.1,) * 4,) * 2),), None
    )
    scenes = [PAIR, text, Scene(90, 90, (RED,), "white")]
    for _ in range(300):
        about_picture(rng, scenes[int(rng.integers(3))])
        about_pictures(rng, [scenes[int(k)] for k in rng.integers(0, 3, 3)])
        assert isinstance(talk_question(rng, language_of(rng)), Dialogue)
    assert about_picture(rng, Scene(90, 90, (), "white")) is None


def test_each_newcomers_question_has_one_answer():
    """No wording leads to two answers."""
    for table in (TALK, TALK_ZH):
        known: dict[str, str] = {}
        rng = np.random.default_rng(1)
        for patterns, answer in table:
            for _ in range(60):
                question = vary(rng, patterns)
                assert known.setdefault(question, answer) == answer


def test_overlap_is_intersection_over_union():
    """Half a box against the whole is one half; apart is nothing."""
    assert overlap((0, 0, 1, 1), (0, 0, 1, 0.5)) == pytest.approx(0.5)
    assert overlap((0, 0, 0.4, 0.4), (0.5, 0.5, 1, 1)) == 0.0
    assert is_right(
        Dialogue("box", "en", (Turn("q", ask.box_answer(RED, "en")),), box=RED.box),
        "the red circle(110,390),(310,600)",
    )


def test_an_answer_says_where_each_name_is_seen():
    """Before a name stands a mark for the middle of the thing; a reader sees none."""
    answer = ask.contents(PAIR, "en", picture=2)
    marks = [looks_at(letter) for letter in answer]
    looked = [mark for mark in marks if mark]
    assert [mark[0] for mark in looked] == [2, 2]
    for (_, x, y), thing in zip(looked, (RED, BLUE), strict=True):
        assert (x, y) == pytest.approx(thing.centre, abs=0.01)
    assert plain(answer) == "a red circle and a blue square"
    # Whether one more is to be named is seen at the word before it.
    assert looks_at(answer[answer.index(" and ") - 1])
    assert looks_at("a") is None
    assert looks_at(look_at((0.9, 0.9, 1.2, 1.2), 3)) == pytest.approx((3, 1, 1), abs=0.01)
