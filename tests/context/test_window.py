"""Fitting requests into the window: what is counted, shrunk, dropped, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.context import overflow
from qwen2vl_serve.context.overflow import REMOVED, Fitted
from qwen2vl_serve.context.window import (
    Context,
    largest_max_pixels,
    measure,
    refusal,
    refuse_large_items,
)
from qwen2vl_serve.errors import ContextLengthExceeded, ImageTooLarge, VideoTooLarge
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.image import Header
from qwen2vl_serve.media.loader import MediaLoader, Medium
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.media.sampling import FrameRules, Sampling
from qwen2vl_serve.media.sizing import Bounds, Sizing
from qwen2vl_serve.media.video import DEFAULT_LIMITS, VideoHeader
from qwen2vl_serve.profile import Overflow
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from qwen2vl_serve.vision import PixelBudget, smart_resize
from tests.fake_engine import FakeEngine

LIMITS = RequestLimits(max_messages=99, max_n=1, max_tokens=None, images=99, videos=99)
BUDGET = PixelBudget(4 * 784, 1280 * 784)
FRAME = PixelBudget(16 * 784, 300 * 784)
FRAME_RULES = FrameRules(Bounds(FRAME, FRAME), total_pixels=10**8)
LOADER = MediaLoader(Fetcher(FetchPolicy()), Bounds(BUDGET, BUDGET), 10**8, FRAME_RULES)


def pictures(*sizes: tuple[int, int]) -> list[Picture]:
    made = []
    for number, (width, height) in enumerate(sizes):
        sizing = Sizing(*smart_resize(height, width, BUDGET), clamped=False)
        header = Header("PNG", width, height)
        made.append(Picture(b"", header, sizing, f"digest{number}", f"messages[{number}]"))
    return made


def videos(*sizes: tuple[int, int], frames: int = 8) -> list[Video]:
    made = []
    for number, (width, height) in enumerate(sizes):
        sizing = Sizing(*smart_resize(height, width, FRAME), clamped=False)
        sampling = Sampling(frames, 2.0, (height, width), sizing, listed=False)
        header = VideoHeader(width, height, 100, 25.0)
        made.append(Video([b""], header, sampling, DEFAULT_LIMITS, f"film{number}", "film"))
    return made


def chat(turns: int, last_pictures: int = 1, **fields: Any) -> ChatRequest:
    """``turns`` user turns with a picture each, answers between them."""
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        count = last_pictures if turn == turns - 1 else 1
        content = [image] * count + [{"type": "text", "text": f"question {turn}"}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    body = {"messages": messages[:-1], **fields}
    return parse_chat(json.dumps(body).encode(), LIMITS)


def context(
    request: ChatRequest, shown: Sequence[Medium], window: int, item: int = 10**6
) -> Context:
    return measure(request, shown, FakeEngine().count_tokens, window, item)


def fit(seen: Context, request: ChatRequest, policy: Overflow, loader: MediaLoader) -> Fitted:
    def measured(one: ChatRequest, media: Sequence[Medium]) -> Context:
        return context(one, media, seen.window, seen.item)

    return overflow.fit(seen, request, policy, loader, measured)


def test_a_prompt_is_its_text_and_its_visual_tokens() -> None:
    """Each picture's one token in the text's count is replaced by its visual tokens."""
    request = chat(2)
    shown = pictures((280, 280), (560, 280))
    seen = context(request, shown, 4096)
    assert seen.visual == 100 + 200
    assert seen.text == len(["question", "0", "a", "question", "1"])
    assert seen.prompt == seen.text + 300
    assert seen.fits


def test_the_answer_must_fit_as_well() -> None:
    """``max_tokens`` is part of the sum; without it one token must be left."""
    shown = pictures((280, 280))
    assert context(chat(1), shown, 103).fits
    assert not context(chat(1), shown, 102).fits
    assert not context(chat(1, max_tokens=100), shown, 201).fits
    assert context(chat(1, max_tokens=100), shown, 202).fits


sizes = st.lists(st.tuples(st.integers(20, 4000), st.integers(20, 4000)), min_size=1, max_size=6)


@settings(deadline=None)
@given(
    sizes,
    st.lists(st.tuples(st.integers(20, 2000), st.integers(20, 2000)), max_size=2),
    st.integers(10, 9000),
)
def test_the_largest_budget_fits_and_a_larger_one_does_not(
    shapes: list[tuple[int, int]], films: list[tuple[int, int]], window: int
) -> None:
    """What the error advises, and shrink applies, is the best that there is."""
    request = chat(1, len(shapes) + len(films))
    shown = [*pictures(*shapes), *videos(*films)]
    seen = context(request, shown, window)
    if seen.fits:
        assert fit(seen, request, "shrink", LOADER).media == shown
        return
    budget = largest_max_pixels(seen, LOADER)
    if budget is None:
        with pytest.raises(ContextLengthExceeded):
            fit(seen, request, "shrink", LOADER)
        return
    fitted = fit(seen, request, "shrink", LOADER)
    assert context(request, list(fitted.media), window).fits
    assert fitted.report == {"policy": "shrink", "max_pixels": budget}
    larger = [LOADER.resized(picture, budget + 784) for picture in shown]
    assert budget == BUDGET.max_pixels or not context(request, larger, window).fits


def test_a_video_costs_its_layers() -> None:
    """Two frames of 280 × 280 pixels make 100 tokens."""
    seen = context(chat(1), videos((280, 280), frames=8), 4096)
    assert (seen.visual, seen.prompt) == (400, seen.text + 400)
    assert seen.text == len(["question", "0"])


def test_a_video_is_shrunk_by_its_frames_and_named_in_the_refusal() -> None:
    """Never by leaving frames out; what would fit is said of pictures and frames alike."""
    request, shown = chat(1, 2), [*pictures((560, 560)), *videos((560, 420), frames=8)]
    seen = context(request, shown, 700)
    fitted = fit(seen, request, "shrink", LOADER)
    assert context(request, fitted.media, 700).fits
    film = fitted.media[1]
    assert isinstance(film, Video)
    assert film.sampling.frames == 8
    assert film.sampling.clamped
    message = refusal(seen, LOADER).message
    assert "film 1200 tokens" in message
    assert "for each picture and each frame would fit" in message
    hopeless = refusal(context(request, shown, 20), LOADER).message
    assert "not even the smallest size fits" in hopeless


def test_dropping_pictures_leaves_videos_alone() -> None:
    """A video of an earlier turn stays, whatever comes before or after it."""
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    film = {"type": "video_url", "video_url": {"url": "data:x"}}
    text = {"type": "text", "text": "words"}
    turns = [[film, image, text], [image, film, text], [image, text]]
    body = {"messages": [{"role": "user", "content": content} for content in turns]}
    request = parse_chat(json.dumps(body).encode(), LIMITS)
    one, two, three = pictures((560, 560), (560, 560), (560, 560))
    first, second = videos((112, 112), (112, 112))
    shown: list[Medium] = [first, one, two, second, three]
    small = fit(context(request, shown, 600), request, "drop_oldest_images", LOADER)
    assert [medium.key for medium in small.media] == [m.key for m in (first, second, three)]
    assert small.report == {"policy": "drop_oldest_images", "dropped_images": 2}
    larger = fit(context(request, shown, 1000), request, "drop_oldest_images", LOADER)
    assert list(larger.media) == [first, two, second, three]


def test_oldest_pictures_are_dropped_first_and_the_last_turns_never() -> None:
    """Three turns; room for two pictures: the first one's place is told in words."""
    request, shown = chat(3), pictures((560, 560), (560, 560), (560, 560))
    fitted = fit(context(request, shown, 900), request, "drop_oldest_images", LOADER)
    assert [picture.digest for picture in fitted.media] == ["digest1", "digest2"]
    assert fitted.report == {"policy": "drop_oldest_images", "dropped_images": 1}
    first = fitted.request.messages[0].content[0]
    assert getattr(first, "text", None) == REMOVED
    assert request.messages[0].content[0] != first, "the request itself is unchanged"
    alone = fit(context(request, shown, 500), request, "drop_oldest_images", LOADER)
    assert [picture.digest for picture in alone.media] == ["digest2"]
    with pytest.raises(ContextLengthExceeded):
        fit(context(request, shown, 350), request, "drop_oldest_images", LOADER)


