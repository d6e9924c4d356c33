"""Frames and their sizes: those of qwen_vl_utils, and what a profile makes of a request."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_serve.errors import InvalidValue, InvalidVideo
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.media.headers import VideoHeader
from qwen2vl_serve.media.sampling import (
    REFERENCE,
    FrameRules,
    Sampling,
    sample_file,
    sample_list,
    wishes,
)
from qwen2vl_serve.media.sizing import Bounds
from qwen2vl_serve.media.video import DEFAULT_LIMITS, frame_indices
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol.content import FramesPart, ImagePart, VideoFields, VideoPart
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from qwen2vl_serve.torchvision_ops import declare_missing_operators
from qwen2vl_serve.vision import PixelBudget

LIMITS = RequestLimits(max_messages=9, max_n=1, max_tokens=None, images=9, videos=9)
TOKEN = 28 * 28


@pytest.fixture(scope="module")
def theirs() -> Any:
    declare_missing_operators()
    return importlib.import_module("qwen_vl_utils.vision_process")


@pytest.fixture(scope="module")
def their_sampling(theirs: Any) -> Any:
    """Their (frames, height, width) of a video without the work: nothing is decoded or resized.

    A video is (height, width, frames, rate), or a list of pictures.
    """
    torch: Any = importlib.import_module("torch")
    zero = torch.zeros(1, dtype=torch.uint8)
    shown: list[tuple[int, int, int]] = []

    def resize(video: Any, size: list[int], **_: Any) -> Any:
        shown.append((len(video), size[0], size[1]))
        return zero

    def pillows(image: Image.Image, size: tuple[int, int]) -> Any:
        return np.broadcast_to(np.uint8(0), (size[1], size[0], 3))

    def sampling_of(video: Any, fields: dict[str, Any]) -> tuple[int, int, int]:
        if isinstance(video, tuple):
            height, width, total, rate = video
            count = theirs.smart_nframes(fields, total, rate)
            frames = zero.expand(count, 3, height, width)
            patch.setattr(theirs, "VIDEO_READER_BACKENDS", {"fake": lambda _: (frames, {}, 2.0)})
            theirs.fetch_video({"video": "x", **fields})
        else:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(Image.Image, "resize", pillows)
                theirs.fetch_video({"video": video, **fields})
        return shown[-1]

    with pytest.MonkeyPatch.context() as patch:
        functional = SimpleNamespace(functional=SimpleNamespace(resize=resize))
        patch.setattr(theirs, "transforms", functional)
        patch.setattr(theirs, "get_video_reader_backend", lambda: "fake")
        yield sampling_of


@pytest.fixture(scope="module")
def processors_size() -> Any:
    """The size that the processor behind us gives to frames: transformers' ``smart_resize``."""
    module: Any = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    return module.smart_resize


def sampled(header: VideoHeader, rules: FrameRules = REFERENCE, **fields: Any) -> Sampling:
    return sample_file(header, VideoFields(**fields), rules, "it")


rates = st.floats(0.5, 120) | st.sampled_from([23.976, 24.0, 25.0, 29.97, 30.0, 59.94])
ways = st.fixed_dictionaries({"nframes": st.integers(2, 900)}) | st.fixed_dictionaries(
    {},
    optional={
        "fps": st.floats(0.01, 60),
        "min_frames": st.integers(1, 50),
        "max_frames": st.integers(50, 900),
    },
)


def rules_for(fields: dict[str, Any], rules: FrameRules) -> FrameRules:
    """Theirs has a cap of frames only where a request has no word on them."""
    own = "max_frames" in fields or "nframes" in fields
    return replace(rules, max_frames=10**9) if own else rules


@settings(max_examples=1000, deadline=None)
@given(st.integers(2, 5000), rates, ways)
def test_as_many_frames_as_the_reference(
    theirs: Any, total: int, rate: float, fields: dict[str, Any]
) -> None:
    """``smart_nframes`` for any length, rate and wish, where it answers at all."""
    header = VideoHeader(320, 240, total, rate)
    rules = rules_for(fields, REFERENCE)
    try:
        expected = theirs.smart_nframes(fields, total, rate)
    except ValueError:
        with pytest.raises(InvalidValue, match="nframes is"):
            sampled(header, rules, **fields)
        return
    assert sampled(header, rules, **fields).frames == expected


