"""From a video's bytes to the frames that the model sees."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from qwen2vl_serve.errors import APIError, InvalidVideo, VideoTooLarge
from qwen2vl_serve.media import image
from qwen2vl_serve.media.boxes import index_entries
from qwen2vl_serve.media.headers import VideoHeader
from qwen2vl_serve.vision import FRAME_FACTOR

CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"})
"""FFmpeg's names of what is decoded; its many other decoders are never given a stranger's bytes."""

INDEX_ENTRIES = 1_000_000
"""How many samples of sound, subtitles and edits a file may index beside eight for each frame."""

_HELP = "send an mp4, webm or mkv file with H.264, H.265, VP8, VP9, AV1 or MPEG-4 video"


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What is decoded at most: bytes of the file, its frames, pixels of one, seconds of work."""

    max_bytes: int = 64 * 1024 * 1024
    max_frames: int = 18_000
    max_pixels: int = 4096 * 2304
    seconds: float = 30.0


DEFAULT_LIMITS = VideoLimits()


class WorkTime:
    """The seconds that are worked on one video, from its header to its last frame.

    They pass within ``running`` alone: waiting for a turn is not the video's own slowness.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = self._left = seconds

    @contextmanager
    def running(self, param: str) -> Iterator[Callable[[], None]]:
        """Give what is to be called from time to time; it raises ``VideoTooLarge`` at the end."""
        begun = time.monotonic()

        def check() -> None:
            if time.monotonic() - begun > self._left:
                raise VideoTooLarge(
                    f"{param} takes more than {self._seconds:g} seconds to decode; send it "
                    "shorter or smaller, or its frames.",
                    param=param,
                )

        try:
            yield check
        finally:
            self._left -= time.monotonic() - begun


def read_header(
    data: bytes, limits: VideoLimits, param: str, *, work: WorkTime | None = None
) -> VideoHeader:
    """Return what a container holds, reading all of its packets and decoding one frame.

    ``work`` is the video's time; None for one that ends with this.

    Raises:
        InvalidVideo: no container or codec that is served, or one that is damaged.
        VideoTooLarge: beyond ``limits``.
    """
    with (work or WorkTime(limits.seconds)).running(param) as check:
        with _opened(data, limits, param, check) as (container, stream):
            count, packets = _count(container, stream, limits, check, param)
            if packets < stream.frames and not (
                packets >= sum(entry.size > 0 for entry in stream.index_entries)
                and _whole_but_for_edits(data, stream.frames, limits, param, check)
            ):
                raise _invalid(param)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if count == 0 or rate <= 0:
                raise _invalid(param)
        with _opened(data, limits, param, check) as (container, stream):
            first = next(container.decode(stream), None)
            check()
            if first is None:
                raise _invalid(param)
            width, height = first.width, first.height
            if first.rotation % 180:
                width, height = height, width
            return VideoHeader(width, height, count, rate)


def decode(
    data: bytes,
    indices: Sequence[int],
    size: tuple[int, int],
    limits: VideoLimits,
    param: str,
    *,
    work: WorkTime | None = None,
) -> np.ndarray:
    """Return the frames at ``indices``, ascending, as RGB, uint8 [frames, height, width, 3].

    They stand upright and are brought to ``size`` (height, width) as by qwen_vl_utils 0.0.14
    (``fetch_video``).

    Raises:
        InvalidVideo: the data is damaged; no frame is ever made up for a missing one.
        VideoTooLarge: it takes longer than ``limits.seconds``, or than what is left of ``work``.
    """
    count = len(indices)
    frames = np.empty((count, *size, 3), np.uint8)
    filled, shape = 0, None
    with (
        (work or WorkTime(limits.seconds)).running(param) as check,
        _opened(data, limits, param, check) as (container, stream),
    ):
        for number, frame in enumerate(container.decode(stream)):
            check()
            shape = shape or (frame.width, frame.height)
            if frame.is_corrupt or shape != (frame.width, frame.height):
                raise _invalid(param)
            while filled < count and indices[filled] == number:
                frames[filled] = resize(_upright(frame), size)
                filled += 1
            if filled == count:
                return frames
    raise _invalid(param)


def read_listed_header(
    frames: Sequence[bytes],
    fps: float | None,
    limits: VideoLimits,
    param: str,
    formats: Collection[str] = image.FORMATS.keys(),
    *,
    work: WorkTime | None = None,
) -> VideoHeader:
    """Return what a list of pictures is as a video; ``formats`` are Pillow's names.

    Raises:
        InvalidImage, ImageTooLarge: one of them cannot be used; the message names it.
        InvalidVideo: their sizes differ.
        VideoTooLarge: it takes longer than ``limits.seconds``, or than what is left of ``work``.
    """
    with (work or WorkTime(limits.seconds)).running(param) as check:
        first = image.read_header(frames[0], limits.max_pixels, f"{param}[0]", formats)
        for number, data in enumerate(frames[1:], 1):
            check()
            other = image.read_header(data, limits.max_pixels, f"{param}[{number}]", formats)
            if (other.width, other.height) != (first.width, first.height):
                raise InvalidVideo(
                    f"{param}: frame {number} is {other.width} × {other.height} pixels, frame 0 "
                    f"{first.width} × {first.height}; send frames of one size.",
                    param=param,
                )
    return VideoHeader(first.width, first.height, len(frames), fps or 0.0)


def decode_listed(
    frames: Sequence[bytes],
    shape: tuple[int, int],
    size: tuple[int, int],
    limits: VideoLimits,
    param: str,
    *,
    work: WorkTime | None = None,
) -> np.ndarray:
    """Return a list's frames as RGB, uint8 [frames, h, w, 3]; an odd one out is taken twice.

    As by qwen_vl_utils 0.0.14: each is brought to ``shape`` by Pillow, then to ``size``.

    Raises:
        InvalidImage: one of them is damaged.
        VideoTooLarge: it takes longer than ``limits.seconds``, or than what is left of ``work``.
    """
    made = np.empty((len(frames) + len(frames) % FRAME_FACTOR, *size, 3), np.uint8)
    with (work or WorkTime(limits.seconds)).running(param) as check:
        for number, data in enumerate(frames):
            check()
            made[number] = resize(image.decode(data, shape, f"{param}[{number}]"), size)
    made[len(frames) :] = made[len(frames) - 1]
    return made


def frame_indices(total: int, count: int) -> list[int]:
    """Return which frames are taken, as qwen_vl_utils: evenly, the first and the last among them.

    In torch, since its ``linspace`` is of single precision.
    """
    import torch  # noqa: PLC0415  # heavy: only where videos are decoded

    return [int(i) for i in torch.linspace(0, total - 1, count).round().long().tolist()]


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a frame, uint8 [h, w, 3], at ``size`` (height, width).

    Source: torchvision's ``resize`` of a tensor (bicubic, antialiased), which qwen_vl_utils calls.
    """
    import torch  # noqa: PLC0415  # heavy: only where videos are decoded

    if frame.shape[:2] == size:
        return frame
    planes = torch.tensor(frame).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        planes, size=size, mode="bicubic", align_corners=False, antialias=True
    )
    made: np.ndarray = resized.clamp(0, 255).round()[0].permute(1, 2, 0).byte().numpy()
    return made


