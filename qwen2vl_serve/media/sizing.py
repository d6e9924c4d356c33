"""At which size the model sees a picture: every dialect's pixel fields, clamped to the profile.

``min_pixels`` and ``max_pixels`` may stand beside ``image_url`` (Model Studio), inside it
(LMDeploy) or in ``mm_processor_kwargs`` for the whole request (vLLM); ``resized_height`` and
``resized_width`` beside or inside (qwen_vl_utils); ``detail`` is OpenAI's, with ``low`` as 448 ×
448; ``vl_high_resolution_images`` (Model Studio) asks for the most that the profile admits.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_serve.errors import InvalidImage, InvalidValue
from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.profile_media import MediaSection
from qwen2vl_serve.protocol import ChatRequest, ImagePart, MMProcessorKwargs
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
        InvalidImage: an aspect ratio beyond 200.
    """
    exact = exact_size(
        _given(part, "resized_height", param), _given(part, "resized_width", param), param
    )
    try:
        if exact is not None:
            return brought_within(*exact, bounds.limits)
        budget, clamped = _budget(part, request, bounds, param)
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
    part: ImagePart, request: ChatRequest, bounds: Bounds, param: str
) -> tuple[PixelBudget, bool]:
    """Return the picture's budget within the limits, and whether they changed it."""
    whole = request.mm_processor_kwargs or MMProcessorKwargs()
    low = _given(part, "min_pixels", param) or whole.min_pixels
    high = _given(part, "max_pixels", param) or whole.max_pixels
    if request.vl_high_resolution_images:
        high = bounds.limits.max_pixels
    if low is not None and high is not None and low > high:
        raise InvalidValue(
            f"{param}: min_pixels is {low}, above max_pixels ({high}); lower one or raise the "
            "other.",
            param=param,
        )
    asked_high = high
    if high is None:
        detail = LOW_DETAIL_PIXELS if part.image_url.detail == "low" else bounds.default.max_pixels
        high = max(min(detail, bounds.default.max_pixels), low or 0)
    asked_low = low
    low = min(bounds.default.min_pixels, high) if low is None else low
    floor, ceiling = bounds.limits.min_pixels, bounds.limits.max_pixels
    clamped_high = min(max(high, floor), ceiling)
    clamped_low = min(max(low, floor), clamped_high)
    changed = asked_high not in (None, clamped_high) or asked_low not in (None, clamped_low)
    return PixelBudget(clamped_low, clamped_high), changed


def _given(part: ImagePart, name: str, param: str) -> int | None:
    """Return a field given beside or inside ``image_url``."""
    beside: int | None = getattr(part, name)
    inside: int | None = getattr(part.image_url, name)
    refuse_twice(name, beside, inside, param)
    return inside if beside is None else beside


def refuse_twice(name: str, beside: float | None, inside: float | None, param: str) -> None:
    """Raise ``InvalidValue`` where a field stands in two places with two values."""
    if beside is not None and inside is not None and beside != inside:
        where = param.rpartition(".")[2]
        raise InvalidValue(
            f"{param} gives {name} twice, {beside} beside {where} and {inside} inside; "
            "give it once.",
            param=param,
        )