@settings(max_examples=500, deadline=None)
@given(st.integers(2, 20_000), st.integers(1, 384))
def test_frames_are_spread_as_the_reference_spreads_them(total: int, pairs: int) -> None:
    """``torch.linspace`` in single precision, rounded: first and last are always taken."""
    count = min(2 * pairs, total - total % 2)
    torch: Any = importlib.import_module("torch")
    expected = torch.linspace(0, total - 1, count).round().long().tolist()
    indices = frame_indices(total, count)
    assert indices == expected
    assert (indices[0], indices[-1]) == (0, total - 1)
    assert indices == sorted(set(indices))


sides = st.integers(16, 4000)
films = st.tuples(sides, sides, st.integers(2, 5000), rates).filter(
    lambda film: max(film[:2]) <= 100 * min(film[:2])
)
"""Height, width, frames and rate."""
budgets = st.fixed_dictionaries(
    {},
    optional={
        "min_pixels": st.integers(4 * TOKEN, 200 * TOKEN),
        "max_pixels": st.integers(200 * TOKEN, 2000 * TOKEN),
        "total_pixels": st.integers(4 * TOKEN, REFERENCE.total_pixels),
    },
)
WIDE = FrameRules(
    Bounds(REFERENCE.bounds.default, PixelBudget(TOKEN, 768 * TOKEN)), REFERENCE.total_pixels
)


Film = tuple[int, int, int, float]


def random_films() -> Iterator[tuple[Film, dict[str, Any], dict[str, int]]]:
    """Films, ways and budgets of the same kinds without end."""
    draw = random.Random(1)

    def some(**ranges: tuple[float, float]) -> dict[str, Any]:
        return {
            name: draw.randint(*one) if isinstance(one[0], int) else draw.uniform(*one)
            for name, one in ranges.items()
            if draw.random() < 0.5
        }

    while True:
        height, width = draw.randint(16, 4000), draw.randint(16, 4000)
        if max(height, width) > 100 * min(height, width):
            continue
        usual = draw.choice([23.976, 24.0, 25.0, 29.97, 30.0, 59.94])
        rate = draw.choice([usual, draw.uniform(0.5, 120)])
        ways = [
            {"nframes": draw.randint(2, 900)},
            some(fps=(0.01, 60.0), min_frames=(1, 50), max_frames=(50, 900)),
        ]
        fields = some(
            min_pixels=(4 * TOKEN, 200 * TOKEN),
            max_pixels=(200 * TOKEN, 2000 * TOKEN),
            total_pixels=(4 * TOKEN, REFERENCE.total_pixels),
        )
        yield (height, width, draw.randint(2, 5000), rate), draw.choice(ways), fields


