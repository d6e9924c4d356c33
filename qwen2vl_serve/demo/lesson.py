"""Which questions are asked about which pictures: the mixture the model learns and is scored on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from qwen2vl_serve.demo import ask, ask_many
from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene
from qwen2vl_serve.demo.names import Language
from qwen2vl_serve.demo.wording import Dialogue

Rng = np.random.Generator
Asker = Callable[[Rng, Scene, Language], Dialogue | None]

SHAPE_ASKERS: tuple[tuple[Asker, float], ...] = (
    (ask.colour_question, 1.2),
    (ask.shape_question, 1.4),
    (ask.describe_question, 2.0),
    (ask.place_question, 2.6),
    # What is left out is a thing among others: all of them are counted right sooner.
    # A second of its kind is overlooked more often than one is seen that is not there.
    (partial(ask.count_question, of_all=0.3, ones_left_out=0.5), 3.2),
    (partial(ask.box_question, drawn=2), 3.0),  # a small one is easily missed by half its width
    (ask.compare_question, 3.0),
    (ask.exists_question, 0.6),
    (ask.json_question, 0.8),
    (ask.background_question, 0.4),
    (ask_many.follow_up, 2.4),
)
TEXT_ASKERS: tuple[tuple[Asker, float], ...] = (
    (ask.read_question, 4.5),
    (ask.describe_question, 1.2),
    (ask.colour_question, 0.7),
    (ask.place_question, 0.6),
    (ask.box_question, 1.0),
    (ask.json_question, 0.9),
    (ask.background_question, 0.3),
    (ask_many.follow_up, 0.6),
)


def language_of(rng: Rng) -> Language:
    """English or Chinese, evenly."""
    return "en" if rng.random() < 0.5 else "zh"


def _draw(rng: Rng, weights: tuple[float, ...]) -> int:
    total = np.cumsum(weights)
    return int(np.searchsorted(total, rng.random() * total[-1]))


def about_picture(rng: Rng, scene: Scene) -> Dialogue | None:
    """Some dialogue about one picture."""
    if not scene.things:
        return None
    text = scene.things[0].kind == "text"
    askers = TEXT_ASKERS if text else SHAPE_ASKERS
    asker = askers[_draw(rng, tuple(weight for _, weight in askers))][0]
    return asker(rng, scene, language_of(rng))


def about_pictures(rng: Rng, scenes: list[Scene]) -> Dialogue | None:
    """Some dialogue about two to four pictures."""
    if any(not s.things for s in scenes):
        return None
    askers = (ask_many.nth_question, ask_many.which_question, ask_many.compare_pictures,
              ask_many.number_of_pictures)  # fmt: skip
    return askers[_draw(rng, (2.2, 2.2, 3.0, 0.25))](rng, scenes, language_of(rng))


def about_video(rng: Rng, clip: Clip) -> Dialogue | None:
    """Some dialogue about one video."""
    asker = ask_many.motion_question if clip.motion else ask_many.order_question
    return asker(rng, clip, language_of(rng))
