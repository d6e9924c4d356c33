"""Which frames of a video the model sees and at which size, as qwen_vl_utils chooses them.

The fields are its own (``fps`` or ``nframes``, ``min_frames``, ``max_frames``; ``min_pixels``,
``max_pixels``, ``total_pixels``; ``resized_height``, ``resized_width``), beside ``video_url``,
inside it, or for the whole request in ``mm_processor_kwargs`` or at the top of the body, where
``media_io_kwargs`` may stand as well; all are clamped to the profile. A video's own word goes
before the request's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qwen2vl_serve.errors import InvalidValue, InvalidVideo
from qwen2vl_serve.media.headers import VideoHeader
from qwen2vl_serve.media.sizing import (
    Bounds,
    Sizing,
    bounds_asked,
    brought_within,
    exact_size,
    refuse_twice,
    shrunk,
)
from qwen2vl_serve.profile.media import MediaSection
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.content import FramesPart, VideoFields, VideoPart
from qwen2vl_serve.vision import FACTOR, FRAME_FACTOR, PixelBudget, smart_resize

# ``FPS``, ``FPS_MIN_FRAMES`` and ``FPS_MAX_FRAMES`` of qwen_vl_utils.
FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768

LISTED_FACTOR = 56
"""qwen_vl_utils brings each frame of a list to multiples of 56 before it sizes the video."""

_LISTED = PixelBudget(4 * LISTED_FACTOR**2, 16384 * LISTED_FACTOR**2)
_CHOICE = ("nframes", "min_frames", "max_frames")
_SAMPLING = ("fps", *_CHOICE)
_SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")


@dataclass(frozen=True, slots=True)
class FrameRules:
    """The profile's word on videos.

    ``bounds`` hold for one frame, ``total_pixels`` for all that the model sees of a video;
    ``fps`` is sampled where a request says nothing, ``max_frames`` the most of any video.
    """

    bounds: Bounds
    total_pixels: int
    fps: float = FPS
    max_frames: int = MAX_FRAMES


# 128 to 768 tokens a frame, and nine tenths of a window of 128,000 for all of them.
_FRAME = PixelBudget(128 * FACTOR**2, 768 * FACTOR**2)
REFERENCE = FrameRules(Bounds(_FRAME, _FRAME), total_pixels=int(128_000 * FACTOR**2 * 0.9))
"""The rules of qwen_vl_utils 0.0.14 without a word from anybody."""


def frame_rules(media: MediaSection) -> FrameRules:
    """Return the profile's word on videos."""
    frames, sampling = media.videos_kwargs, media.media_io_kwargs.video
    return FrameRules(
        bounds=Bounds(
            default=PixelBudget(frames.min_pixels, frames.max_pixels),
            limits=PixelBudget(frames.least_pixels, frames.most_pixels),
        ),
        total_pixels=frames.total_pixels,
        fps=FPS if sampling.fps is None else sampling.fps,
        max_frames=MAX_FRAMES if sampling.num_frames is None else sampling.num_frames,
    )


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the model sees of a video: ``frames``, an even number, at ``sizing``.

    ``fps`` are frames a second, of the video's time, that are taken. ``shape`` is the (height,
    width) that was sized: of a file its own, of a list the one to which Pillow brings each frame
    first. ``fewer`` where the profile's cap lowered ``frames``.
    """

    frames: int
    fps: float
    shape: tuple[int, int]
    sizing: Sizing
    listed: bool
    fewer: bool = False

    @property
    def clamped(self) -> bool:
        """Whether the profile changed what was asked for."""
        return self.fewer or self.sizing.clamped

    @property
    def key(self) -> str:
        """Tells samplings of the same bytes apart."""
        # A file and how many of its frames are taken say at which rate that is; a list does not.
        first = "{}x{}-{!r}-".format(*self.shape, self.fps) if self.listed else ""
        return f"{first}{self.frames}x{self.sizing.height}x{self.sizing.width}"

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers: two frames make one layer."""
        return self.frames // FRAME_FACTOR * self.sizing.visual_tokens

    def within(self, max_pixels: int, bounds: Bounds) -> Sampling:
        """Return the sampling with frames of at most ``max_pixels``."""
        sizing = shrunk(self.shape, self.sizing, max_pixels, bounds)
        return self if sizing == self.sizing else replace(self, sizing=sizing)


