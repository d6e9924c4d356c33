"""From the media parts of a request to pictures and videos that an engine can take.

They are known by their content: the key hashes the bytes and names the size, never anything
that a client says. Pixels are decoded when they are first needed; of a key that was decoded
before, the engine's own cache usually needs no pixels at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from blake3 import blake3

from qwen2vl_serve.errors import (
    ImageDownloadTimeout,
    InvalidImage,
    InvalidImageURL,
    InvalidVideo,
    MediaTooLarge,
    RequestError,
    TooManyItems,
    UnknownFile,
    VideoTooLarge,
)
from qwen2vl_serve.media import video
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchTimeout
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.gate import Gate
from qwen2vl_serve.media.headers import Header, VideoHeader
from qwen2vl_serve.media.image import FORMATS, decode, read_header
from qwen2vl_serve.media.sampling import (
    REFERENCE,
    FrameRules,
    Sampling,
    sample_file,
    sample_list,
    wishes,
)
from qwen2vl_serve.media.sizing import Bounds, Sizing, shrunk, size_for
from qwen2vl_serve.media.sources import DataURLError, Sources, UnknownFileID
from qwen2vl_serve.media.video import DEFAULT_LIMITS, VideoLimits
from qwen2vl_serve.protocol import (
    ChatRequest,
    FramesPart,
    ImagePart,
    TextPart,
    VideoFields,
    VideoPart,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

KNOWN_KEYS = 65_536
"""How many keys are remembered as decodable; 64 hex digits and a size each."""

DECODE_THREADS = 4


@dataclass(slots=True)
class Picture:
    """One picture of a request; ``digest`` is the hash of its bytes."""

    data: bytes = field(repr=False)
    header: Header
    sizing: Sizing
    digest: str
    param: str
    fast: bool = False
    decoded: bool = False
    _pixels: np.ndarray | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Stands for its content at its size."""
        way = "-fast" if self.fast else ""
        return f"{self.digest}-{self.sizing.height}x{self.sizing.width}{way}"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of ``pixels``."""
        return self.sizing.width, self.sizing.height

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        return self.sizing.visual_tokens

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.data)

    @property
    def source_pixels(self) -> int:
        """Pixels of the file, which decoding holds in memory."""
        return self.header.width * self.header.height

    @property
    def frames_taken(self) -> int:
        """None: a picture has no frames."""
        return 0

    def decode(self) -> None:
        """Have ``pixels`` ready."""
        self.pixels()

    def pixels(self) -> np.ndarray:
        """Return RGB at the model's size, uint8 [height, width, 3]; decodes once.

        Raises:
            InvalidImage: the data is corrupt.
        """
        if self._pixels is None:
            size = self.sizing.height, self.sizing.width
            self._pixels = decode(self.data, size, self.param, fast=self.fast)
            self.decoded = True
        return self._pixels

    def info(self) -> dict[str, object]:
        """What ``include_media_info`` reports; sides in pixels."""
        return {
            "type": "image",
            "width": self.header.width,
            "height": self.header.height,
            "resized_width": self.sizing.width,
            "resized_height": self.sizing.height,
            "visual_tokens": self.sizing.visual_tokens,
            "clamped": self.sizing.clamped,
            "cached": not self.decoded,
        }


@dataclass(slots=True)
class Video:
    """One video of a request: a container's bytes, or those of each frame.

    ``digest`` is the hash of them all.
    """

    data: Sequence[bytes] = field(repr=False)
    header: VideoHeader
    sampling: Sampling
    limits: VideoLimits
    digest: str
    param: str
    decoded: bool = False
    _frames: np.ndarray | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """Stands for its content, the frames that are taken and their size."""
        # A file could be made whose hash is that of a list: the kind tells them apart.
        kind = "frames" if self.sampling.listed else "video"
        return f"{kind}-{self.digest}-{self.sampling.key}"

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        return self.sampling.visual_tokens

    @property
    def size_bytes(self) -> int:
        """Size of the file, or of all frames' files."""
        return sum(map(len, self.data))

    @property
    def source_pixels(self) -> int:
        """Pixels of the frames that are taken, at their own size."""
        return self.sampling.frames * self.header.width * self.header.height

    @property
    def frames_taken(self) -> int:
        """How many frames are shown to the model."""
        return self.sampling.frames

    def decode(self) -> None:
        """Have ``frames`` ready."""
        self.frames()

    def frames(self) -> np.ndarray:
        """Return RGB at the model's size, uint8 [frames, height, width, 3]; decodes once.

        Raises:
            InvalidVideo, InvalidImage: the data is damaged.
            VideoTooLarge: decoding takes too long.
        """
        if self._frames is None:
            sizing, limits = self.sampling.sizing, self.limits
            size = sizing.height, sizing.width
            if self.sampling.listed:
                shape = self.sampling.shape
                self._frames = video.decode_listed(self.data, shape, size, limits, self.param)
            else:
                indices = video.frame_indices(self.header.frames, self.sampling.frames)
                self._frames = video.decode(self.data[0], indices, size, limits, self.param)
            self.decoded = True
        return self._frames

    def info(self) -> dict[str, object]:
        """What ``include_media_info`` reports; sides in pixels, duration in seconds."""
        return {
            "type": "video",
            "width": self.header.width,
            "height": self.header.height,
            "duration": self.header.duration,
            "fps": round(self.header.fps, 3) or None,
            "source_frames": self.header.frames,
            "frames": self.sampling.frames,
            "resized_width": self.sampling.sizing.width,
            "resized_height": self.sampling.sizing.height,
            "visual_tokens": self.visual_tokens,
            "clamped": self.sampling.clamped,
            "cached": not self.decoded,
        }


