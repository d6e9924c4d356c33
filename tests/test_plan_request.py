"""A typical request in words, and what it costs in tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.capacity import capacity
from qwen2vl_serve.plan.cards import parse_cards
from qwen2vl_serve.plan.deployment import largest_picture
from qwen2vl_serve.plan.request import (
    FILE_FPS,
    Medium,
    Request,
    cost_of,
    parse_request,
    picture_tokens,
)
from qwen2vl_serve.profile import load_profile, make_profile


def profile(**media: object):
    values = {"limit_mm_per_prompt": {"image": 8, "video": 2}, **media}
    return make_profile({"model": {"model": "Qwen/Qwen2-VL-7B-Instruct"}, "media": values})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "2 images 1280x960, 300 in, 200 out",
            Request((Medium(2, 1280, 960),), 300, 200),
        ),
        ("1 video 640x480 10s", Request((Medium(1, 640, 480, 10.0),), 300, 200)),
        ("image 28×28, 1 in, 0 out", Request((Medium(1, 28, 28),), 1, 0)),
        (
            "1 picture 8000x6000, 2 videos 640x480 1.5 s, 10 tokens in",
            Request((Medium(1, 8000, 6000), Medium(2, 640, 480, 1.5)), 10, 200),
        ),
        ("50 in", Request((), 50, 200)),
        ("2 images 1280*960，300 in，200 out", Request((Medium(2, 1280, 960),), 300, 200)),
    ],
)
def test_requests_in_words(words: str, expected: Request) -> None:
    """Chinese commas and ``×`` or ``*`` too; unsaid are one picture, 300 in and 200 out."""
    assert parse_request(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        "", "2 dogs", "2 images", "1 video 640x480", "1 image 640x480 10s", "300", "-1 in",
        "0 images 640x480, 10 in", "0 videos 640x480 10s", "10 in, 20 in", "1 out, 300 in, 1 OUT",
        "两张图片 1280x960，输入三百", "1 video 640x480 1" + "9" * 400 + "s", "9" * 5000 + " in",
    ],
)  # fmt: skip
def test_words_that_are_no_request(words: str) -> None:
    """Also none of a medium, and a number of tokens that is said twice."""
    with pytest.raises(PreflightError, match="--typical") as caught:
        parse_request(words)
    assert len(str(caught.value)) < 250


def test_a_picture_costs_its_tokens_and_two_markers() -> None:
    """1280 × 960 pixels are 46 × 34 squares of 28, under 1280 tokens 30 × 41."""
    assert cost_of(parse_request("1 image 1280x960, 0 in, 0 out"), profile()).total == 1232
    small = profile(max_pixels=256 * 784)
    assert cost_of(parse_request("2 images 1280x960, 0 in, 0 out"), small).visual <= 2 * 258


def test_a_video_costs_half_its_frames() -> None:
    """10 s at two frames a second are 20 frames: 10 layers of 768 tokens at most."""
    cost = cost_of(parse_request("1 video 640x480 10s, 0 in, 0 out"), profile())
    assert cost.visual == 10 * 391 + 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("9 images 10x10", "limit_mm_per_prompt.image is 8"),
        ("3 videos 640x480 5s", "limit_mm_per_prompt.video is 2"),
        ("1 image 10x4000", "aspect ratio"),
        ("1 image 20000x20000", "400000000 pixels, but media.max_image_pixels is 100000000"),
        ("1 video 8000x6000 5s", "48000000 pixels, but media.max_video_pixels is 9437184"),
        ("1 video 640x480 0s", "single frame"),
    ],
)
def test_requests_that_the_profile_refuses(words: str, told: str) -> None:
    """Too many, too large, too narrow or one frame alone: each is told in its own words."""
    with pytest.raises(PreflightError, match=told):
        cost_of(parse_request(words), profile())


@settings(max_examples=300, deadline=None)
@given(st.integers(28, 4000), st.integers(28, 4000), st.floats(0.2, 900))
def test_videos_cost_what_qwen_vl_utils_makes_of_them(
    width: int, height: int, seconds: float
) -> None:
    """Frames and their size are those of the reference, for any length and shape."""
    from qwen_vl_utils import vision_process as reference

    frames = max(1, round(seconds * FILE_FPS))
    if frames < 4 or max(width, height) > 200 * min(width, height):
        return
    limits = profile(max_video_pixels=4000 * 4000)
    taken = reference.smart_nframes({}, total_frames=frames, video_fps=FILE_FPS)
    low = reference.VIDEO_MIN_TOKEN_NUM * 28**2
    total = reference.MODEL_SEQ_LEN * 28**2 * 0.9
    high = max(min(reference.VIDEO_MAX_TOKEN_NUM * 28**2, total / taken * 2), int(low * 1.05))
    rows, columns = reference.smart_resize(height, width, 28, low, high)
    request = Request((Medium(1, width, height, seconds),), 0, 0)
    assert cost_of(request, limits).visual == taken // 2 * (rows // 28) * (columns // 28) + 2


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(256, 16384))
def test_no_picture_exceeds_the_profiled_one(width: int, height: int, tokens: int) -> None:
    """Memory is reserved for the largest picture; none that is sent may be larger."""
    if max(width, height) > 200 * min(width, height):
        return
    bounded = profile(max_pixels=tokens * 784)
    assert picture_tokens(width, height, bounded) <= math.prod(largest_picture(tokens * 784, 28))


def test_requests_at_once() -> None:
    """Whole blocks a request, no more than max_num_seqs, none beyond max_model_len."""
    plan = plan_for(load_profile("single-gpu-2b"), parse_cards("1x2080"))
    tokens = int(plan.kv_tokens.likely)
    assert capacity(plan, 8784).together == tokens // 8784
    assert capacity(plan, 1).together == plan.deployment.max_num_seqs == 32
    assert capacity(plan, 17).by_cache == pytest.approx(tokens / 32)
    assert capacity(plan, 8785).together == 0
