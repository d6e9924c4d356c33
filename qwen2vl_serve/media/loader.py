"""From the media parts of a request to pictures and videos that an engine can take.

They are known by their content: the key hashes the bytes and names the size, never anything
that a client says. Pixels are decoded when they are first needed; of a key that was decoded
before, the engine's own cache usually needs no pixels at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

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
from qwen2vl_serve.line import Line
from qwen2vl_serve.media import jpeg, video
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchTimeout
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.media.image import FORMATS, read_header
from qwen2vl_serve.media.ledger import Account, Ledger, TooManyBytes
from qwen2vl_serve.media.lru import LRU
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.media.sampling import (
    REFERENCE,
    FrameRules,
    sample_file,
    sample_list,
    wishes,
)
from qwen2vl_serve.media.sizing import Bounds, shrunk, size_for
from qwen2vl_serve.media.sources import DataURLError, Sources, UnknownFileID
from qwen2vl_serve.media.video import DEFAULT_LIMITS, VideoLimits, WorkTime
from qwen2vl_serve.media.weights import FIRST_FRAME_WEIGHT
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.content import (
    FramesPart,
    ImagePart,
    TextPart,
    VideoFields,
    VideoPart,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

KNOWN_BYTES = 5 * 1024 * 1024
"""How much memory the keys take that are remembered as decodable."""

KNOWN_KEY_BYTES = 280
"""What one was measured to take: 64 hex digits and a size, its entry, its place in the order."""

DECODE_THREADS = 4

HEADER_THREADS = 2

READ_HERE = 4 * 1024
"""Bytes up to which a header is read on the event loop: sooner than in a thread."""

HASHED_HERE = 64 * 1024
"""Bytes of a file up to which it is hashed there as well."""

_PACKED = (b"zTXt", b"iTXt", b"iCCP")

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
    exact pixels of JPEGs for time. Decoding takes at most ``max_decoding_bytes`` of memory at once
    over all requests, their files ``max_held_bytes``; what comes then waits.
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
        max_decoding_bytes: int = 2 * 1024**3,
        max_held_bytes: int = 2 * 1024**3,
    ) -> None:
        self.fetcher = fetcher
        self.sources = Sources(fetcher, folders, files)
        self.files = files
        self.formats = formats
        self.fast_decode = fast_decode
        self.budget = budget
        self.decoding = Line(max_decoding_bytes)
        self.ledger = Ledger(max_held_bytes, budget.max_media_bytes)
        self.bounds = bounds
        self.frame_rules = frame_rules
        self._max_image_pixels = max_image_pixels
        self.video_limits = video_limits
        self.known: LRU[bool] = LRU(KNOWN_BYTES)
        self._pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
        # Threads of their own, so that a picture that needs no decoding waits for none.
        self._headers = ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="header")

    def take_budget(self, budget: MediaBudget) -> None:
        """Hold new requests to another budget."""
        self.budget = budget
        self.ledger.resize(budget.max_media_bytes)

    async def fetch(self, request: ChatRequest, account: Account) -> Sequence[Medium]:
        """Return the pictures and videos of ``request`` in the order of its text.

        They are known by their headers and not decoded yet. Their bytes are taken from
        ``account``, which is settled by that.

        Raises:
            RequestError: one of them cannot be fetched, read or sized; the message names it.
        """
        media = await _all_of(self._medium(*one, request, account) for one in _media(request))
        account.settle()
        self._refuse_excess(media)
        return media

    async def ready(self, media: Sequence[Medium]) -> None:
        """Decode new bytes, in threads and where errors still have a status.

        Raises:
            RequestError: one of them is damaged; the message names it.
        """
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
        for pool in (self._pool, self._headers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _medium(
        self,
        part: ImagePart | VideoPart | FramesPart,
        param: str,
        request: ChatRequest,
        account: Account,
    ) -> Medium:
        if isinstance(part, ImagePart):
            return await self._picture(part, param, request, account)
        return await self._video(part, param, request, account)

    async def _picture(
        self, part: ImagePart, param: str, request: ChatRequest, account: Account
    ) -> Picture:
        drawn = part.page is not None
        data = part.page or await self.read(part.image_url.address, param, account)
        if _has_short_header(data):
            header, digest = self._known(data, param, drawn=drawn)
        else:
            known = partial(self._known, data, param, drawn=drawn)
            loop = asyncio.get_running_loop()
            header, digest = await loop.run_in_executor(self._headers, known)
        sizing = size_for(header, part, request, self.bounds, param)
        return Picture(data, header, sizing, digest, param, self.fast_decode)

    def _known(self, data: bytes, param: str, *, drawn: bool) -> tuple[Header, str]:
        """Return the header of a picture, sent or drawn here, and the hash of its bytes."""
        if drawn:
            header = read_header(data, self._max_image_pixels, param)
        else:
            header = self.inspect(data, param)
        return header, blake3(data).hexdigest()

    async def _video(
        self, part: VideoPart | FramesPart, param: str, request: ChatRequest, account: Account
    ) -> Video:
        source = part.video_url.address if isinstance(part, VideoPart) else part.video
        frames = _frame_urls(source, self.frame_rules.max_frames, param)
        wish = wishes(part, request, param, listed=frames is not None)
        if frames is not None:
            each = [self.read(url, f"{param}[{n}]", account) for n, url in enumerate(frames)]
            data = await _all_of(each)
        else:
            data = [await self._video_bytes(str(source), param, account)]
        self._refuse_large(sum(map(len, data)), param)
        if frames is not None:
            return await self._in_pool(self._sampled, data, wish, True, param)
        # A file's first frame is decoded to know its size: until then it may be the largest.
        most = self.video_limits.max_pixels * FIRST_FRAME_WEIGHT
        return await self._within_memory(most, self._sampled, data, wish, False, param)

    def _sampled(self, data: Sequence[bytes], wish: VideoFields, listed: bool, param: str) -> Video:
        """Read the headers, which takes time: a container is read to its end."""
        limits, rules = self.video_limits, self.frame_rules
        work = WorkTime(limits.seconds)
        if listed:
            header = video.read_listed_header(
                data, wish.fps, limits, param, self.formats, work=work
            )
            sampling = sample_list(header, wish, rules, param)
            digest = blake3(b"".join(blake3(one).digest() for one in data)).hexdigest()
        else:
            header = video.read_header(data[0], limits, param, work=work)
            sampling = sample_file(header, wish, rules, param)
            digest = blake3(data[0]).hexdigest()
        return Video(data, header, sampling, limits, digest, param, work)

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
        if self.known.get(medium.key):
            return medium
        await self._within_memory(medium.decoding_bytes, medium.decode)
        self.known.put(medium.key, True, KNOWN_KEY_BYTES)
        return medium

    async def _within_memory(self, size: int, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do what decodes in a thread, once its ``size`` bytes fit beside what others decode."""
        size = await self.decoding.enter("", size)
        loop = asyncio.get_running_loop()

        def done(_: Future[_T]) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.decoding.leave, size)

        begun = self._pool.submit(work, *arguments)
        # Its memory is in use until the thread is done, whether or not anybody still waits for it.
        begun.add_done_callback(done)
        return await asyncio.wrap_future(begun)

    async def _in_pool(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def _video_bytes(self, url: str, param: str, account: Account) -> bytes:
        try:
            return await self.read(url, param, account)
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

    def inspect_video(self, data: bytes, param: str) -> None:
        """See that a file is a video that this server takes; may take seconds.

        Raises:
            InvalidVideo: it is none, or a damaged one.
            VideoTooLarge: beyond the profile's limits.
        """
        self._refuse_large(len(data), param)
        video.read_header(data, self.video_limits, param)

    async def hold(self, size: int, account: Account) -> None:
        """Wait until a request may hold ``size`` bytes more.

        Raises:
            MediaTooLarge: with them it holds more than one request may.
        """
        try:
            await account.take(size)
        except TooManyBytes as error:
            every = error.limit == self.ledger.capacity
            name = "media.max_held_bytes" if every else "limits.max_media_bytes"
            raise MediaTooLarge(
                f"The pictures and videos of the request make more than {error.limit} bytes, the "
                f"most that are taken ({name}): send fewer or smaller ones.",
                param="messages",
            ) from None

    async def read(self, address: str, param: str, account: Account) -> bytes:
        """Return the bytes at an address, wherever it leads.

        Raises:
            InvalidImage: a malformed ``data:`` URL.
            InvalidImageURL: blocked, missing or out of reach, which are not told apart.
            ImageDownloadTimeout: the other side was too slow.
            UnknownFile: no such upload.
            MediaTooLarge: more bytes than one request may hold.
        """
        try:
            async with account.reading:
                return await self.sources.read(
                    address, lambda size: self.hold(size, account), account.owner
                )
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


def _has_short_header(data: bytes) -> bool:
    """Tell whether no more than ``READ_HERE`` bytes are gone through until the pixels begin."""
    if len(data) > HASHED_HERE:
        return False
    if len(data) > READ_HERE:
        return jpeg.scan_begins_within(data, READ_HERE)
    # A PNG's text unpacks to a thousand times as many bytes, and Pillow looks at them all.
    return not any(kind in data for kind in _PACKED)


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
        if not isinstance(message.content, str):
            further = 0
            for p, part in enumerate(message.content):
                if isinstance(part, TextPart):
                    continue
                if isinstance(part, ImagePart):
                    # Errors name the client's places, which the pages of a PDF have moved.
                    further += part.further
                key = part.type if isinstance(part, FramesPart) else part.key
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
