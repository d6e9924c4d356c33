"""Imagined comparisons: their answers are given up to the verdict, which follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2vl_serve.demo.imagined import imagined
from qwen2vl_serve.demo.names import Language
from qwen2vl_serve.demo.wording import GIVEN, plain, said


def dialogues(language: Language, pictures: int) -> list[tuple[str, str]]:
    """What is given and what is taught of many imagined comparisons."""
    rng = np.random.default_rng(3)
    found = [imagined(rng, language, pictures) for _ in range(400)]
    answers = [dialogue.turns[0].answer for dialogue in found if dialogue]
    assert len(answers) > 100
    return [(given, taught) for given, _, taught in (a.rpartition(GIVEN) for a in answers)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_verdict_follows_from_the_names(language):
    """Two names that agree are the same and others are not; each verdict is met often."""
    agreed = []
    for given, taught in dialogues(language, 1):
        names = [name for name, count in said(given).items() for _ in range(count)]
        assert len(names) == 2, given
        agreed.append(names[0] == names[1])
        assert bool({"yes", "same"} & said(taught).keys()) == agreed[-1], (given, taught)
    assert 0.3 < np.mean(agreed) < 0.8


@pytest.mark.parametrize("pictures", [3, 4])
def test_the_picture_with_most_things_is_named(pictures):
    """Of three and four pictures only numbers are compared; every place wins at times."""
    winners = set()
    for given, taught in dialogues("en", pictures):
        numbers = [int(letter) for letter in plain(given) if letter.isdigit()]
        assert len(numbers) == pictures
        ordinal = ("first", "second", "third", "fourth")[numbers.index(max(numbers))]
        assert taught == f": the {ordinal} has more."
        winners.add(ordinal)
    assert len(winners) == pictures