def wishes(
    part: VideoPart | FramesPart, request: ChatRequest, param: str, *, listed: bool
) -> VideoFields:
    """Return what is asked of a video, from all the places where it may be said.

    What a part says goes before what the request says of all. A list of frames takes the request's
    rate, but not its choice of frames, which is meant for files beside it.

    Raises:
        InvalidValue: fields that contradict each other.
    """
    inside = part.video_url if isinstance(part, VideoPart) else VideoFields()
    of_all = request.of_all
    whole: dict[str, Any] = {name: getattr(of_all, name) for name in VideoFields.model_fields}
    own: dict[str, Any] = {}
    for name in VideoFields.model_fields:
        beside, within = getattr(part, name), getattr(inside, name)
        refuse_twice(name, beside, within, param)
        own[name] = within if beside is None else beside
    # A part that says how to sample, or how large, is not mixed with another way.
    if listed:
        whole |= dict.fromkeys(_CHOICE)
    elif own["fps"] or own["nframes"]:
        whole |= dict.fromkeys(_SAMPLING)
    elif own["min_frames"] or own["max_frames"]:
        whole["nframes"] = None
    if any(own[name] for name in _SIZES):
        whole |= {"resized_height": None, "resized_width": None}
    asked = {name: whole[name] if value is None else value for name, value in own.items()}
    for what in ("frames", "pixels"):
        low, high = f"min_{what}", f"max_{what}"
        asked[low], asked[high] = bounds_asked(own[low], own[high], whole[low], whole[high])
    _refuse_contradictions(asked, param)
    return VideoFields.model_construct(**asked)


def sample_file(header: VideoHeader, wish: VideoFields, rules: FrameRules, param: str) -> Sampling:
    """Return the sampling of a video file.

    Its rate is ``sample_fps`` of qwen_vl_utils 0.0.14.

    Raises:
        InvalidVideo: fewer than 2 frames, or an aspect ratio beyond 200.
        InvalidValue: ``nframes`` beyond the video's.
    """
    count, fewer = frame_count(header, wish, rules, param)
    shape = header.height, header.width
    sizing = _frame_size(shape, count, wish, rules, param)
    fps = count / header.frames * header.fps
    return Sampling(count, fps, shape, sizing, listed=False, fewer=fewer)


def sample_list(header: VideoHeader, wish: VideoFields, rules: FrameRules, param: str) -> Sampling:
    """Return the sampling of a list of frames: all of them, the last twice to be even.

    Where nobody says at which rate they were taken, it is qwen_vl_utils' own.

    Raises:
        InvalidVideo: an aspect ratio beyond 200.
        InvalidValue: a field that chooses frames.
    """
    for name in _CHOICE:
        if getattr(wish, name) is not None:
            raise InvalidValue(
                f"{param} is a list of frames and gives {name}; frames are taken as they are "
                f"sent: leave {name} out.",
                param=param,
            )
    count = _up(header.frames)
    shape = listed_size((header.height, header.width), wish, rules, param)
    sizing = _frame_size(shape, count, wish, rules, param)
    return Sampling(count, wish.fps or FPS, shape, sizing, listed=True)


def frame_count(
    header: VideoHeader, wish: VideoFields, rules: FrameRules, param: str
) -> tuple[int, bool]:
    """Return how many frames are taken, and whether the profile's cap lowered what was asked for.

    Source: ``smart_nframes`` of qwen_vl_utils 0.0.14.
    """
    total, cap = header.frames, _down(rules.max_frames)
    if total < FRAME_FACTOR:
        raise InvalidVideo(
            f"{param} has a single frame; send it as a picture, or a video of at least "
            f"{FRAME_FACTOR} frames.",
            param=param,
        )
    if wish.nframes is not None:
        asked = round(wish.nframes / FRAME_FACTOR) * FRAME_FACTOR
        if asked > total:
            raise InvalidValue(
                f"{param}: nframes is {wish.nframes}, but the video has {total} frames; ask for "
                "fewer.",
                param=param,
            )
        return min(asked, cap), asked > cap

    def between(low: int, high: int) -> int:
        rate = rules.fps if wish.fps is None else wish.fps
        wanted = total / header.fps * rate
        return _down(min(max(wanted, _up(low)), _down(high), total))

    low = MIN_FRAMES if wish.min_frames is None else wish.min_frames
    high = total if wish.max_frames is None else wish.max_frames
    count = between(low, min(high, cap))
    given = any(getattr(wish, name) is not None for name in _SAMPLING)
    return count, given and count != between(low, high)


