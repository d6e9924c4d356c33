"""At which size the model sees a picture: every dialect's pixel fields, clamped to the profile.

``min_pixels``, ``max_pixels``, ``resized_height``, ``resized_width`` (qwen_vl_utils) and OpenAI's
``detail``, with ``low`` as 448 × 448, may stand beside ``image_url`` (Model Studio), inside it
(LMDeploy), or for the whole request in ``mm_processor_kwargs`` (vLLM) or at the top of the body.
A picture's own word goes before the request's. Of one place an exact size goes before bounds; of
``detail: low`` and ``max_pixels`` the smaller holds. ``vl_high_resolution_images`` (Model Studio)
asks for the most that the profile admits, in place of any ``max_pixels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen2vl_serve.errors import InvalidImage, InvalidValue, UnsupportedParameter
from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.profile.media import MediaSection
from qwen2vl_serve.protocol.chat import ChatRequest, MMProcessorKwargs
from qwen2vl_serve.protocol.content import Detail, ImagePart, PixelFields, VideoFields
from qwen2vl_serve.vision import PixelBudget, smart_resize, visual_tokens

LOW_DETAIL_PIXELS = 448 * 448
"""``detail: low``: 256 visual tokens, as other hosts of this family have it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """``default`` where a request says nothing; ``limits`` for what it may ask for."""

    default: PixelBudget
    limits: PixelBudget


def picture_bounds(media: MediaSection) -> Bounds:
    """Return the profile's word on pictures."""
    return Bounds(
        default=PixelBudget(media.min_pixels, media.max_pixels),
        limits=PixelBudget(media.least_pixels, media.most_pixels),
    )


@dataclass(frozen=True, slots=True)
class Sizing:
    """A picture's size for the model, in pixels; ``clamped`` where less or more was asked for."""

    height: int
    width: int
    clamped: bool

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        return visual_tokens(self.height, self.width)


def size_for(
    header: Header, part: ImagePart, request: ChatRequest, bounds: Bounds, param: str
) -> Sizing:
    """Return the size at which ``part`` is shown to the model.

    Raises:
        InvalidValue: fields that contradict each other.
        UnsupportedParameter: fields of a video on a ``file`` part that is a picture.
        InvalidImage: an aspect ratio beyond 200.
    """
    _refuse_video_fields(part, param)
    own, whole = _own(part, param), request.of_all
    exact = exact_size(own.resized_height, own.resized_width, param)
    if exact is None and (own.min_pixels, own.max_pixels, own.detail) == (None, None, None):
        exact = exact_size(whole.resized_height, whole.resized_width, param)
    try:
        if exact is not None:
            return brought_within(*exact, bounds.limits)
        highest = bool(request.vl_high_resolution_images)
        budget, clamped = _budget(own, whole, bounds, param, highest=highest)
        height, width = smart_resize(header.height, header.width, budget)
        # Rounding to 28 can leave a tight budget; the processor behind us would resize again.
        height, width = smart_resize(height, width, bounds.limits)
    except ValueError as error:
        raise InvalidImage(f"{param}: {error}; send a less narrow picture.", param=param) from None
    return Sizing(height, width, clamped)


def exact_size(height: int | None, width: int | None, param: str) -> tuple[int, int] | None:
    """Return ``resized_height`` and ``resized_width``, None where neither is given.

    Raises:
        InvalidValue: one without the other.
    """
    if height is not None and width is not None:
        return height, width
    if height is None and width is None:
        return None
    raise InvalidValue(
        f"{param} gives one of resized_height and resized_width; give both or none.", param=param
    )


def brought_within(height: int, width: int, limits: PixelBudget) -> Sizing:
    """Return a size that was asked for, at multiples of 28 within ``limits``.

    Raises:
        ValueError: an aspect ratio beyond 200.
    """
    wanted = smart_resize(height, width, _UNBOUNDED)
    size = smart_resize(height, width, limits)
    return Sizing(*size, clamped=size != wanted)


def shrunk(shape: tuple[int, int], sizing: Sizing, max_pixels: int, bounds: Bounds) -> Sizing:
    """Return ``sizing``, or where it exceeds ``max_pixels`` the size of ``shape`` under them.

    ``shape`` is the (height, width) before the model's size was chosen.
    """
    if sizing.height * sizing.width <= max_pixels:
        return sizing
    low = min(bounds.limits.min_pixels, max_pixels)
    size = smart_resize(*shape, PixelBudget(low, max_pixels))
    return Sizing(*smart_resize(*size, bounds.limits), clamped=True)


