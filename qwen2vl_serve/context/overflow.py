"""What is done with a request that does not fit into the window, by its ``overflow`` policy.

Pure: nothing here decodes or generates; ``summary`` has the policy that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qwen2vl_serve.context.turns import BYTES_PER_TOKEN, Turns, count_media
from qwen2vl_serve.context.window import (
    Context,
    largest_max_pixels,
    refusal,
    refuse_large_items,
    shrunk,
)
from qwen2vl_serve.media.loader import MediaLoader, Medium
from qwen2vl_serve.profile import Overflow
from qwen2vl_serve.protocol.chat import ChatRequest, Message
from qwen2vl_serve.protocol.content import ImagePart, TextPart

REMOVED = "[picture removed]"
"""What stands in the text for a picture that was dropped."""

Measured = Callable[[ChatRequest, Sequence[Medium]], Context]
"""Counts a request exactly, as ``context.measure`` does."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request that fits, and what was done for it (reported as ``overflow``)."""

    request: ChatRequest
    media: Sequence[Medium]
    report: dict[str, object] | None = None


def fit(
    context: Context,
    request: ChatRequest,
    policy: Overflow,
    loader: MediaLoader,
    measured: Measured,
) -> Fitted:
    """Make the request fit by ``policy``, any but ``summarise``.

    ``shrink`` lowers ``max_pixels`` of all pictures and frames alike; ``drop_oldest_images``
    takes pictures out of earlier turns, the oldest first, and never out of the last; videos stay;
    ``drop_oldest_turns`` leaves out whole turns, as few as possible, and never the last.

    Raises:
        ContextLengthExceeded: the policy is ``error``, or does not suffice.
        VideoTooLarge, ImageTooLarge: it leaves an item that the engine does not take.
    """
    if context.fits:
        return Fitted(request, context.media)
    if policy == "shrink":
        budget = largest_max_pixels(context, loader)
        if budget is not None:
            media = shrunk(context, loader, budget).media
            return Fitted(request, media, {"policy": policy, "max_pixels": budget})
    if policy == "drop_oldest_images":
        return _without_oldest(context, request, loader, measured)
    if policy == "drop_oldest_turns":
        return without_turns(context, request, loader, measured)
    refuse_large_items(context.media, context.item)
    raise refusal(context, loader)


def _without_oldest(
    context: Context, request: ChatRequest, loader: MediaLoader, measured: Measured
) -> Fitted:
    last = Turns.of(request, ()).last_begins
    messages = list(request.messages)
    media = list(context.media)
    kept = dropped = 0
    for index, message in enumerate(messages[:last]):
        if isinstance(message.content, str) or message.content is None:
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
            # Words take its place: what would not fit even without them need not be counted.
            text = context.text - dropped * _MARKERS
            if not replace(context, text=text, media=media).fits:
                continue
            rest = request.model_copy(update={"messages": [*messages]})
            # One by one: words can cost more than a small picture did, so that more of them
            # dropped need not be less.
            if measured(rest, [*media]).fits:
                report: dict[str, object] = {
                    "policy": "drop_oldest_images",
                    "dropped_images": dropped,
                }
                return Fitted(rest, [*media], report)
    refuse_large_items(media, context.item)
    raise refusal(context, loader)


_MARKERS = 2
"""Tokens around a picture, at most, that are counted as text and go with it."""


def without_turns(
    context: Context, request: ChatRequest, loader: MediaLoader, measured: Measured
) -> Fitted:
    """Leave out the oldest turns, as few as it takes.

    Raises:
        ContextLengthExceeded, VideoTooLarge, ImageTooLarge: the last turn alone does not fit.
    """
    turns = Turns.of(request, context.media)
    far = turns.over(context.window * BYTES_PER_TOKEN)
    dropped = turns.fewest(lambda count: measured(*turns.without(count)).fits, far)
    rest, media = turns.without(dropped)
    left = measured(rest, media)
    if not left.fits:
        refuse_large_items(media, context.item)
        raise refusal(left, loader)
    report: dict[str, object] = {
        "policy": "drop_oldest_turns",
        "dropped_turns": dropped,
        "saved_tokens": context.prompt - left.prompt,
    }
    return Fitted(rest, media, report)


def trimmed(
    request: ChatRequest, policy: Overflow, images: int, videos: int
) -> tuple[ChatRequest, dict[str, object]]:
    """Return the request with no more media than are taken, and what was left out for that.

    ``drop_oldest_turns`` leaves out turns, ``drop_oldest_images`` and ``summarise`` pictures; what
    does not suffice (pictures of the last turn, videos) is left for ``refuse_excess_media``.
    """
    if policy == "drop_oldest_turns":
        turns = Turns.of(request, ())

        def taken(count: int) -> bool:
            shown = count_media(turns.messages_without(count))
            return shown.images <= images and shown.videos <= videos

        dropped = turns.fewest(taken)
        if not dropped:
            return request, {}
        messages = turns.messages_without(dropped)
        return request.model_copy(update={"messages": messages}), {"dropped_turns": dropped}
    if policy not in ("drop_oldest_images", "summarise"):
        return request, {}
    excess = count_media(request.messages).images - images
    if excess <= 0:
        return request, {}
    last = Turns.of(request, ()).last_begins
    messages = list(request.messages)
    left = excess
    for index, message in enumerate(messages[:last]):
        without, removed = without_pictures(message, left)
        messages[index] = without
        left -= removed
    report: dict[str, object] = {"dropped_images": excess - left}
    return request.model_copy(update={"messages": messages}), report if left < excess else {}


def without_pictures(message: Message, most: int) -> tuple[Message, int]:
    """Return the message with words for its first ``most`` pictures, and how many they were."""
    if isinstance(message.content, str) or message.content is None:
        return message, 0
    removed = 0
    content: list[object] = []
    for part in message.content:
        if isinstance(part, ImagePart) and removed < most:
            content.append(TextPart(type="text", text=REMOVED))
            removed += 1
        else:
            content.append(part)
    return (message.model_copy(update={"content": content}) if removed else message), removed


def merged(fitted: Fitted, policy: Overflow, before: dict[str, object]) -> Fitted:
    """Add to the report what ``trimmed`` left out."""
    if not before:
        return fitted
    report = dict(fitted.report or {"policy": policy})
    for name, count in before.items():
        known = report.get(name, 0)
        report[name] = (known if isinstance(known, int) else 0) + (
            count if isinstance(count, int) else 0
        )
    return replace(fitted, report=report)
