"""Every dialect's pixel fields: honoured, clamped and reported, or refused; never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.errors import (
    InvalidImage,
    InvalidValue,
    RequestError,
    UnsupportedParameter,
)
from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.media.sizing import Bounds, Sizing, size_for
from qwen2vl_serve.protocol.content import ImagePart
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from qwen2vl_serve.vision import PixelBudget, smart_resize

TOKEN = 784
BOUNDS = Bounds(PixelBudget(4 * TOKEN, 1280 * TOKEN), PixelBudget(4 * TOKEN, 4096 * TOKEN))
LIMITS = RequestLimits(max_messages=9, max_n=1, max_tokens=None, images=9, videos=0)
PHOTO = Header("JPEG", 4000, 3000)


def sized(
    header: Header = PHOTO,
    beside: dict[str, Any] | None = None,
    inside: dict[str, Any] | None = None,
    **request: Any,
) -> Sizing:
    part = {"type": "image_url", "image_url": {"url": "data:x", **(inside or {})}, **(beside or {})}
    body = {"messages": [{"role": "user", "content": [part]}], **request}
    chat = parse_chat(json.dumps(body).encode(), LIMITS)
    one = chat.messages[0].content[0]
    assert isinstance(one, ImagePart)
    return size_for(header, one, chat, BOUNDS, "here")


def test_without_a_word_the_profile_decides() -> None:
    """The default budget, as the reference resizes under it."""
    height, width = smart_resize(3000, 4000, BOUNDS.default)
    assert sized() == Sizing(height, width, clamped=False)
    assert sized().visual_tokens <= 1280


PLACES: list[Any] = [
    lambda fields: {"beside": fields},
    lambda fields: {"inside": fields},
    lambda fields: {"mm_processor_kwargs": fields},
    lambda fields: fields,
]
DIALECTS = ["Model Studio", "LMDeploy", "vLLM", "top level"]


@pytest.mark.parametrize("place", PLACES, ids=DIALECTS)
def test_max_pixels_is_heard_in_every_place(place: Any) -> None:
    """Beside the URL object, inside it, or for the whole request: the same size."""
    seen = sized(**place({"max_pixels": 300 * TOKEN}))
    assert (seen.height, seen.width) == smart_resize(
        3000, 4000, PixelBudget(4 * TOKEN, 300 * TOKEN)
    )
    assert not seen.clamped


@pytest.mark.parametrize("place", PLACES, ids=DIALECTS)
def test_min_pixels_is_heard_in_every_place(place: Any) -> None:
    """A small picture is enlarged to it."""
    seen = sized(Header("PNG", 100, 100), **place({"min_pixels": 400 * TOKEN}))
    assert seen.visual_tokens >= 400


def test_a_pictures_own_field_wins_over_the_requests() -> None:
    """Different budgets for different pictures of one request."""
    seen = sized(
        beside={"max_pixels": 100 * TOKEN}, mm_processor_kwargs={"max_pixels": 900 * TOKEN}
    )
    assert seen.visual_tokens <= 100


@pytest.mark.parametrize("place", PLACES, ids=DIALECTS)
def test_exact_sizes_and_detail_are_heard_in_every_place(place: Any) -> None:
    """As the pixel bounds are: what an SDK can say in one place it can say in any."""
    exact = sized(**place({"resized_height": 280, "resized_width": 420}))
    assert exact == Sizing(280, 420, clamped=False)
    assert 230 < sized(**place({"detail": "low"})).visual_tokens <= 256


@pytest.mark.parametrize(
    "request_wide",
    [
        {"max_pixels": 900 * TOKEN},
        {"mm_processor_kwargs": {"max_pixels": 900 * TOKEN}},
        {"min_pixels": 900 * TOKEN},
        {"resized_height": 2800, "resized_width": 2800},
        {"vl_high_resolution_images": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("own", "most"),
    [({"detail": "low"}, 256), ({"max_pixels": 100 * TOKEN, "detail": "low"}, 100)],
    ids=["low", "both"],
)
def test_a_picture_of_low_detail_stays_small_whatever_all_others_are(
    request_wide: dict[str, Any], own: dict[str, Any], most: int
) -> None:
    """The nearer place wins: a request's size for all is no word on this picture."""
    assert most * 0.85 < sized(inside=own, **request_wide).visual_tokens <= most


def test_of_low_detail_and_max_pixels_the_smaller_holds() -> None:
    """Both bound the size from above; a picture's own min_pixels is more exact than ``low``."""
    own = {"detail": "low", "max_pixels": 900 * TOKEN}
    assert 230 < sized(inside=own).visual_tokens <= 256
    own = {"detail": "low", "min_pixels": 400 * TOKEN}
    assert sized(inside=own).visual_tokens >= 390


def test_a_picture_of_high_detail_has_the_profiles_size() -> None:
    """Said of one picture, ``high`` goes before the request's bound for all; ``auto`` does not."""
    wide: dict[str, Any] = {"max_pixels": 100 * TOKEN}
    assert sized(inside={"detail": "high"}, **wide) == sized()
    assert sized(inside={"detail": "auto"}, **wide).visual_tokens <= 100


@pytest.mark.parametrize(
    ("own", "wide", "least", "most"),
    [
        ({"max_pixels": 50 * TOKEN}, {"min_pixels": 100 * TOKEN}, 40, 50),
        ({"min_pixels": 900 * TOKEN}, {"max_pixels": 100 * TOKEN}, 840, 930),
        ({"max_pixels": 50 * TOKEN}, {"resized_height": 700, "resized_width": 700}, 40, 50),
    ],
)
def test_bounds_of_two_places_do_not_contradict_each_other(
    own: dict[str, Any], wide: dict[str, Any], least: int, most: int
) -> None:
    """The picture's own bound holds, and the request's goes as far with it as it can."""
    assert least <= sized(beside=own, **wide).visual_tokens <= most