_UNBOUNDED = PixelBudget(1, 2**62)


def _budget(
    own: MMProcessorKwargs, whole: MMProcessorKwargs, bounds: Bounds, param: str, *, highest: bool
) -> tuple[PixelBudget, bool]:
    """Return the picture's budget within the limits, and whether they changed it.

    ``own`` is what the picture says, ``whole`` what the request says of all, ``highest`` whether
    it asks for the most.
    """
    detail: Detail | None
    if own.max_pixels is None and own.detail is not None:
        # The picture says how large; what the request says of all of them is less near.
        most = LOW_DETAIL_PIXELS if own.detail == "low" else bounds.default.max_pixels
        low, _ = bounds_asked(own.min_pixels, most, whole.min_pixels, None)
        high, detail = None, own.detail
    else:
        low, high = bounds_asked(own.min_pixels, own.max_pixels, whole.min_pixels, whole.max_pixels)
        detail = whole.detail if own.max_pixels is None else own.detail
    highest = highest and own.detail != "low"
    if highest:
        high = bounds.limits.max_pixels
    elif low is not None and high is not None and low > high:
        raise InvalidValue(
            f"{param}: min_pixels is {low}, above max_pixels ({high}); lower one or raise the "
            "other.",
            param=param,
        )
    elif detail == "low" and high is not None:
        high = max(min(high, LOW_DETAIL_PIXELS), low or 0)
    asked_low, asked_high = low, high
    if high is None:
        most = LOW_DETAIL_PIXELS if detail == "low" else bounds.default.max_pixels
        high = max(min(most, bounds.default.max_pixels), low or 0)
    low = min(bounds.default.min_pixels, high) if low is None else low
    floor, ceiling = bounds.limits.min_pixels, bounds.limits.max_pixels
    clamped_high = min(max(high, floor), ceiling)
    clamped_low = min(max(low, floor), clamped_high)
    changed = asked_high not in (None, clamped_high) or asked_low not in (None, clamped_low)
    return PixelBudget(clamped_low, clamped_high), changed


def bounds_asked(
    own_low: int | None, own_high: int | None, low: int | None, high: int | None
) -> tuple[int | None, int | None]:
    """Return (least, most): an item's own bounds, else the request's as far as they go with them.

    Only bounds of one place can contradict each other.
    """
    if own_low is not None:
        high = None if high is None else max(high, own_low)
    if own_high is not None:
        low = None if low is None else min(low, own_high)
    return low if own_low is None else own_low, high if own_high is None else own_high


def _own(part: ImagePart, param: str) -> MMProcessorKwargs:
    """Return what the part itself says, beside ``image_url`` or inside."""
    fields: dict[str, Any] = {name: _given(part, name, param) for name in PixelFields.model_fields}
    beside, inside = _said(part.detail), _said(part.image_url.detail)
    refuse_twice("detail", beside, inside, param)
    return MMProcessorKwargs.model_construct(**fields, detail=beside or inside)


def _said(detail: Detail | None) -> Detail | None:
    return None if detail == "auto" else detail


def _given(part: ImagePart, name: str, param: str) -> int | None:
    """Return a field given beside or inside ``image_url``."""
    beside: int | None = getattr(part, name)
    inside: int | None = getattr(part.image_url, name)
    refuse_twice(name, beside, inside, param)
    return inside if beside is None else beside


def _refuse_video_fields(part: ImagePart, param: str) -> None:
    for name in VideoFields.model_fields:
        if name in PixelFields.model_fields or part.of_video is None:
            continue
        if getattr(part.of_video, name) is not None:
            raise UnsupportedParameter(
                f"{param} is no video, and {name} is for videos only: leave {name} out.",
                param=f"{param.rpartition('.')[0]}.{name}",
            )


def refuse_twice(name: str, beside: object, inside: object, param: str) -> None:
    """Raise ``InvalidValue`` where a field stands in two places with two values."""
    if beside is not None and inside is not None and beside != inside:
        where = param.rpartition(".")[2]
        raise InvalidValue(
            f"{param} gives {name} twice, {beside} beside {where} and {inside} inside; "
            "give it once.",
            param=param,
        )
