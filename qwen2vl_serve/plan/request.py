"""What a request costs: visual tokens of its pictures and videos under the profile's bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen2vl_serve.errors import APIError, PreflightError
from qwen2vl_serve.media.headers import VideoHeader
from qwen2vl_serve.media.sampling import frame_rules, sample_file
from qwen2vl_serve.media.sizing import picture_bounds
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.yaml import shown
from qwen2vl_serve.protocol.content import VideoFields
from qwen2vl_serve.vision import MARKER_TOKENS, smart_resize, visual_tokens

FILE_FPS = 30.0
"""Frames a second of a video of which only the seconds are known."""

COMMON_PICTURES = ((512, 512), (1280, 720), (1280, 960), (1920, 1080), (2480, 3508), (4032, 3024))
"""Widths and heights of icons, screens, a page of A4 at 300 dpi and 12 megapixels."""

_FORMS = '"2 images 1280x960, 300 in, 200 out" or "1 video 640x480 10s, 100 in, 100 out"'
_MEDIUM = re.compile(
    r"(?:(\d{1,9}) )?(image|picture|video)s? (\d{1,9})[x×*](\d{1,9})"
    r"(?: (\d{1,9}(?:\.\d{1,9})?) ?s)?",
    re.IGNORECASE,
)
_TEXT = re.compile(r"(\d{1,9}) (?:tokens? )?(in|out)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Medium:
    """``count`` pictures, or videos of ``seconds``; sides in pixels of the file."""

    count: int
    width: int
    height: int
    seconds: float | None = None

    @property
    def frames(self) -> int:
        """Frames of the file, as of ``FILE_FPS``; none of a picture."""
        return 0 if self.seconds is None else max(1, round(self.seconds * FILE_FPS))


@dataclass(frozen=True, slots=True)
class Request:
    """A typical request: its media, and the tokens of its text and of the answer."""

    media: tuple[Medium, ...] = ()
    text: int = 300
    answer: int = 200


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens of a request in the KV cache."""

    visual: int
    text: int
    answer: int

    @property
    def total(self) -> int:
        """All tokens together."""
        return self.visual + self.text + self.answer


def parse_request(text: str) -> Request:
    """Read ``2 images 1280x960, 300 in, 200 out``; what is not said of text is 300 in, 200 out.

    Raises:
        PreflightError: anything else.
    """
    media: list[Medium] = []
    tokens: dict[str, int] = {}
    for part in (part.strip() for part in re.split("[,，]", text)):
        if found := _TEXT.fullmatch(part):
            kind = found[2].lower()
            if kind in tokens:
                raise PreflightError(f"--typical {part!r}: {kind} is said twice; say it once")
            tokens[kind] = int(found[1])
        elif found := _MEDIUM.fullmatch(part):
            if found[1] is not None and not int(found[1]):
                raise PreflightError(f"--typical {part!r}: none of them; leave it out")
            video = found[2].lower() == "video"
            if video != (found[5] is not None):
                raise PreflightError(f"--typical {part!r}: videos have seconds, as in {_FORMS}")
            seconds = float(found[5]) if video else None
            media.append(Medium(int(found[1] or 1), int(found[3]), int(found[4]), seconds))
        else:
            raise PreflightError(f"--typical {shown(part)}: must be of the form {_FORMS}")
    return Request(tuple(media), tokens.get("in", 300), tokens.get("out", 200))


def default_request(profile: Profile) -> Request:
    """Return the request that is counted where none is given: a screen's picture, if allowed."""
    screen, media = Medium(1, 1280, 960), profile.media
    most = min(media.max_image_pixels, profile.limits.max_media_pixels)
    allowed = media.limit_mm_per_prompt.image and screen.width * screen.height <= most
    answer = min(Request().answer, profile.limits.max_tokens or Request().answer)
    return Request((screen,) if allowed else (), answer=answer)


def cost_of(request: Request, profile: Profile) -> Cost:
    """Count a request's tokens under the profile.

    Raises:
        PreflightError: more media, pixels, frames or tokens of an answer than the profile allows
            a request, or a medium that no size fits.
    """
    visual = pixels = frames = 0
    limits = profile.media.limit_mm_per_prompt
    counts = {"image": 0, "video": 0}
    for medium in request.media:
        kind = "image" if medium.seconds is None else "video"
        counts[kind] += medium.count
        _refuse_larger_than_decoded(medium, profile)
        try:
            tokens, taken = _taken(medium, profile)
        except (ValueError, APIError) as error:
            raise PreflightError(f"--typical: {error}") from None
        visual += medium.count * (tokens + MARKER_TOKENS)
        frames += medium.count * taken
        pixels += medium.count * max(1, taken) * medium.width * medium.height
    for kind, count in counts.items():
        most = limits.image if kind == "image" else limits.video
        if count > most:
            what = f"{count} {kind}{'s' * (count > 1)}"
            raise PreflightError(
                f"--typical: {what}, but media.limit_mm_per_prompt.{kind} is {most}; raise it or "
                "ask for fewer"
            )
    _refuse_beyond("max_media_pixels", pixels, "pixels to decode", profile)
    _refuse_beyond("max_media_frames", frames, "frames of videos", profile)
    _refuse_beyond("max_tokens", request.answer, "tokens of the answer", profile)
    return Cost(visual, request.text, request.answer)


def _refuse_beyond(field: str, amount: int, what: str, profile: Profile) -> None:
    """Raise where the whole request is more than a field of ``limits`` lets it be."""
    most = getattr(profile.limits, field)
    if most is not None and amount > most:
        raise PreflightError(
            f"--typical: {amount} {what}, but limits.{field} is {most}; raise it or ask for less"
        )


def _refuse_larger_than_decoded(medium: Medium, profile: Profile) -> None:
    field = "max_image_pixels" if medium.seconds is None else "max_video_pixels"
    most, pixels = getattr(profile.media, field), medium.width * medium.height
    if pixels > most:
        raise PreflightError(
            f"--typical: {medium.width}x{medium.height} are {pixels} pixels, but media.{field} is "
            f"{most}; raise it or ask for smaller ones"
        )
    if medium.frames > profile.media.max_video_frames:
        raise PreflightError(
            f"--typical: {medium.seconds:g} s are {medium.frames} frames of {FILE_FPS:g} a second, "
            f"but media.max_video_frames is {profile.media.max_video_frames}; raise it or ask for "
            "shorter ones"
        )


def _taken(medium: Medium, profile: Profile) -> tuple[int, int]:
    """Return a medium's visual tokens, and the frames that are taken of a video."""
    if medium.seconds is None:
        return picture_tokens(medium.width, medium.height, profile), 0
    header = VideoHeader(medium.width, medium.height, medium.frames, FILE_FPS)
    sampling = sample_file(header, VideoFields(), frame_rules(profile.media), "the video")
    return sampling.visual_tokens, sampling.frames


def picture_tokens(width: int, height: int, profile: Profile) -> int:
    """Visual tokens of a picture without a request's own pixel fields, without its markers.

    Raises:
        ValueError: an aspect ratio beyond 200.
    """
    bounds = picture_bounds(profile.media)
    size = smart_resize(height, width, bounds.default)
    return visual_tokens(*smart_resize(*size, bounds.limits))
