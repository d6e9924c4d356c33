"""At which size the model sees a picture: every dialect's pixel fields, clamped to the profile.

``min_pixels`` and ``max_pixels`` may stand beside ``image_url`` (Model Studio), inside it
(LMDeploy) or in ``mm_processor_kwargs`` for the whole request (vLLM); ``resized_height`` and
``resized_width`` beside or inside (qwen_vl_utils); ``detail`` is OpenAI's, with ``low`` as 448 ×
448; ``vl_high_resolution_images`` (Model Studio) asks for the most that the profile admits.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_serve.errors import InvalidImage, InvalidValue
from qwen2vl_serve.media.image import Header
from qwen2vl_serve.protocol import ChatRequest, ImagePart, MMProcessorKwargs
from qwen2vl_serve.vision import PixelBudget, smart_resize, visual_tokens

LOW_DETAIL_PIXELS = 448 * 448
"""``detail: low``: 256 visual tokens, as other hosts of this family have it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """``default`` where a request says nothing; ``limits`` for what it may ask for."""

    default: PixelBudget
    limits: PixelBudget


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
    exact = _given(part, "resized_height", param), _given(part, "resized_width", param)
    if (exact[0] is None) != (exact[1] is None):
        raise InvalidValue(
            f"{param} gives one of resized_height and resized_width; give both or none.",
            param=param,
        )
    try:
        if exact[0] is not None and exact[1] is not None:
            wanted = smart_resize(exact[0], exact[1], _UNBOUNDED)
            height, width = smart_resize(exact[0], exact[1], bounds.limits)
            return Sizing(height, width, (height, width) != wanted)
        budget, clamped = _budget(part, request, bounds, param)
        height, width = smart_resize(header.height, header.width, budget)
        # Rounding to 28 can leave a tight budget; the processor behind us would resize again.
        height, width = smart_resize(height, width, bounds.limits)
    except ValueError as error:
        raise InvalidImage(f"{param}: {error}; send a less narrow picture.", param=param) from None
    return Sizing(height, width, clamped)


def shrunk(header: Header, sizing: Sizing, max_pixels: int, bounds: Bounds) -> Sizing:
    """Return ``sizing``, or where it exceeds ``max_pixels`` the picture's size under them."""
    if sizing.height * sizing.width <= max_pixels:
        return sizing
    low = min(bounds.limits.min_pixels, max_pixels)
    size = smart_resize(header.height, header.width, PixelBudget(low, max_pixels))
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
    if beside is not None and inside is not None and beside != inside:
        raise InvalidValue(
            f"{param} gives {name} twice, {beside} beside image_url and {inside} inside; "
            "give it once.",
            param=param,
        )
    return inside if beside is None else beside