def listed_size(
    shape: tuple[int, int], wish: VideoFields, rules: FrameRules, param: str
) -> tuple[int, int]:
    """Return the (height, width) to which Pillow brings a frame of a list first.

    Source: ``fetch_video`` of qwen_vl_utils 0.0.14, which calls ``fetch_image`` with 28 for the
    patch size, so that frames come in multiples of 56 and under the bounds of a picture.

    Raises:
        InvalidVideo: an aspect ratio beyond 200.
    """
    limits = rules.bounds.limits
    exact = exact_size(wish.resized_height, wish.resized_width, param)
    try:
        if exact is not None:
            sizing = brought_within(*exact, limits)
            exact = (sizing.height, sizing.width) if sizing.clamped else exact
            return smart_resize(*exact, _LISTED, LISTED_FACTOR)
        high = _LISTED.max_pixels if wish.max_pixels is None else wish.max_pixels
        low = _LISTED.min_pixels if wish.min_pixels is None else wish.min_pixels
        high = max(high, limits.min_pixels)
        low = min(low, high, max(limits.max_pixels, _LISTED.min_pixels))
        return smart_resize(*shape, PixelBudget(low, high), LISTED_FACTOR)
    except ValueError as error:
        raise _too_narrow(error, param) from None


def _frame_size(
    shape: tuple[int, int], count: int, wish: VideoFields, rules: FrameRules, param: str
) -> Sizing:
    """Return the size of each of ``count`` frames.

    Source: ``fetch_video`` of qwen_vl_utils 0.0.14, whose 768 tokens are ``limits.max_pixels``.
    """
    limits, default = rules.bounds.limits, rules.bounds.default
    exact = exact_size(wish.resized_height, wish.resized_width, param)
    try:
        if exact is not None:
            return brought_within(*exact, limits)
        asked_low, asked_high, asked_total = wish.min_pixels, wish.max_pixels, wish.total_pixels
        ceiling = default.max_pixels if asked_high is None else limits.max_pixels
        low = default.min_pixels if asked_low is None else asked_low
        low = min(max(low, limits.min_pixels), limits.max_pixels)
        total = min(rules.total_pixels, asked_total or rules.total_pixels)
        high: float = max(min(ceiling, total / count * FRAME_FACTOR), int(low * 1.05))
        if asked_high is not None:
            high = max(min(asked_high, high), limits.min_pixels)
            low = min(low, int(high))
        budget = PixelBudget(low, high)  # type: ignore[arg-type]  # a share may be a fraction
        height, width = smart_resize(*shape, budget)
        # The processor behind us, which has the limits, would resize again.
        height, width = smart_resize(height, width, limits)
    except ValueError as error:
        raise _too_narrow(error, param) from None
    changed = (
        asked_high not in (None, high)
        or asked_low not in (None, low)
        or asked_total not in (None, total)
        or height * width * count > FRAME_FACTOR * (asked_total or math.inf)
    )
    return Sizing(height, width, changed)


def _refuse_contradictions(asked: dict[str, Any], param: str) -> None:
    for other in ("fps", "min_frames", "max_frames"):
        if asked["nframes"] is not None and asked[other] is not None:
            raise InvalidValue(
                f"{param} gives nframes ({asked['nframes']}) and {other} ({asked[other]}); "
                "nframes goes alone: give one way to choose frames.",
                param=param,
            )
    for what in ("frames", "pixels"):
        low, high = asked[f"min_{what}"], asked[f"max_{what}"]
        if low is not None and high is not None and low > high:
            raise InvalidValue(
                f"{param}: min_{what} is {low}, above max_{what} ({high}); lower one or raise the "
                "other.",
                param=param,
            )


def _too_narrow(error: ValueError, param: str) -> InvalidVideo:
    return InvalidVideo(f"{param}: {error}; send a less narrow video.", param=param)


def _up(number: float) -> int:
    return math.ceil(number / FRAME_FACTOR) * FRAME_FACTOR


def _down(number: float) -> int:
    return math.floor(number / FRAME_FACTOR) * FRAME_FACTOR