@pytest.mark.parametrize(
    ("side", "lacking", "dropped"), [(84, 21, 3), (84, 22, 4), (140, 46, 2), (140, 47, 3)]
)
def test_no_more_pictures_are_dropped_than_it_takes(side: int, lacking: int, dropped: int) -> None:
    """The words left in their places are counted as the engine counts them: two tokens each.

    40 pictures of 9 or 25 tokens, of which each that goes frees 7 or 23.
    """
    request, shown = chat(40), pictures(*[(side, side)] * 40)
    window = context(request, shown, 10**6).prompt + 1 - lacking
    fitted = fit(context(request, shown, window), request, "drop_oldest_images", LOADER)
    assert fitted.report == {"policy": "drop_oldest_images", "dropped_images": dropped}
    assert context(fitted.request, fitted.media, window).fits
    assert [one.digest for one in fitted.media] == [one.digest for one in shown[dropped:]]


def test_a_picture_smaller_than_the_words_in_its_place_ends_nothing() -> None:
    """Dropping it too would cost more: the fewest that fit are found before it."""
    request = chat(3)
    shown = pictures((280, 280), (56, 56), (280, 280))
    small = [replace(shown[1], sizing=Sizing(28, 28, clamped=False))]
    media: list[Medium] = [shown[0], *small, shown[2]]
    window = context(request, media, 10**6).prompt + 1 - 98
    fitted = fit(context(request, media, window), request, "drop_oldest_images", LOADER)
    assert fitted.report == {"policy": "drop_oldest_images", "dropped_images": 1}