def compared(
    their_sampling: Callable[..., tuple[int, int, int]],
    processors_size: Callable[..., tuple[int, int]],
    film: Film,
    way: dict[str, Any],
    fields: dict[str, int],
) -> bool:
    """Compare a video with ``fetch_video`` and with transformers, which runs behind us.

    That keeps the size and counts as many tokens. False: theirs lies outside of their own bounds.
    """
    height, width, total, rate = film
    if "nframes" in way:  # that more are refused is shown above
        way = {"nframes": min(way["nframes"], total // 2 * 2)}
    fields = {"min_pixels": 128 * TOKEN, **fields} if "max_pixels" in fields else fields
    frames, rows, columns = their_sampling(film, {**way, **fields})
    header, low, high = VideoHeader(width, height, total, rate), TOKEN, 768 * TOKEN
    ours = sampled(header, rules_for(way, WIDE), **way, **fields)
    if not low <= rows * columns <= high:
        assert ours.sizing.height * ours.sizing.width <= high
        return False
    assert (ours.frames, ours.sizing.height, ours.sizing.width) == (frames, rows, columns)
    assert ours.visual_tokens == frames // 2 * (rows // 28) * (columns // 28)
    assert processors_size(rows, columns, 28, low, high) == (rows, columns)
    return True


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(films, ways, budgets)
def test_a_video_has_the_visual_tokens_that_the_reference_gives_it(
    their_sampling: Callable[..., tuple[int, int, int]],
    processors_size: Callable[..., tuple[int, int]],
    film: Film,
    way: dict[str, Any],
    fields: dict[str, int],
) -> None:
    """At the edges that hypothesis looks for."""
    if not compared(their_sampling, processors_size, film, way, fields):
        reject()


def test_10_000_random_videos_have_the_visual_tokens_of_the_reference(
    their_sampling: Callable[..., tuple[int, int, int]],
    processors_size: Callable[..., tuple[int, int]],
) -> None:
    """Any shape, length, rate and wish on frames and pixels."""
    done = 0
    for one in random_films():
        done += compared(their_sampling, processors_size, *one)
        if done == 10_000:
            break


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(30, 1500),
    st.integers(30, 1500),
    st.integers(1, 3),
    st.sampled_from([{}, {"max_pixels": 160 * TOKEN}, {"min_pixels": 130 * TOKEN}])
    | st.builds(
        lambda h, w: {"resized_height": h, "resized_width": w},
        st.integers(280, 700),
        st.integers(280, 700),
    ),
)
def test_listed_frames_are_as_large_as_the_references(
    their_sampling: Callable[..., tuple[int, int, int]],
    height: int,
    width: int,
    count: int,
    fields: dict[str, int],
) -> None:
    """Frames of a list go through multiples of 56, as theirs do; an odd one out is doubled."""
    picture = Image.new("RGB", (width, height))
    expected = their_sampling([picture] * count, {"min_pixels": 128 * TOKEN, **fields})
    wish = VideoFields(**{"min_pixels": 128 * TOKEN, **fields})
    sampling = sample_list(VideoHeader(width, height, count, 0.0), wish, WIDE, "it")
    assert (sampling.frames, sampling.sizing.height, sampling.sizing.width) == expected


def test_a_profile_that_says_nothing_has_the_references_rules() -> None:
    """The defaults of the profile's sections and those of this module are the same."""
    loader = media_loader(Profile.model_validate({"model": {"model": "demo"}}))
    assert loader.frame_rules == REFERENCE
    assert loader.video_limits == DEFAULT_LIMITS


NARROW = FrameRules(
    Bounds(
        PixelBudget(50 * TOKEN, 100 * TOKEN),
        PixelBudget(20 * TOKEN, 200 * TOKEN),
    ),
    total_pixels=2000 * TOKEN,
    fps=1.0,
    max_frames=17,
)
MINUTE = VideoHeader(1280, 720, 1500, 25.0)


def test_the_profile_decides_where_nothing_is_asked() -> None:
    """Its rate and cap, its default size; nothing of that is a clamp."""
    seen = sampled(MINUTE, NARROW)
    assert (seen.frames, seen.clamped) == (16, False)
    assert 50 * TOKEN <= seen.sizing.height * seen.sizing.width <= 100 * TOKEN
    assert sampled(VideoHeader(1280, 720, 250, 25.0), NARROW).frames == 10


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({"nframes": 40}, 16),
        ({"fps": 2.0}, 16),
        ({"min_frames": 20}, 16),
        ({"max_frames": 900}, 16),
    ],
)
def test_more_frames_than_the_profile_admits_are_cut_and_told(
    fields: dict[str, Any], frames: int
) -> None:
    """Whichever field asks for them."""
    seen = sampled(MINUTE, NARROW, **fields)
    assert (seen.frames, seen.clamped) == (frames, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pixels": 10**9},
        {"min_pixels": 1, "max_pixels": TOKEN},
        {"min_pixels": 10**9},
        {"total_pixels": 10**9},
        {"resized_height": 2800, "resized_width": 2800},
        {"max_pixels": 190 * TOKEN, "total_pixels": 160 * TOKEN},
    ],
    ids=str,
)
def test_sizes_beyond_the_bounds_are_brought_to_them_and_told(fields: dict[str, Any]) -> None:
    """Every frame stays within what the profile lets a request ask for."""
    seen = sampled(MINUTE, NARROW, nframes=4, **fields)
    assert 20 * TOKEN <= seen.sizing.height * seen.sizing.width <= 200 * TOKEN
    assert seen.clamped


