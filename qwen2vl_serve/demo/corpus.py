"""The text from which the tokenizer learns its merges: the model's own questions and answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene, Thing
from qwen2vl_serve.demo.lesson import about_picture, about_pictures, about_video, language_of
from qwen2vl_serve.demo.names import COLOURS, SHAPES
from qwen2vl_serve.demo.rows import SYSTEMS
from qwen2vl_serve.demo.talk import TALK, TALK_ZH, talk_question
from qwen2vl_serve.demo.wording import SPELL_START, plain


def imagined(rng: np.random.Generator) -> Scene:
    """A scene that nobody draws, for its words."""
    things = []
    for _ in range(int(rng.integers(1, 4))):
        x, y = (float(v) for v in rng.uniform(0.05, 0.7, 2))
        kind, colour = str(rng.choice(SHAPES)), str(rng.choice(COLOURS))
        things.append(Thing(kind, colour, (x, y, x + 0.2, y + 0.2)))
    if rng.random() < 0.1:
        things = [Thing("text", str(rng.choice(COLOURS)), (0.1, 0.4, 0.9, 0.6), "7")]
    return Scene(100, 100, tuple(things), str(rng.choice(COLOURS)))


def corpus(count: int, seed: int) -> Iterator[str]:
    """About ``count`` texts: questions, and answers up to the letters that are spelt out."""
    rng = np.random.default_rng((seed, 3))
    for system in SYSTEMS:
        yield f"system\n{system}"
    for _, answer in (*TALK, *TALK_ZH):
        yield from [answer] * 8
    for _ in range(count):
        way = rng.random()
        if way < 0.6:
            dialogue = about_picture(rng, imagined(rng))
        elif way < 0.8:
            dialogue = about_pictures(rng, [imagined(rng) for _ in range(int(rng.integers(2, 5)))])
        elif way < 0.9:
            first, second = ((str(rng.choice(COLOURS)), str(rng.choice(SHAPES))) for _ in range(2))
            motion = str(rng.choice(["left", "right", "up", "down"]))
            moving = Clip(motion, (first,))
            dialogue = about_video(
                rng, moving if rng.random() < 0.5 else Clip(None, (first, second))
            )
        else:
            dialogue = talk_question(rng, language_of(rng))
        if dialogue is None:
            continue
        for turn in dialogue.turns:
            yield f"user\n{turn.question}"
            yield plain(turn.answer.split(SPELL_START)[0])
