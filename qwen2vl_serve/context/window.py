"""How a request fills the context window, and what would fit.

Pure arithmetic over sizes that are already known; nothing here decodes or generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen2vl_serve.errors import ContextLengthExceeded, ImageTooLarge, VideoTooLarge
from qwen2vl_serve.media.loader import MediaLoader, Medium
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.vision import FACTOR

CountText = Callable[[ChatRequest], int]
"""Tokens of a request's prompt, each picture and video counted as one token."""


@dataclass(frozen=True, slots=True)
class Context:
    """A request against the window; all figures in tokens.

    ``text`` holds the template's tokens and the media's markers as well; ``answer`` is what
    must be left for it: ``max_tokens``, or 1, and ``asked`` the name that it was asked for by;
    ``item`` is the most that the engine computes of a single picture or video.
    """

    text: int
    media: Sequence[Medium]
    window: int
    answer: int
    item: int
    asked: str = "max_tokens"

    @property
    def visual(self) -> int:
        """Tokens of all pictures and videos."""
        return sum(medium.visual_tokens for medium in self.media)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, as the engine counts them."""
        return self.text + self.visual

    @property
    def fits(self) -> bool:
        """Whether prompt and answer fit into the window, and each item into the engine."""
        return self.prompt + self.answer <= self.window and not self.too_large

    @property
    def too_large(self) -> Sequence[Medium]:
        """The pictures and videos that the engine does not take."""
        return [medium for medium in self.media if medium.visual_tokens > self.item]


def measure(
    request: ChatRequest, media: Sequence[Medium], count_text: CountText, window: int, item: int
) -> Context:
    """Return the request's context.

    ``window`` is ``max_model_len``, ``item`` the engine's ``max_item_tokens``.
    """
    # The count has one token for each of the media, which its visual tokens replace.
    text = count_text(request) - len(media)
    return Context(text, media, window, request.output_limit or 1, item, request.output_field)


def largest_max_pixels(context: Context, loader: MediaLoader) -> int | None:
    """Return the largest ``max_pixels`` for every picture and frame under which the request fits.

    None when it does not fit even with the smallest that the profile admits.
    """
    bounds = [
        loader.bounds if isinstance(medium, Picture) else loader.frame_rules.bounds
        for medium in context.media
    ]
    if not bounds:
        return None
    least = max(1, min(one.limits.min_pixels for one in bounds) // FACTOR**2)
    most = max(one.limits.max_pixels for one in bounds) // FACTOR**2

    def fits(tokens: int) -> bool:
        return shrunk(context, loader, tokens * FACTOR**2).fits

    if not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least * FACTOR**2


def refuse_large_items(media: Sequence[Medium], item: int) -> None:
    """Raise for the first of ``media`` that takes more than ``item`` tokens.

    Raises:
        VideoTooLarge: a video does.
        ImageTooLarge: a picture does.
    """
    for medium in media:
        if medium.visual_tokens > item:
            picture = isinstance(medium, Picture)
            what = "a smaller max_pixels" if picture else "fewer or smaller frames"
            raise (ImageTooLarge if picture else VideoTooLarge)(
                f"{medium.param} takes {medium.visual_tokens} visual tokens; of one item at "
                f"most {item} are computed: ask for {what}, or raise "
                "engine.max_num_batched_tokens in the server's profile.",
                param=medium.param,
            )


def refuse_long_videos(media: Sequence[Medium], seconds: float) -> None:
    """Raise where the videos of a request span more than ``seconds`` together.

    Raises:
        VideoTooLarge: they do.
    """
    videos = [medium for medium in media if not isinstance(medium, Picture)]
    if math.isinf(seconds) or not videos:
        return
    spans = [video.frames_taken / video.sampled_fps for video in videos]
    if sum(spans) <= seconds:
        return
    longest = videos[spans.index(max(spans))]
    raise VideoTooLarge(
        f"{longest.param} spans {max(spans):.0f} seconds ({longest.sampled_fps:g} frames of each "
        f"are shown), all videos of the request {sum(spans):.0f}; this model tells at most "
        f"{seconds:.0f} apart: send a shorter video, or give a list of frames a larger fps.",
        param=longest.param,
    )


def refusal(context: Context, loader: MediaLoader) -> ContextLengthExceeded:
    """Return the error that says what each item costs, and which answer or pictures would fit."""
    costs = ", ".join(f"{medium.param} {medium.visual_tokens} tokens" for medium in context.media)
    left = context.window - context.prompt
    room = 0 < left < context.answer
    ways = [f"{context.asked} of at most {left}"] if room else []
    budget = largest_max_pixels(context, loader)
    if budget is not None:
        ways.append(f"max_pixels {budget} for each picture{_or_frame(context)}")
    if ways:
        advice = f"{', or '.join(ways)} would fit"
    elif context.media:
        advice = "not even the smallest pictures fit: send fewer, or shorter messages"
        if _or_frame(context):
            advice = "not even the smallest size fits: send fewer items or frames, or less text"
    else:
        advice = "send shorter messages"
    begin = f"{context.asked} is {context.answer}, for which t" if room else "T"
    return ContextLengthExceeded(
        # LangChain knows it by "prompt is too long", LiteLLM by "maximum context length is".
        f"{begin}he prompt is too long: it takes {context.prompt} tokens ({context.text} text"
        f"{'; ' + costs if costs else ''}) and the answer asks for {context.answer}, but this "
        f"model's maximum context length is {context.window} tokens (max_model_len is "
        f"{context.window}): {advice}.",
        param=context.asked if room else "messages",
    )


def _or_frame(context: Context) -> str:
    videos = any(not isinstance(medium, Picture) for medium in context.media)
    return " and each frame" if videos else ""


def shrunk(context: Context, loader: MediaLoader, max_pixels: int) -> Context:
    """Return the context with every picture and frame under ``max_pixels``."""
    media = [loader.resized(medium, max_pixels) for medium in context.media]
    return replace(context, media=media)