@pytest.mark.parametrize(
    "wide",
    [
        {"max_pixels": 5000, "mm_processor_kwargs": {"max_pixels": 6000}},
        {"min_pixels": 900 * TOKEN, "max_pixels": 800 * TOKEN},
        {"resized_height": 280},
        {"mm_processor_kwargs": {"resized_width": 280}},
    ],
    ids=str,
)
def test_contradictions_of_a_request_are_refused(wide: dict[str, Any]) -> None:
    """Two values for one field, bounds the wrong way round, and half a size."""
    with pytest.raises(InvalidValue):
        sized(**wide)


def test_a_file_that_is_a_picture_takes_no_fields_of_a_video() -> None:
    """What it is shows when it is read; then ``fps`` is refused by its name, not lost."""
    part = {"type": "file", "file": {"file_id": "x"}, "fps": 2}
    body = {"messages": [{"role": "user", "content": [part]}]}
    chat = parse_chat(json.dumps(body).encode(), LIMITS)
    one = chat.messages[0].content[0]
    assert isinstance(one, ImagePart)
    with pytest.raises(UnsupportedParameter, match="leave fps out") as caught:
        size_for(PHOTO, one, chat, BOUNDS, "messages[0].content[0].file")
    assert caught.value.param == "messages[0].content[0].fps"


@pytest.mark.parametrize(("detail", "most"), [("low", 256), ("auto", 1280), ("high", 1280)])
def test_detail_is_openais(detail: str, most: int) -> None:
    """``low`` is 448 × 448; the others are the profile's default."""
    tokens = sized(inside={"detail": detail}).visual_tokens
    assert most * 0.9 < tokens <= most


def test_high_resolution_is_the_most_that_is_admitted() -> None:
    """``vl_high_resolution_images`` lifts the default, and any max_pixels, to the limit."""
    for fields in ({}, {"beside": {"max_pixels": 50 * TOKEN}}):
        tokens = sized(vl_high_resolution_images=True, **fields).visual_tokens
        assert 3900 < tokens <= 4096


def test_bounds_beside_high_resolution_are_clamped_like_any() -> None:
    """The limit stands in for max_pixels; the client never gave it and is not told of it."""
    seen = sized(vl_high_resolution_images=True, beside={"min_pixels": 10**9})
    assert seen.clamped
    assert 3900 < seen.visual_tokens <= 4096


def test_exact_sizes_are_rounded_to_tokens() -> None:
    """``resized_height`` and ``resized_width`` set the size, as in qwen_vl_utils."""
    seen = sized(beside={"resized_height": 280, "resized_width": 430})
    assert seen == Sizing(280, 420, clamped=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pixels": 10**9},
        {"max_pixels": 1},
        {"min_pixels": 10**9},
        {"min_pixels": 1, "max_pixels": 2},
        {"resized_height": 28_000, "resized_width": 28_000},
    ],
)
def test_what_exceeds_the_limits_is_clamped_and_said(fields: dict[str, int]) -> None:
    """The result keeps the profile's limits and is marked."""
    seen = sized(beside=fields)
    assert seen.clamped
    assert 4 * TOKEN <= seen.height * seen.width <= 4096 * TOKEN


@pytest.mark.parametrize(
    ("beside", "inside"),
    [
        ({"min_pixels": 900 * TOKEN, "max_pixels": 800 * TOKEN}, {}),
        ({"max_pixels": 5000}, {"max_pixels": 6000}),
        ({"resized_height": 280}, {}),
        ({"detail": "low"}, {"detail": "high"}),
    ],
)
def test_contradictions_are_refused(beside: dict[str, Any], inside: dict[str, Any]) -> None:
    """Nothing is guessed: the message names the fields and their values."""
    with pytest.raises(InvalidValue) as caught:
        sized(beside=beside, inside=inside)
    assert next(iter(beside)) in caught.value.message


@pytest.mark.parametrize("value", ["5", 0, -1, 1.5, True, None])
def test_unusable_values_are_refused(value: object) -> None:
    """Pixels are positive integers; null means not given."""
    if value is None:
        assert sized(beside={"max_pixels": None}) == sized()
        return
    with pytest.raises(RequestError):
        sized(beside={"max_pixels": value})


def test_a_picture_narrower_than_1_to_200_is_refused() -> None:
    """The family's processor cannot see it."""
    with pytest.raises(InvalidImage):
        sized(Header("PNG", 20_001, 100))
    assert sized(Header("PNG", 1990, 10)).visual_tokens > 0


pixels = st.none() | st.integers(1, 10**8)


@given(st.integers(1, 9000), st.integers(1, 9000), pixels, pixels, st.booleans())
def test_every_size_keeps_the_limits(
    width: int, height: int, low: int | None, high: int | None, lift: bool
) -> None:
    """Whatever is asked for, sides are multiples of 28 and tokens within the limits."""
    try:
        seen = sized(
            Header("PNG", width, height),
            {"min_pixels": low, "max_pixels": high},
            vl_high_resolution_images=lift,
        )
    except RequestError:
        return
    assert seen.height % 28 == 0
    assert seen.width % 28 == 0
    assert 4 <= seen.visual_tokens <= 4096
