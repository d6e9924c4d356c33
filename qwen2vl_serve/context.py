"""How a request fills the context window, and what to do when it does not fit.

Pure arithmetic over sizes that are already known; nothing here decodes or generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen2vl_serve.errors import ContextLengthExceeded, ImageTooLarge, VideoTooLarge
from qwen2vl_serve.media.loader import MediaLoader, Medium
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.protocol import ChatRequest, ImagePart, Overflow, TextPart
from qwen2vl_serve.vision import FACTOR

REMOVED = "[picture removed]"
"""What stands in the text for a picture that was dropped."""

CountText = Callable[[ChatRequest], int]
"""Tokens of a request's prompt, each picture and video counted as one token."""


@dataclass(frozen=True, slots=True)
class Context:
    """A request against the window; all figures in tokens.

    ``text`` holds the template's tokens and the media's markers as well; ``answer`` is what
    must be left for it: ``max_tokens``, or 1; ``item`` is the most that the engine computes of a
    single picture or video.
    """

    text: int
    media: Sequence[Medium]
    window: int
    answer: int
    item: int

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
    return Context(text, media, window, request.output_limit or 1, item)


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
        return _shrunk(context, loader, tokens * FACTOR**2).fits

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


def refusal(context: Context, loader: MediaLoader) -> ContextLengthExceeded:
    """Return the error that says what each item costs and which budget would fit."""
    costs = ", ".join(f"{medium.param} {medium.visual_tokens} tokens" for medium in context.media)
    budget = largest_max_pixels(context, loader)
    if budget is not None:
        advice = f"max_pixels {budget} for each picture{_or_frame(context)} would fit"
    elif context.media:
        advice = "not even the smallest pictures fit: send fewer, or shorter messages"
        if _or_frame(context):
            advice = "not even the smallest size fits: send fewer items or frames, or less text"
    else:
        advice = "send shorter messages, or ask for fewer tokens"
    return ContextLengthExceeded(
        f"The prompt takes {context.prompt} tokens ({context.text} text"
        f"{'; ' + costs if costs else ''}) and the answer asks for {context.answer}, but "
        f"max_model_len is {context.window}: {advice}.",
        param="messages",
    )


def _or_frame(context: Context) -> str:
    videos = any(not isinstance(medium, Picture) for medium in context.media)
    return " and each frame" if videos else ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request that fits, and what was done for it (reported as ``overflow``)."""

    request: ChatRequest
    media: Sequence[Medium]
    report: dict[str, object] | None = None


def fit(context: Context, request: ChatRequest, policy: Overflow, loader: MediaLoader) -> Fitted:
    """Make the request fit by ``policy``.

    ``shrink`` lowers ``max_pixels`` of all pictures and frames alike; ``drop_oldest_images``
    takes pictures out of earlier turns, the oldest first, and never out of the last; videos stay.

    Raises:
        ContextLengthExceeded: the policy is ``error``, or does not suffice.
        VideoTooLarge, ImageTooLarge: it leaves an item that the engine does not take.
    """
    if context.fits:
        return Fitted(request, context.media)
    if policy == "shrink":
        budget = largest_max_pixels(context, loader)
        if budget is not None:
            media = _shrunk(context, loader, budget).media
            return Fitted(request, media, {"policy": policy, "max_pixels": budget})
    if policy == "drop_oldest_images":
        return _without_oldest(context, request, loader)
    refuse_large_items(context.media, context.item)
    raise refusal(context, loader)


def _shrunk(context: Context, loader: MediaLoader, max_pixels: int) -> Context:
    media = [loader.resized(medium, max_pixels) for medium in context.media]
    return replace(context, media=media)


def _without_oldest(context: Context, request: ChatRequest, loader: MediaLoader) -> Fitted:
    last = len(request.messages) - 1
    messages = list(request.messages)
    media = list(context.media)
    kept = dropped = 0
    for index, message in enumerate(messages[:last]):
        if isinstance(message.content, str):
            continue
        content = list(message.content)
        for place, part in enumerate(content):
            if not isinstance(part, ImagePart):
                kept += not isinstance(part, TextPart)
                continue
            content[place] = TextPart(type="text", text=REMOVED)
            messages[index] = message.model_copy(update={"content": content})
            media.pop(kept)
            dropped += 1
            # A removed picture leaves a few words; counting them as its markers is too little,
            # so the words are counted in full on top.
            text = context.text + dropped * _REMOVED_TOKENS
            now = replace(context, text=text, media=media)
            if now.fits:
                report: dict[str, object] = {
                    "policy": "drop_oldest_images",
                    "dropped_images": dropped,
                }
                return Fitted(request.model_copy(update={"messages": messages}), media, report)
    refuse_large_items(media, context.item)
    raise refusal(context, loader)


_REMOVED_TOKENS = len(REMOVED)
"""No tokenizer of bytes makes more tokens of an ASCII text than it has characters."""