class _Checked(io.BytesIO):
    """A file that ends what takes too long: in some damaged ones FFmpeg seeks about for ever."""

    def __init__(self, data: bytes, check: Callable[[], None]) -> None:
        super().__init__(data)
        self._check, self._ended = check, False

    def read(self, size: int | None = -1, /) -> bytes:
        return b"" if self._over() else super().read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return -1 if self._over() else super().seek(offset, whence)

    def _over(self) -> bool:
        """Raise the first time; afterwards only the end is told, for PyAV prints what it drops."""
        if not self._ended:
            self._ended = True
            self._check()
            self._ended = False
        return self._ended


@contextmanager
def _opened(
    data: bytes, limits: VideoLimits, param: str, check: Callable[[], None], **options: str
) -> Iterator[tuple[Any, Any]]:
    """Open a container and its video stream; whatever FFmpeg dislikes becomes ``InvalidVideo``.

    ``options`` are those of its reader.

    The format is named, not guessed: playlists among FFmpeg's formats open files and addresses.
    """
    import av  # noqa: PLC0415  # FFmpeg: loaded by the first video

    if data[4:8] in image.MOV_BOXES:
        form = "mov"
        _refuse_long_index(data, limits, param)
    elif data[:4] == b"\x1aE\xdf\xa3":
        form = "matroska"
    else:
        raise _invalid(param)
    try:
        with av.open(_Checked(data, check), format=form, options=options) as container:
            stream = next((s for s in container.streams.video), None)
            if stream is None or stream.codec_context.codec.canonical_name not in CODECS:
                raise _invalid(param)
            context = stream.codec_context
            width, height = context.width, context.height
            if width * height > limits.max_pixels:
                raise VideoTooLarge(
                    f"{param} holds a video of {width} × {height} pixels; at most "
                    f"{limits.max_pixels} pixels a frame are decoded: send it smaller.",
                    param=param,
                )
            context.options = {"err_detect": "explode", "max_pixels": str(limits.max_pixels)}
            context.thread_type = "AUTO"
            yield container, stream
    except APIError:
        raise
    except (av.FFmpegError, ArithmeticError, AttributeError, LookupError, ValueError) as error:
        # PyAV lets what damaged fields cause in its own code through.
        raise _invalid(param) from error


