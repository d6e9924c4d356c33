"""Comparisons of things that no picture shows, of which only the verdict is taught.

A verdict follows from the names that the answer has just said. Taught beside what is seen alone, it
goes by what is seen, and contradicts its own names one time in ten: where the names are given,
whatever the picture shows or without one, they are all that there is to go by. The two verdicts are
about as frequent; where one is more so, it is guessed and nothing is learnt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen2vl_serve.demo import ask, ask_many
from qwen2vl_serve.demo.draw import Scene, Thing
from qwen2vl_serve.demo.names import COLOURS, SHAPES, Language
from qwen2vl_serve.demo.wording import GIVEN, Dialogue, plain

Rng = np.random.Generator
# How an answer's verdict begins, as ``ask.verdict`` and ``ask_many.compare_pictures`` write it.
VERDICTS = (" too: ", ": no.", ": the ", "：", "，不一样")


# Of two things; ``ask.compare_question`` leaves out half of those that do not agree.
ALIKE_WITHIN, ALIKE_BETWEEN = 0.27, 0.45


def thing(rng: Rng, like: Thing | None, alike: float, place: float) -> Thing:
    """A thing of any kind and colour; each is that of ``like`` with the chance ``alike``."""
    kind, colour = str(rng.choice(SHAPES)), str(rng.choice(COLOURS))
    if like and rng.random() < alike:
        kind = like.kind
    if like and rng.random() < alike:
        colour = like.colour
    return Thing(kind, colour, (place, 0.4, place + 0.1, 0.5))


def imagined(rng: Rng, language: Language, pictures: int) -> Dialogue | None:
    """A comparison within one picture, or of two to four: only the answer's verdict is taught."""
    first = thing(rng, None, 0.0, 0.1)
    if pictures == 1:
        both = (first, thing(rng, first, ALIKE_WITHIN, 0.6))
        dialogue = ask.compare_question(rng, Scene(1, 1, both, None), language)
    elif pictures == 2 and rng.random() < 0.7:
        pair = [Scene(1, 1, (one,), None) for one in (first, thing(rng, first, ALIKE_BETWEEN, 0.6))]
        dialogue = ask_many.compare_pictures(rng, pair, language)
    else:
        counts = rng.integers(1, 6, pictures).tolist()
        scenes = [Scene(1, 1, (first,) * count, None) for count in counts]
        dialogue = ask_many.compare_pictures(rng, scenes, language)
    return dialogue and given_up_to_verdict(dialogue)


def given_up_to_verdict(dialogue: Dialogue) -> Dialogue | None:
    """The dialogue with its answer given up to the verdict; None where there is no verdict."""
    (turn,) = dialogue.turns
    answer = plain(turn.answer)
    starts = [answer.find(beginning) for beginning in VERDICTS if beginning in answer]
    if not starts:
        return None
    names, verdict = answer[: min(starts)], answer[min(starts) :]
    return replace(dialogue, turns=(replace(turn, answer=names + GIVEN + verdict),))