def test_a_refusal_names_each_pictures_cost_and_what_would_fit() -> None:
    """The operator's and the user's question, answered in the message."""
    request, shown = chat(1, 2), pictures((560, 560), (280, 280))
    message = refusal(context(request, shown, 300), LOADER).message
    assert "messages[0] 400 tokens" in message
    assert "messages[1] 100 tokens" in message
    assert "max_model_len is 300" in message
    assert f"max_pixels {largest_max_pixels(context(request, shown, 300), LOADER)}" in message
    hopeless = refusal(context(request, shown, 5), LOADER).message
    assert "not even the smallest pictures fit" in hopeless


def test_a_refusal_names_the_largest_max_tokens_beside_the_largest_pictures() -> None:
    """Where the prompt alone fits, either of the two makes room."""
    request, shown = chat(1, max_tokens=250), pictures((280, 280))
    message = refusal(context(request, shown, 300), LOADER).message
    assert "max_tokens of at most 198, or max_pixels 37632 for each picture would fit" in message
    alone = refusal(context(chat(1, max_tokens=400), shown, 300), LOADER).message
    assert alone.endswith(": max_tokens of at most 198 would fit.")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_too_long_is_named_and_not_the_messages(name: str) -> None:
    """Where the prompt alone fits: the field as it was sent, its value, the largest that fits."""
    refused = refusal(context(chat(1, **{name: 400}), [], 300), LOADER)
    assert refused.param == name
    assert refused.message.startswith(f"{name} is 400, for which the prompt is too long: it takes")
    assert re.search(rf": {name} of at most \d+ would fit\.$", refused.message)
    assert refusal(context(chat(1), pictures((560, 560)), 300), LOADER).param == "messages"


def test_what_fits_is_left_alone() -> None:
    """No policy touches a request that fits."""
    request, shown = chat(1), pictures((280, 280))
    for policy in ("error", "shrink", "drop_oldest_images"):
        fitted = fit(context(request, shown, 4096), request, policy, LOADER)
        assert (fitted.request, fitted.report) == (request, None)


@settings(deadline=None)
@given(sizes, st.integers(16, 1500))
def test_an_item_that_the_engine_does_not_take_does_not_fit(
    shapes: list[tuple[int, int]], item: int
) -> None:
    """However much of the window is left; what is advised then fits, item by item."""
    request = chat(1, len(shapes) + 1)
    shown = [*pictures(*shapes), *videos((280, 280), frames=8)]
    seen = context(request, shown, 10**6, item)
    large = [medium for medium in shown if medium.visual_tokens > item]
    assert (list(seen.too_large), seen.fits) == (large, not large)
    budget = largest_max_pixels(seen, LOADER)
    if budget is not None:
        shrunk = [LOADER.resized(medium, budget) for medium in shown]
        assert context(request, shrunk, 10**6, item).fits
        assert fit(seen, request, "shrink", LOADER).media == shrunk or not large
    if large:
        kind = ImageTooLarge if large[0] in shown[: len(shapes)] else VideoTooLarge
        with pytest.raises(kind, match=rf"{large[0].visual_tokens} visual tokens.* {item} "):
            fit(seen, request, "error", LOADER)
    else:
        refuse_large_items(shown, item)


def test_a_refusal_is_in_the_words_that_other_clients_know_it_by() -> None:
    """LangChain and LiteLLM have an error of its own for it, and tell it by the message alone."""
    for request, shown in ((chat(1, 0), []), (chat(1), pictures((560, 560)))):
        message = refusal(context(request, shown, 300), LOADER).message
        assert "prompt is too long" in message
        assert "this model's maximum context length is 300 tokens" in message
