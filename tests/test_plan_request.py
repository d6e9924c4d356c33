"""A typical request in words, and what it costs in tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

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
    default_request,
    parse_request,
    picture_tokens,
)
from qwen2vl_serve.profile import Profile, load_profile, make_profile


def profile(limits: Mapping[str, int] | None = None, **media: object):
    values = {"limit_mm_per_prompt": {"image": 8, "video": 2}, **media}
    model = {"model": "Qwen/Qwen2-VL-7B-Instruct"}
    return make_profile({"model": model, "media": values, "limits": dict(limits or {})})


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
        (
            "4 images 10000x10000, 10 in, 10 out",
            "400000000 pixels to decode, but limits.max_media_pixels is 200000000; raise it or ask",
        ),
        ("1 video 4000x2000 20s", "320000000 pixels to decode, but limits.max_media_pixels is"),
        (
            "1 image 10000x9999, 1 video 3000x3000 10s",
            "279990000 pixels to decode, but limits.max_media_pixels is 200000000",
        ),
        ("2 videos 100x100 590s", "1536 frames"),
        (
            "1 video 640x480 601s",
            "601 s are 18030 frames of 30 a second, but media.max_video_frames is 18000; raise it",
        ),
    ],
)
def test_requests_that_the_profile_refuses(words: str, told: str) -> None:
    """Too many, too large, too narrow, too long or one frame alone, or too much in all."""
    limits = {"max_media_frames": 1535} if told == "1536 frames" else {}
    with pytest.raises(PreflightError, match=told):
        cost_of(parse_request(words), profile(limits))


def test_the_most_that_a_request_may_be_is_planned() -> None:
    """Each bound itself is allowed, as the server allows it."""
    assert cost_of(parse_request("2 images 10000x10000"), profile()).visual > 0
    assert cost_of(parse_request("2 videos 100x100 384s"), profile()).visual > 0
    exact = profile({"max_media_pixels": 100 * 100 * 20, "max_media_frames": 20, "max_tokens": 7})
    assert cost_of(parse_request("1 video 100x100 10s, 7 out"), exact).answer == 7
    with pytest.raises(
        PreflightError, match=r"8 tokens of the answer, but limits\.max_tokens is 7"
    ):
        cost_of(parse_request("8 out"), exact)


def test_what_is_counted_where_nothing_is_said_is_allowed() -> None:
    """A profile of small bounds is planned without a picture that it would refuse."""
    assert default_request(profile()) == Request((Medium(1, 1280, 960),), 300, 200)
    for small in (profile({"max_media_pixels": 9}), profile(max_image_pixels=9)):
        assert cost_of(default_request(small), small).visual == 0
    short = profile({"max_tokens": 7})
    assert cost_of(default_request(short), short).answer == 7


UNBOUNDED = {"max_media_pixels": 10**12, "max_media_frames": 10**6}


def like_the_references(width: int, height: int, seconds: float, limits: Profile) -> None:
    """Compare a video's tokens with qwen_vl_utils, and its size with transformers' as well.

    The processor of transformers runs behind us: it has to keep the size that was made, and to
    make the same of the frames as they come.
    """
    from qwen_vl_utils import vision_process as reference
    from transformers.models.qwen2_vl import video_processing_qwen2_vl as processor

    frames = max(1, round(seconds * FILE_FPS))
    taken = reference.smart_nframes({}, total_frames=frames, video_fps=FILE_FPS)
    low = reference.VIDEO_MIN_TOKEN_NUM * 28**2
    total = reference.MODEL_SEQ_LEN * 28**2 * 0.9
    high = max(min(reference.VIDEO_MAX_TOKEN_NUM * 28**2, total / taken * 2), int(low * 1.05))
    rows, columns = reference.smart_resize(height, width, 28, low, high)
    request = Request((Medium(1, width, height, seconds),), 0, 0)
    assert cost_of(request, limits).visual == taken // 2 * (rows // 28) * (columns // 28) + 2
    assert processor.smart_resize(height, width, 28, low, high) == (rows, columns)
    assert processor.smart_resize(rows, columns, 28, 784, 768 * 784) == (rows, columns)


@settings(max_examples=300, deadline=None)
@given(st.integers(28, 4000), st.integers(28, 4000), st.floats(0.2, 900))
def test_videos_cost_what_the_references_make_of_them(
    width: int, height: int, seconds: float
) -> None:
    """Frames and their size are those of both, for any length and shape that hypothesis finds."""
    limits = profile(UNBOUNDED, max_video_pixels=4000 * 4000, max_video_frames=10**6)
    like_the_references(width, height, seconds, limits)


def test_10_000_random_videos_cost_what_the_references_make_of_them() -> None:
    """Any shape and length, compared with each of the two."""
    draw = random.Random(1)
    limits = profile(UNBOUNDED, max_video_pixels=4000 * 4000, max_video_frames=10**6)
    for _ in range(10_000):
        width, height = draw.randint(28, 4000), draw.randint(28, 4000)
        like_the_references(width, height, draw.uniform(0.2, 900), limits)


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
