"""Pixel arithmetic against the reference implementations."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.vision import FACTOR, PixelBudget, smart_resize, visual_tokens

sides = st.integers(1, 12_000)
budgets = st.tuples(st.integers(1, 200), st.integers(0, 16_000)).map(
    lambda pair: PixelBudget(pair[0] * 784, (pair[0] + pair[1]) * 784)
)
pictures = st.tuples(sides, sides, budgets).filter(lambda one: allowed(*one[:2]))


def allowed(height: int, width: int) -> bool:
    return max(height, width) <= 200 * min(height, width)


def random_pictures(count: int = 10_000) -> Iterator[tuple[int, int, PixelBudget]]:
    """Height, width and budget of as many, beside the ones that hypothesis thinks of."""
    draw = random.Random(1)
    while count:
        height, width, low = draw.randint(1, 12_000), draw.randint(1, 12_000), draw.randint(1, 200)
        if allowed(height, width):
            count -= 1
            budget = PixelBudget(low * 784, (low + draw.randint(0, 16_000)) * 784)
            yield height, width, budget


def like_qwen_vl_utils(height: int, width: int, budget: PixelBudget) -> None:
    """Ours differs only where the reference's is unusable."""
    from qwen_vl_utils.vision_process import smart_resize as reference

    expected = reference(height, width, FACTOR, budget.min_pixels, budget.max_pixels)
    if min(expected) > 0 and max(expected) <= 200 * min(expected):
        assert smart_resize(height, width, budget) == expected
    else:
        rows, columns = smart_resize(height, width, budget)
        assert FACTOR <= max(rows, columns) <= 200 * min(rows, columns)


def like_transformers(height: int, width: int, budget: PixelBudget) -> None:
    """The processor that runs behind us takes what we made as it is.

    A side of 14 pixels or less it rounds to 0 before it weighs the budget; the reference does not.
    """
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    low, high = budget.min_pixels, budget.max_pixels

    rows, columns = smart_resize(height, width, budget)
    if low <= rows * columns <= high:
        assert module.smart_resize(rows, columns, FACTOR, low, high) == (rows, columns)
    expected = module.smart_resize(height, width, FACTOR, low, high)
    if min(height, width) > FACTOR // 2 and max(expected) <= 200 * min(expected):
        assert (rows, columns) == expected
        assert visual_tokens(rows, columns) == (rows // 14) * (columns // 14) // 4


def kept_once_made(height: int, width: int, budget: PixelBudget) -> None:
    """Within its budget a second resize, as the processor's, changes nothing."""
    once = smart_resize(height, width, budget)
    if budget.min_pixels <= once[0] * once[1] <= budget.max_pixels:
        assert smart_resize(*once, budget) == once
    assert visual_tokens(*once) * FACTOR * FACTOR == once[0] * once[1]


Holds = Callable[[int, int, PixelBudget], None]
CLAIMS = [like_qwen_vl_utils, like_transformers, kept_once_made]


@pytest.mark.parametrize("holds", CLAIMS)
@settings(max_examples=300)
@given(picture=pictures)
def test_sizes_are_those_of_the_references(
    holds: Holds, picture: tuple[int, int, PixelBudget]
) -> None:
    """Both that there are, at the edges that hypothesis looks for."""
    holds(*picture)


@pytest.mark.parametrize("holds", CLAIMS)
def test_10_000_random_sizes_are_those_of_the_references(holds: Holds) -> None:
    """Any picture under any budget, compared with each of the two."""
    for picture in random_pictures():
        holds(*picture)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5), (2001, 10), (10, 2001)])
def test_what_has_no_size_is_refused(size: tuple[int, int]) -> None:
    """Empty pictures and aspect ratios beyond 200 have no tokens."""
    with pytest.raises(ValueError, match="pixels"):
        smart_resize(*size, PixelBudget(3136, 1_003_520))
