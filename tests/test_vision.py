"""Pixel arithmetic against the reference implementations."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen2vl_serve.vision import FACTOR, PixelBudget, smart_resize, visual_tokens

sides = st.integers(1, 12_000)
budgets = st.tuples(st.integers(1, 200), st.integers(0, 16_000)).map(
    lambda pair: PixelBudget(pair[0] * 784, (pair[0] + pair[1]) * 784)
)


@settings(max_examples=10_000, deadline=None)
@given(sides, sides, budgets)
def test_sizes_are_those_of_qwen_vl_utils(height: int, width: int, budget: PixelBudget) -> None:
    """10,000 random pictures and budgets; ours differs only where the reference's is unusable."""
    from qwen_vl_utils.vision_process import smart_resize as reference

    assume(max(height, width) <= 200 * min(height, width))
    expected = reference(height, width, FACTOR, budget.min_pixels, budget.max_pixels)
    if min(expected) > 0 and max(expected) <= 200 * min(expected):
        assert smart_resize(height, width, budget) == expected
    else:
        rows, columns = smart_resize(height, width, budget)
        assert FACTOR <= max(rows, columns) <= 200 * min(rows, columns)


@settings(max_examples=10_000, deadline=None)
@given(sides, sides, budgets)
def test_sizes_are_those_of_transformers(height: int, width: int, budget: PixelBudget) -> None:
    """10,000 more against the processor that runs behind us, which takes what we made as it is.

    A side of 14 pixels or less it rounds to 0 before it weighs the budget; the reference does not.
    """
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    low, high = budget.min_pixels, budget.max_pixels

    assume(max(height, width) <= 200 * min(height, width))
    rows, columns = smart_resize(height, width, budget)
    if low <= rows * columns <= high:
        assert module.smart_resize(rows, columns, FACTOR, low, high) == (rows, columns)
    expected = module.smart_resize(height, width, FACTOR, low, high)
    if min(height, width) > FACTOR // 2 and max(expected) <= 200 * min(expected):
        assert (rows, columns) == expected
        assert visual_tokens(rows, columns) == (rows // 14) * (columns // 14) // 4


@settings(max_examples=2_000, deadline=None)
@given(sides, sides, budgets)
def test_a_resized_picture_keeps_its_size(height: int, width: int, budget: PixelBudget) -> None:
    """Within its budget a second resize, as the processor's, changes nothing."""
    assume(max(height, width) <= 200 * min(height, width))
    once = smart_resize(height, width, budget)
    if budget.min_pixels <= once[0] * once[1] <= budget.max_pixels:
        assert smart_resize(*once, budget) == once
    assert visual_tokens(*once) * FACTOR * FACTOR == once[0] * once[1]


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-1, 5), (2001, 10), (10, 2001)])
def test_what_has_no_size_is_refused(size: tuple[int, int]) -> None:
    """Empty pictures and aspect ratios beyond 200 have no tokens."""
    with pytest.raises(ValueError, match="pixels"):
        smart_resize(*size, PixelBudget(3136, 1_003_520))