def test_what_fits_is_not_told_as_clamped() -> None:
    """A wish within the bounds is kept as it is."""
    seen = sampled(MINUTE, NARROW, nframes=4, max_pixels=190 * TOKEN)
    assert not seen.clamped
    assert 100 * TOKEN < seen.sizing.height * seen.sizing.width <= 190 * TOKEN
    exact = sampled(MINUTE, NARROW, nframes=4, resized_height=140, resized_width=280)
    assert (exact.sizing.height, exact.sizing.width, exact.clamped) == (140, 280, False)


def test_a_single_frame_is_no_video() -> None:
    """Nor is it one for the reference."""
    with pytest.raises(InvalidVideo, match="single frame"):
        sampled(VideoHeader(320, 240, 1, 1.0))


def test_a_strip_is_no_video() -> None:
    """Beyond 200 to 1 the model has no size for it."""
    with pytest.raises(InvalidVideo, match="aspect ratio"):
        sampled(VideoHeader(4000, 16, 20, 10.0))


def wished(
    beside: dict[str, Any] | None = None,
    inside: dict[str, Any] | None = None,
    *,
    listed: bool = False,
    **whole: Any,
) -> VideoFields:
    part = {"type": "video_url", "video_url": {"url": "data:x", **(inside or {})}, **(beside or {})}
    if listed:
        part = {"type": "video", "video": ["data:x"], **(beside or {})}
    body = {"messages": [{"role": "user", "content": [part]}], **whole}
    chat = parse_chat(json.dumps(body).encode(), LIMITS)
    first = chat.messages[0].content[0]
    assert isinstance(first, VideoPart | FramesPart)
    return wishes(first, chat, "it", listed=listed)


FIELDS = {
    "fps": 1.5,
    "min_frames": 6,
    "max_frames": 12,
    "min_pixels": 10,
    "max_pixels": 20,
    "total_pixels": 30,
}


