"""Pictures follow from their seeds, and the truth is in the pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.demo.compose import draw_picture, draw_video
from qwen2vl_serve.demo.draw import contrast, outline
from qwen2vl_serve.demo.names import COLOURS, SHADES, SHAPES
from qwen2vl_serve.demo.pictures import (
    IMAGE_PIXELS,
    KINDS,
    build_store,
    dense_targets,
    resized,
    scaled,
)
from qwen2vl_serve.torchvision_ops import declare_missing_operators


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_the_same_seed_draws_the_same_picture(seed):
    """Pixels and truth are a function of the seed."""
    (one, truth), (two, again) = draw_picture(seed), draw_picture(seed)
    assert np.array_equal(one, two)
    assert truth == again
    assert min(one.shape[:2]) >= 84
    assert max(one.shape[:2]) <= 900
    assert max(one.shape[:2]) / min(one.shape[:2]) <= 3.02


def test_things_keep_apart_and_inside():
    """Boxes lie in the picture and do not overlap."""
    for seed in range(60):
        _, scene = draw_picture(seed, "shapes", 5)
        for n, thing in enumerate(scene.things):
            x1, y1, x2, y2 = thing.box
            assert -0.01 <= x1 < x2 <= 1.01
            assert -0.01 <= y1 < y2 <= 1.01
            for other in scene.things[n + 1 :]:
                a, b = thing.box, other.box
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_colour_is_where_the_box_says():
    """A shape's middle is nearer to its own colour's shades than the picture's ground is."""
    agree = total = 0
    for seed in range(120):
        picture, scene = draw_picture(seed, "shapes", 1)
        thing = scene.things[0]
        if thing.kind == "cross":
            continue
        x, y = int(thing.centre[0] * scene.width), int(thing.centre[1] * scene.height)
        middle = picture[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
        tone = tuple(int(v) for v in middle)
        nearest = min(COLOURS, key=lambda c: min(contrast(tone, s) for s in SHADES[c]))
        agree += nearest == thing.colour
        total += 1
    assert agree / total > 0.8  # outlines only, gradients and noise are the rest


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_an_outline(shape):
    """The polygon is about the origin and of about unit size."""
    points = outline(shape, np.random.default_rng(1))
    assert points.shape[1] == 2
    assert 0.5 < np.ptp(points, axis=0).max() < 2.8


def test_an_unknown_shape_is_named():
    """The message names the shape and the choices."""
    with pytest.raises(ValueError, match="'blob' is not one of circle"):
        outline("blob", np.random.default_rng(1))


def test_videos_are_reproducible_and_move():
    """The moving thing is on the named side at the end."""
    for seed in range(20):
        frames, clip = draw_video(seed)
        again, same = draw_video(seed)
        assert clip == same
        assert all(map(np.array_equal, frames, again))
        assert 4 <= len(frames) <= 8
    assert draw_video(1)[1].reversed().reversed() == draw_video(1)[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(84, 900), st.floats(1 / 3, 3))
def test_the_grid_is_the_processors(width, ratio):
    """Rows and columns equal those of transformers' smart_resize."""
    declare_missing_operators()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height = max(84, round(width * ratio))
    rows, columns = resized(width, height, IMAGE_PIXELS)
    assert (rows * 28, columns * 28) == smart_resize(height, width, 28, *IMAGE_PIXELS)


def test_dense_targets_name_what_a_cell_shows():
    """Each thing owns at least one cell, with its kind, colour and box."""
    for seed in range(30):
        picture, scene = draw_picture(seed, "shapes", 3)
        small = scaled(picture, IMAGE_PIXELS)
        grid = (small.shape[1] // 28, small.shape[2] // 28)
        classes, boxes = dense_targets(scene, grid)
        for thing in scene.things:
            pair = (KINDS.index(thing.kind), COLOURS.index(thing.colour))
            mine = (classes[:, :2] == pair).all(1)
            assert mine.any()
        assert np.isnan(boxes[classes[:, 1] == len(COLOURS)]).all()


def test_a_store_gives_back_what_was_drawn(tmp_path):
    """Pictures and truths come back by their grid, also when opened again."""
    for _ in range(2):
        store = build_store(tmp_path, "pictures", 8, 500, workers=1)
    picture, scene = draw_picture(503)
    assert store.truths[3] == scene
    assert np.array_equal(store.load(3)[0], scaled(picture, IMAGE_PIXELS))
    assert sum(len(rows) for rows in store.members.values()) == 8