Medium = Picture | Video
_Medium = TypeVar("_Medium", bound=Medium)


@dataclass(frozen=True, slots=True)
class MediaBudget:
    """What all media of one request may add up to."""

    max_media_bytes: int = 128 * 1024 * 1024
    max_media_pixels: int = 200_000_000
    max_media_frames: int = 1536


class MediaLoader:
    """Loads what requests show; one for a server.

    ``folders`` are those that ``file:`` addresses may lead into, ``files`` what clients uploaded,
    ``formats`` the kinds of pictures that are taken, by Pillow's names. ``fast_decode`` trades
    exact pixels of JPEGs for time. At most ``max_decoding_pixels`` of the files are decoded at
    once over all requests; what comes then waits.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        bounds: Bounds,
        max_image_pixels: int,
        frame_rules: FrameRules = REFERENCE,
        video_limits: VideoLimits = DEFAULT_LIMITS,
        *,
        folders: Sequence[str] = (),
        files: FileStore | None = None,
        formats: Collection[str] = FORMATS.keys(),
        fast_decode: bool = False,
        budget: MediaBudget = MediaBudget(),
        max_decoding_pixels: int = 400_000_000,
    ) -> None:
        self.fetcher = fetcher
        self.sources = Sources(fetcher, folders, files)
        self.files = files
        self.formats = formats
        self.fast_decode = fast_decode
        self.budget = budget
        self.decoding = Gate(max_decoding_pixels)
        self.bounds = bounds
        self.frame_rules = frame_rules
        self._max_image_pixels = max_image_pixels
        self.video_limits = video_limits
        self._known: OrderedDict[str, None] = OrderedDict()
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")

    async def load(self, request: ChatRequest) -> Sequence[Medium]:
        """Return the pictures and videos of ``request`` in the order of its text.

        Raises:
            RequestError: one of them cannot be fetched, decoded or sized; the message names it.
        """
        media = await _all_of(self._medium(*one, request) for one in _media(request))
        self._refuse_excess(media)
        await self.ready(media)
        return media

    async def ready(self, media: Sequence[Medium]) -> None:
        """Decode new bytes, in threads and where errors still have a status."""
        await _all_of(self._decoded_once(medium) for medium in media)

    def resized(self, medium: Medium, max_pixels: int) -> Medium:
        """Return ``medium`` at its own size or under ``max_pixels``, whichever is smaller.

        Of a video it is the size of each frame.
        """
        if isinstance(medium, Video):
            sampling = medium.sampling.within(max_pixels, self.frame_rules.bounds)
            if sampling == medium.sampling:
                return medium
            return replace(medium, sampling=sampling, decoded=False, _frames=None)
        shape = medium.header.height, medium.header.width
        sizing = shrunk(shape, medium.sizing, max_pixels, self.bounds)
        if sizing == medium.sizing:
            return medium
        return replace(medium, sizing=sizing, decoded=False, _pixels=None)

    async def close(self) -> None:
        """Close connections and threads."""
        await self.sources.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _medium(
        self, part: ImagePart | VideoPart | FramesPart, param: str, request: ChatRequest
    ) -> Medium:
        if isinstance(part, ImagePart):
            return await self._picture(part, param, request)
        return await self._video(part, param, request)

    async def _picture(self, part: ImagePart, param: str, request: ChatRequest) -> Picture:
        if part.page is None:
            data = await self.read(part.image_url.address, param)
            header = self.inspect(data, param)
        else:
            data = part.page
            header = read_header(data, self._max_image_pixels, param)
        sizing = size_for(header, part, request, self.bounds, param)
        return Picture(data, header, sizing, blake3(data).hexdigest(), param, self.fast_decode)

    async def _video(self, part: VideoPart | FramesPart, param: str, request: ChatRequest) -> Video:
        source = part.video_url.url if isinstance(part, VideoPart) else part.video
        frames = _frame_urls(source, self.frame_rules.max_frames, param)
        wish = wishes(part, request, param, listed=frames is not None)
        if frames is not None:
            each = [self.read(url, f"{param}[{n}]") for n, url in enumerate(frames)]
            data = await _all_of(each)
        else:
            data = [await self._video_bytes(str(source), param)]
        self._refuse_large(sum(map(len, data)), param)
        return await self._in_pool(self._sampled, data, wish, frames is not None, param)

    def _sampled(self, data: Sequence[bytes], wish: VideoFields, listed: bool, param: str) -> Video:
        """Read the headers, which takes time: a container is read to its end."""
        limits, rules = self.video_limits, self.frame_rules
        if listed:
            header = video.read_listed_header(data, wish.fps, limits, param)
            sampling = sample_list(header, wish, rules, param)
            digest = blake3(b"".join(blake3(one).digest() for one in data)).hexdigest()
        else:
            header = video.read_header(data[0], limits, param)
            sampling = sample_file(header, wish, rules, param)
            digest = blake3(data[0]).hexdigest()
        return Video(data, header, sampling, limits, digest, param)

    def _refuse_excess(self, media: Sequence[Medium]) -> None:
        """Hold the request to its budget, before anything is decoded."""
        spent = {
            "max_media_bytes": (sum(one.size_bytes for one in media), "bytes"),
            "max_media_pixels": (sum(one.source_pixels for one in media), "pixels to decode"),
            "max_media_frames": (sum(one.frames_taken for one in media), "frames of videos"),
        }
        for name, (amount, what) in spent.items():
            limit = getattr(self.budget, name)
            if amount > limit:
                raise MediaTooLarge(
                    f"The pictures and videos of the request make {amount} {what}; at most {limit} "
                    f"are taken (limits.{name}): send fewer or smaller ones.",
                    param="messages",
                )

    async def _decoded_once(self, medium: _Medium) -> _Medium:
        if medium.key in self._known:
            self._known.move_to_end(medium.key)
            return medium
        async with self.decoding.holding(medium.source_pixels):
            await self._in_pool(medium.decode)
        self._known[medium.key] = None
        if len(self._known) > KNOWN_KEYS:
            self._known.popitem(last=False)
        return medium

    async def _in_pool(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def _video_bytes(self, url: str, param: str) -> bytes:
        try:
            return await self.read(url, param)
        except (InvalidImage, InvalidImageURL, ImageDownloadTimeout) as error:
            # The same sources, told of in a video's words.
            raise InvalidVideo(f"{param} {_NO_VIDEO[type(error)]}", param=param) from None

    def _refuse_large(self, size: int, param: str) -> None:
        limit = self.video_limits.max_bytes
        if size > limit:
            raise VideoTooLarge(
                f"{param} holds a video of {size} bytes; at most {limit} are decoded: send it "
                "shorter or smaller.",
                param=param,
            )

    def inspect(self, data: bytes, param: str) -> Header:
        """Return the header of a picture that this server takes.

        Raises:
            InvalidImage: no picture of a format that is taken.
            ImageTooLarge: more pixels than the profile lets be decoded.
        """
        return read_header(data, self._max_image_pixels, param, self.formats)

    async def read(self, address: str, param: str) -> bytes:
        """Return the bytes at an address, wherever it leads.

        Raises:
            InvalidImage: a malformed ``data:`` URL.
            InvalidImageURL: blocked, missing or out of reach, which are not told apart.
            ImageDownloadTimeout: the other side was too slow.
            UnknownFile: no such upload.
        """
        try:
            return await self.sources.read(address)
        except DataURLError as error:
            raise InvalidImage(f"{param} {error}", param=param) from None
        except UnknownFileID:
            raise UnknownFile(
                f"{param} names a file that is not here: it was never uploaded, was deleted, has "
                "expired or made room for others; upload it again.",
                param=param,
            ) from None
        except FetchTimeout:
            raise ImageDownloadTimeout(
                f"{param} names a host that was too slow; try again or send the picture as "
                "data:image/jpeg;base64,….",
                param=param,
            ) from None
        except FetchError as error:
            logger.info("not fetched: %s", error)
            raise InvalidImageURL(
                f"{param} cannot be fetched; give a public http(s) address of a picture, or send "
                "it as data:image/jpeg;base64,….",
                param=param,
            ) from None


async def _all_of(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await everything at once; the first failure ends the rest."""
    work = list(work)
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _media(
    request: ChatRequest,
) -> Iterator[tuple[ImagePart | VideoPart | FramesPart, str]]:
    for m, message in enumerate(request.messages):
        if message.role == "user" and not isinstance(message.content, str):
            further = 0
            for p, part in enumerate(message.content):
                if isinstance(part, TextPart):
                    continue
                key: str = part.type
                if isinstance(part, ImagePart):
                    # Errors name the client's places, which the pages of a PDF have moved.
                    further += part.further
                    key = part.key
                yield part, f"messages[{m}].content[{p - further}].{key}"


def _frame_urls(source: str | Sequence[str], most: int, param: str) -> Sequence[str] | None:
    """Return the addresses of a list of frames, None for that of a video.

    Raises:
        TooManyItems: more than ``most``.
    """
    prefix = "data:video/jpeg;base64,"
    if not isinstance(source, str):
        count = len(source)
    elif source[: len(prefix)].lower() == prefix:
        count = source.count(",")
    else:
        return None
    if count > most:
        raise TooManyItems(
            f"{param} holds {count} frames; at most {most} are taken: send fewer.", param=param
        )
    if not isinstance(source, str):
        return source
    return [f"data:image/jpeg;base64,{frame}" for frame in source[len(prefix) :].split(",")]


_NO_VIDEO: Mapping[type[RequestError], str] = {
    InvalidImage: "is not a base64 data URL; send data:video/mp4;base64,… in the standard "
    "alphabet (+ and /), padded, without line breaks.",
    InvalidImageURL: "cannot be fetched; give a public http(s) address of a video, or send it as "
    "data:video/mp4;base64,….",
    ImageDownloadTimeout: "names a host that was too slow; try again or send the video as "
    "data:video/mp4;base64,….",
}