def _refuse_long_index(data: bytes, limits: VideoLimits, param: str) -> None:
    """Refuse a file before FFmpeg opens it: its index may take gigabytes of a few bytes."""
    most = 8 * limits.max_frames + INDEX_ENTRIES
    if index_entries(data, most) > most:
        raise VideoTooLarge(
            f"{param} holds a video whose index is packed or has more than {most} samples, of "
            f"which at most {limits.max_frames} may be frames; send it shorter, or as webm or mkv.",
            param=param,
        )


def _count(
    container: Any, stream: Any, limits: VideoLimits, check: Callable[[], None], param: str
) -> tuple[int, int]:
    """Return how many frames the stream's packets show, and how many packets there are.

    Nothing is decoded.
    """
    frames = packets = 0
    end = Fraction(0)
    for packet in container.demux():
        check()
        if packet.pts is not None and packet.time_base is not None:
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream_index != stream.index or not packet.size:
            continue
        if packet.is_corrupt:
            raise _invalid(param)
        packets += 1
        frames += not packet.is_discard and not _hidden(packet, stream)
        if frames > limits.max_frames:
            raise VideoTooLarge(
                f"{param} holds a video of more than {limits.max_frames} frames; send it shorter.",
                param=param,
            )
    # A file cut short: mp4 tells how many packets there should be, Matroska until when.
    announced = Fraction(container.duration or 0, 1_000_000) - Fraction(1, 4)
    if "matroska" in container.format.name and end < announced:
        raise _invalid(param)
    return frames, packets


def _whole_but_for_edits(
    data: bytes, packets: int, limits: VideoLimits, param: str, check: Callable[[], None]
) -> bool:
    """Tell whether a film has all of its ``packets``, those that its edit list leaves out as well.

    One that was trimmed keeps what is no longer shown; FFmpeg indexes only what is.
    """
    with _opened(data, limits, param, check, ignore_editlist="1") as (_, stream):
        ends = [entry.pos + entry.size for entry in stream.index_entries if entry.size]
    return packets <= len(ends) and all(end <= len(data) for end in ends)


def _hidden(packet: Any, stream: Any) -> bool:
    """Tell a VP8 frame that is only referred to, never shown (RFC 6386, 9.1: bit 4 is clear)."""
    return stream.codec_context.codec.canonical_name == "vp8" and not bytes(packet)[0] & 0x10


def _upright(frame: Any) -> np.ndarray:
    """Return RGB, uint8 [h, w, 3], turned as the container says it is to be shown."""
    rgb: np.ndarray = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def _invalid(param: str) -> InvalidVideo:
    return InvalidVideo(
        f"{param} holds no video that can be decoded whole; {_HELP}, or its frames as pictures.",
        param=param,
    )
