"""The resize is Pillow's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_serve.media import resample

SIDE = st.integers(1, 300)


def _noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def _pillow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


@settings(max_examples=600, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
@example(250, 90, 28, 28)  # down first
@example(250, 90, 249, 28)
@example(100, 100, 80, 90)  # where both orders meet
@example(100, 100, 79, 90)
@example(1, 300, 300, 1)
@example(257, 3, 128, 3)
def test_every_size_to_every_size(height: int, width: int, rows: int, columns: int) -> None:
    """Smaller and larger, in one direction or both, in either order of the two passes."""
    image = _noise(height, width)
    assert np.array_equal(
        resample._resized(image, (rows, columns)), _pillow(image, (rows, columns))
    )


@pytest.mark.parametrize("size", [(868, 1148), (168, 224), (1260, 1176), (3024, 3976)])
def test_a_photo_of_12_megapixels(size: tuple[int, int]) -> None:
    """Sizes that photos are brought to, from more strips of rows than one."""
    image = _noise(3000, 4000)
    assert np.array_equal(resample._resized(image, size), _pillow(image, size))


def test_hard_edges_overshoot_alike() -> None:
    """Black beside white exceeds 0 and 255 before it is clipped."""
    board = np.indices((64, 64)).sum(0) // 8 % 2 * 255
    image = Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    for size in ((28, 28), (140, 84)):
        assert np.array_equal(resample._resized(image, size), _pillow(image, size))


def test_the_installed_pillow_is_met() -> None:
    """With the Pillow that this project is tested with, the fast way is the one that is taken."""
    assert resample.equals_pillow()


def test_another_pillow_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the probes differ from Pillow's result, Pillow's is what callers get."""
    original = resample._resized
    monkeypatch.setattr(resample, "_resized", lambda image, size: original(image, size) ^ 1)
    resample.equals_pillow.cache_clear()
    try:
        image = _noise(50, 60)
        assert not resample.equals_pillow()
        assert np.array_equal(resample.resize(image, (28, 28)), _pillow(image, (28, 28)))
    finally:
        resample.equals_pillow.cache_clear()