@pytest.mark.parametrize(
    "place",
    [
        lambda fields: {"beside": fields},
        lambda fields: {"inside": fields},
        lambda fields: {"mm_processor_kwargs": fields},
        lambda fields: fields,
    ],
    ids=["beside", "inside", "request", "top level"],
)
def test_every_field_is_heard_in_every_place(place: Callable[[Any], dict[str, Any]]) -> None:
    """Model Studio's place, LMDeploy's and vLLM's."""
    wish = wished(**place(FIELDS))
    assert {name: getattr(wish, name) for name in FIELDS} == FIELDS
    assert wished(**place({"nframes": 8})).nframes == 8
    size = wished(**place({"resized_height": 280, "resized_width": 420}))
    assert (size.resized_height, size.resized_width) == (280, 420)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_frames": 8}, {"nframes": 8, "max_frames": None, "fps": None}),
        ({"fps": 1.5}, {"nframes": None, "max_frames": None, "fps": 1.5}),
        ({"num_frames": 8, "fps": 1.5}, {"nframes": None, "max_frames": 8, "fps": 1.5}),
    ],
    ids=str,
)
def test_vllms_sampling_of_a_request_is_heard(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    """``media_io_kwargs``: so many frames; or so many a second, and not more than so many."""
    wish = wished(media_io_kwargs={"video": given})
    assert {name: getattr(wish, name) for name in expected} == expected
    assert wished({"nframes": 4}, media_io_kwargs={"video": given}).nframes == 4


@pytest.mark.parametrize(
    ("own", "whole", "expected"),
    [
        ({"max_pixels": 50}, {"min_pixels": 80}, {"min_pixels": 50, "max_pixels": 50}),
        ({"max_frames": 8}, {"nframes": 16}, {"max_frames": 8, "nframes": None}),
        ({"min_frames": 20}, {"max_frames": 8}, {"min_frames": 20, "max_frames": 20}),
        (
            {"max_pixels": 50},
            {"resized_height": 28, "resized_width": 28},
            {"max_pixels": 50, "resized_height": None},
        ),
    ],
    ids=str,
)
def test_a_part_and_the_request_do_not_contradict_each_other(
    own: dict[str, Any], whole: dict[str, Any], expected: dict[str, Any]
) -> None:
    """The part's word holds, and the request's goes as far with it as it can."""
    for wish in (wished(own, mm_processor_kwargs=whole), wished(own, **whole)):
        assert {name: getattr(wish, name) for name in expected} == expected


def test_a_file_that_is_a_video_keeps_its_fields() -> None:
    """``fps`` and the others beside ``file`` are those of the video that it turns out to be."""
    given = {**FIELDS, "resized_height": 280, "resized_width": 420}
    part = {"type": "file", "file": {"file_id": "x"}, **given}
    body = {"messages": [{"role": "user", "content": [part]}]}
    chat = parse_chat(json.dumps(body).encode(), LIMITS)
    picture = chat.messages[0].content[0]
    assert isinstance(picture, ImagePart)
    wish = wishes(VideoPart.of_file(picture), chat, "it", listed=False)
    assert {name: getattr(wish, name) for name in given} == given


def test_a_part_goes_before_the_request() -> None:
    """Also where it chooses frames in another way."""
    whole = {"fps": 3.0, "min_frames": 8, "max_pixels": 5000}
    wish = wished({"nframes": 4, "max_pixels": 4000}, mm_processor_kwargs=whole)
    assert (wish.nframes, wish.fps, wish.min_frames, wish.max_pixels) == (4, None, None, 4000)
    assert wished({"min_frames": 2}, mm_processor_kwargs=whole).fps == 3.0


@pytest.mark.parametrize(
    "places",
    [
        {"beside": {"fps": 2.0, "nframes": 4}},
        {"beside": {"nframes": 4, "max_frames": 8}},
        {"beside": {"min_frames": 9}, "inside": {"max_frames": 8}},
        {"beside": {"min_pixels": 9, "max_pixels": 8}},
        {"beside": {"fps": 1.0}, "inside": {"fps": 2.0}},
        {"mm_processor_kwargs": {"fps": 1.0, "nframes": 4}},
        {"fps": 1.0, "mm_processor_kwargs": {"fps": 2.0}},
        {"fps": 1.0, "media_io_kwargs": {"video": {"fps": 2.0}}},
    ],
    ids=str,
)
def test_contradictions_are_named(places: dict[str, Any]) -> None:
    """Two answers to one question: neither is guessed to be the one that is meant."""
    with pytest.raises(InvalidValue):
        wished(**places)


@pytest.mark.parametrize("field", ["nframes", "min_frames", "max_frames"])
def test_a_list_of_frames_is_not_sampled_again(field: str) -> None:
    """Asked of the list itself it is refused; said of all videos it is meant for others."""
    header = VideoHeader(320, 240, 5, 0.0)
    with pytest.raises(InvalidValue, match=f"leave {field} out"):
        sample_list(header, wished({field: 4}, listed=True), REFERENCE, "it")
    wish = wished(listed=True, mm_processor_kwargs={field: 4})
    assert sample_list(header, wish, REFERENCE, "it").frames == 6


@pytest.mark.parametrize(("own", "rate"), [({}, 5.0), ({"fps": 1.0}, 1.0)], ids=str)
def test_a_list_of_frames_takes_the_requests_rate(own: dict[str, float], rate: float) -> None:
    """Its own goes first; a list is told at the rate at which all videos are said to be."""
    header = VideoHeader(320, 240, 5, 0.0)
    for wish in (
        wished(own, listed=True, mm_processor_kwargs={"fps": 5.0}),
        wished(own, listed=True, fps=5.0),
        wished(own, listed=True, media_io_kwargs={"video": {"fps": 5.0}}),
    ):
        assert sample_list(header, wish, REFERENCE, "it").fps == rate


def test_a_total_too_small_for_the_frames_is_told() -> None:
    """No frame goes below its least size: what that makes of a small total is said."""
    wish = VideoFields(nframes=20, total_pixels=50_000)
    assert sample_file(MINUTE, wish, REFERENCE, "it").clamped
    wish = VideoFields(nframes=20, total_pixels=5_000_000)
    assert not sample_file(MINUTE, wish, REFERENCE, "it").clamped


@pytest.mark.parametrize("size", [{"resized_height": 280}, {"resized_width": 280}])
def test_half_a_size_is_refused(size: dict[str, int]) -> None:
    """Both sides or none."""
    with pytest.raises(InvalidValue, match="give both or none"):
        sampled(MINUTE, nframes=4, **size)
