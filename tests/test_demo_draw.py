"""Pictures follow from their seeds, and the truth is in the pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.demo.compose import Clip, draw_picture, draw_video
from qwen2vl_serve.demo.draw import Scene, Thing, contrast, outline
from qwen2vl_serve.demo.names import COLOURS, SHADES, SHAPES
from qwen2vl_serve.demo.pictures import (
    CLASSES,
    IMAGE_PIXELS,
    KINDS,
    MOTIONS,
    SIZES,
    UNASKED,
    build_store,
    dense_targets,
    pair_targets,
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
        cells = dense_targets(scene, grid)
        for thing in scene.things:
            pair = (KINDS.index(thing.kind), COLOURS.index(thing.colour))
            mine = (cells.classes[:, :2] == pair).all(1)
            assert mine.any()
        nothing = cells.classes[:, 1] == len(COLOURS)
        assert np.isnan(cells.boxes[nothing]).all()
        assert np.isnan(cells.wholes[nothing]).all()


def told(cells, cell):
    """The classes that are asked of one cell, by name."""
    return {name: value for name, value in zip(CLASSES, cells.classes[cell].tolist(), strict=True)
            if value != UNASKED}  # fmt: skip


def test_cells_tell_places_sizes_and_both_ranks():
    """A large red circle top left, a small blue square bottom right: what each is among the two."""
    large = Thing("circle", "red", (0.1, 0.1, 0.5, 0.5))
    small = Thing("square", "blue", (0.75, 0.75, 0.95, 0.95))
    cells = dense_targets(Scene(280, 280, (small, large), "white"), (10, 10))
    first, second = told(cells, 33), told(cells, 88)
    assert (first["rank"], first["rank down"], second["rank"], second["rank down"]) == (0, 0, 1, 1)
    assert SIZES[first["size"]] == "largest"
    assert SIZES[second["size"]] == "smallest"
    assert (first["across"], first["down"], second["across"], second["down"]) == (0, 0, 2, 2)
    assert cells.wholes[33] == pytest.approx(large.box)


def test_what_is_near_a_border_is_not_asked():
    """No place between two thirds, no size among things of one size."""
    alike = [Thing("star", "red", (x, 0.3, x + 0.2, 0.5)) for x in (0.1, 0.7)]
    scene = Scene(280, 280, (*alike,), "white")
    classes = told(dense_targets(scene, (10, 10)), 42)
    assert classes["across"] == 0
    assert "down" not in classes
    assert "size" not in classes


def test_a_letter_has_its_own_box_and_the_words():
    """What a cell shows is the letter; the box that is asked for is the word's."""
    letters = ((0.1, 0.4, 0.5, 0.6), (0.5, 0.4, 0.9, 0.6))
    word = Thing("text", "red", (0.1, 0.4, 0.9, 0.6), "AB", letters)
    cells = dense_targets(Scene(280, 280, (word,), "white"), (10, 10))
    assert cells.boxes[42] == pytest.approx(letters[0])
    assert cells.boxes[47] == pytest.approx(letters[1])
    assert cells.wholes[42] == pytest.approx(word.box)


def test_a_pair_of_frames_tells_both_colours_and_the_way():
    """Mirrored and backwards, colours change places and directions turn round."""
    boxes = tuple((x, 0.4, x + 0.2, 0.6) for x in (0.1, 0.3, 0.5, 0.7))
    moving = Clip("right", (("red", "star"),), boxes, (0,) * 4)
    turned = moving.mirrored().reversed()
    assert turned.motion == "right"
    assert np.allclose(turned.boxes, boxes)
    seen = told(pair_targets(moving, 0, (5, 5)), 11)
    assert MOTIONS[seen["motion"]] == "right"
    assert KINDS[seen["kind"]] == "star"
    still = Clip(None, (("red", "star"), ("blue", "heart")), (boxes[1],) * 4, (0, 0, 0, 1))
    seen = told(pair_targets(still, 2, (5, 5)), 11)
    assert (COLOURS[seen["colour"]], COLOURS[seen["second colour"]]) == ("red", "blue")
    assert MOTIONS[seen["motion"]] == "none"
    seen = told(pair_targets(still.reversed(), 0, (5, 5)), 11)
    assert (COLOURS[seen["colour"]], COLOURS[seen["second colour"]]) == ("blue", "red")


def test_frames_show_their_thing_in_the_box_of_the_truth():
    """A drawn video's frames differ from each other within the boxes, not outside."""
    moved = 0
    for seed in range(40):
        frames, clip = draw_video(seed)
        assert len(clip.boxes) == len(clip.shown) == len(frames)
        assert all(0 <= index < len(clip.things) for index in clip.shown)
        if clip.motion:
            moved += 1
            axis = 0 if clip.motion in ("left", "right") else 1
            first, last = clip.boxes[0][axis], clip.boxes[-1][axis]
            assert (last > first) == (clip.motion in ("right", "down"))
            height, width = frames[0].shape[:2]
            change = np.abs(frames[0].astype(int) - frames[-1].astype(int)).max(-1) > 60
            outside = np.ones_like(change)
            for x1, y1, x2, y2 in (clip.boxes[0], clip.boxes[-1]):
                rows = slice(max(0, int(y1 * height) - 4), int(y2 * height) + 5)
                outside[rows, max(0, int(x1 * width) - 4) : int(x2 * width) + 5] = False
            assert change[outside].mean() < 0.01
    assert moved > 10


def test_a_store_gives_back_what_was_drawn(tmp_path):
    """Pictures and truths come back by their grid, also when opened again."""
    for _ in range(2):
        store = build_store(tmp_path, "pictures", 8, 500, workers=1)
    picture, scene = draw_picture(503)
    assert store.truths[3] == scene
    assert np.array_equal(store.load(3)[0], scaled(picture, IMAGE_PIXELS))
    assert sum(len(rows) for rows in store.members.values()) == 8
