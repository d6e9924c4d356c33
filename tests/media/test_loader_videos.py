"""Loading videos: every way to send one, keys by content, errors by item, decoding once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_serve.errors import (
    InvalidImage,
    InvalidImageURL,
    InvalidVideo,
    RequestError,
    TooManyItems,
    VideoTooLarge,
)
from qwen2vl_serve.media import video as video_module
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.media.sampling import FrameRules
from qwen2vl_serve.media.sizing import Bounds
from qwen2vl_serve.media.video import VideoLimits
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from qwen2vl_serve.vision import PixelBudget
from tests.media.movies import data_url, movie, picture
from tests.media.test_loader import loaded

BOUNDS = Bounds(PixelBudget(3136, 1_003_520), PixelBudget(3136, 1_003_520))
FRAMES = FrameRules(
    Bounds(PixelBudget(16 * 784, 64 * 784), PixelBudget(4 * 784, 256 * 784)),
    total_pixels=10**7,
    max_frames=32,
)
LIMITS = RequestLimits(max_messages=99, max_n=1, max_tokens=None, images=99, videos=99)
MOVIE = movie(40, (320, 240))


class Loading:
    """One loader over several requests, as a server has it; it may fetch from this machine."""

    def __init__(
        self,
        limits: VideoLimits = VideoLimits(),  # noqa: B008
        local: bool = True,
        folders: Sequence[str] = (),
    ) -> None:
        policy = FetchPolicy(
            ports=frozenset(range(65536)), allowed_networks=("127.0.0.0/8",) if local else ()
        )
        self.loader = MediaLoader(Fetcher(policy), BOUNDS, 10**8, FRAMES, limits, folders=folders)

    def load(self, *parts: dict[str, Any], **fields: Any) -> list[Any]:
        text = {"type": "text", "text": "x"}
        body = {"messages": [{"role": "user", "content": [text, *parts]}], **fields}
        chat = parse_chat(json.dumps(body).encode(), LIMITS)

        async def load_and_close() -> list[Any]:
            try:
                return list(await loaded(self.loader, chat))
            finally:
                await self.loader.fetcher.close()

        return asyncio.run(load_and_close())


def part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **fields}


def image_url(number: int = 0, size: tuple[int, int] = (168, 112)) -> str:
    data = io.BytesIO()
    Image.fromarray(picture(number, size)).save(data, "JPEG", quality=90)
    return data_url(data.getvalue(), "image/jpeg")


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = files.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Ticking:
    """A clock that a look at it moves on by a second, so that work takes as many as its checks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def _listed(count: int = 30) -> dict[str, Any]:
    frames = [image_url(n) for n in range(count)]
    return {"type": "video", "video": frames}


@pytest.mark.parametrize("form", ["file", "list"])
def test_header_and_frames_share_one_time(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Either alone fits into it, both together do not; what waits in between is no work."""
    clock = Ticking()
    monkeypatch.setattr(video_module, "time", clock)
    asked = part(data_url(MOVIE)) if form == "file" else _listed()

    async def run(seconds: float, pause: float) -> tuple[float, float]:
        loader = Loading(VideoLimits(seconds=seconds)).loader
        body = {"messages": [{"role": "user", "content": [asked]}]}
        chat = parse_chat(json.dumps(body).encode(), LIMITS)
        clock.now = 0.0
        async with loader.ledger.account() as account:
            media = await loader.fetch(chat, account)
        header, clock.now = clock.now, pause
        await loader.ready(media)
        return header, clock.now - pause

    header, frames = asyncio.run(run(1e6, 1e9))
    assert header > 20
    assert frames > 20
    enough, short = header + frames + 1, max(header, frames) + 10
    assert asyncio.run(run(enough, 1e9)) == (header, frames)
    assert short < header + frames - 10
    with pytest.raises(VideoTooLarge, match=f"more than {short:g} seconds"):
        asyncio.run(run(short, 0.0))
    assert header + clock.now <= short + 10, "it ended with the time"


def test_a_video_is_one_whichever_way_it_comes() -> None:
    """As data, by address, under either type: the same key, the same frames."""
    with served({"/a.mp4": MOVIE}) as address:
        url = f"{address}/a.mp4"
        videos = Loading().load(
            part(data_url(MOVIE)),
            part(data_url(MOVIE, "video/webm")),
            part(url),
            {"type": "video", "video": url},
        )
    assert len({video.key for video in videos}) == 1
    assert all(np.array_equal(video.frames(), videos[0].frames()) for video in videos)
    assert videos[0].frames().shape == (8, *videos[0].frames().shape[1:3], 3)


def test_a_video_lies_in_a_folder_that_is_named(tmp_path: Path) -> None:
    """By ``file:`` it is the same as by its data; beside the folder there is none."""
    (tmp_path / "open").mkdir()
    for place in ("open/a b.mp4", "outside.mp4"):
        (tmp_path / place).write_bytes(MOVIE)
    loading = Loading(folders=[str(tmp_path / "open")])
    url = (tmp_path / "open" / "a b.mp4").as_uri()
    videos = loading.load(part(data_url(MOVIE)), part(url), {"type": "video", "video": url})
    assert len({video.key for video in videos}) == 1
    assert np.array_equal(videos[0].frames(), videos[1].frames())
    for place in (tmp_path / "outside.mp4", tmp_path / "open" / "missing.mp4"):
        with pytest.raises(InvalidVideo, match="cannot be fetched"):
            loading.load(part(place.as_uri()))


def test_frames_are_one_video_whichever_way_they_come() -> None:
    """vLLM's comma-separated JPEGs, Model Studio's list, of data or of addresses."""
    urls = [image_url(number) for number in range(5)]
    files = {f"/{n}.jpg": base64.b64decode(url.partition(",")[2]) for n, url in enumerate(urls)}
    joined = ",".join(url.partition(",")[2] for url in urls)
    with served(files) as address:
        videos = Loading().load(
            part(f"data:video/jpeg;base64,{joined}"),
            {"type": "video", "video": urls},
            {"type": "video", "video": [f"{address}/{n}.jpg" for n in range(5)]},
        )
    assert len({video.key for video in videos}) == 1
    frames = videos[0].frames()
    assert len(frames) == 6
    assert np.array_equal(frames[4], frames[5])
    assert not np.array_equal(frames[3], frames[4])


def test_pictures_and_videos_come_in_the_order_of_the_text() -> None:
    """However long each takes to load."""
    image = {"type": "image_url", "image_url": {"url": image_url()}}
    media = Loading().load(part(data_url(MOVIE)), image, part(data_url(movie(8))), image)
    assert [type(one) for one in media] == [Video, Picture, Video, Picture]
    assert [one.param for one in media] == [
        "messages[0].content[1].video_url",
        "messages[0].content[2].image_url",
        "messages[0].content[3].video_url",
        "messages[0].content[4].image_url",
    ]


def test_equal_bytes_sampled_alike_have_one_key_and_nothing_else_does() -> None:
    """Content, number of frames and size make the key; the order of frames is content."""
    url, one, two = data_url(MOVIE), image_url(1), image_url(2)
    same, again, fewer, smaller, other = Loading().load(
        part(url),
        part(url),
        part(url, nframes=4),
        part(url, max_pixels=8 * 784),
        part(data_url(movie(40, (320, 240), codec="mpeg4"))),
    )
    assert same.key == again.key
    listed, turned, image = Loading().load(
        {"type": "video", "video": [one, two]},
        {"type": "video", "video": [two, one]},
        {"type": "image_url", "image_url": {"url": one}},
    )
    keys = {one.key for one in (same, fewer, smaller, other, listed, turned, image)}
    assert len(keys) == 7


def test_a_known_video_is_not_decoded_again() -> None:
    """That of an earlier turn costs its packets and a hash; its frames are there when needed."""
    loading = Loading()
    first, second = (loading.load(part(data_url(MOVIE)))[0] for _ in range(2))
    assert (first.info()["cached"], second.info()["cached"]) == (False, True)
    assert np.array_equal(first.frames(), second.frames())
    assert second.frames() is second.frames()


def test_the_report_tells_what_the_model_sees() -> None:
    """Source, sampling, size, tokens, and whether a wish was cut."""
    video = Loading().load(part(data_url(MOVIE), fps=50, max_pixels=10**9))[0]
    assert video.info() == {
        "type": "video",
        "width": 320,
        "height": 240,
        "duration": 4.0,
        "fps": 10.0,
        "source_frames": 40,
        "frames": 32,
        "resized_width": 308,
        "resized_height": 252,
        "visual_tokens": 16 * 99,
        "clamped": True,
        "cached": False,
    }
    listed = Loading().load({"type": "video", "video": [image_url()] * 3, "fps": 1.5})[0].info()
    assert (listed["duration"], listed["fps"], listed["frames"]) == (2.0, 1.5, 4)
    assert (listed["source_frames"], listed["clamped"]) == (3, False)


def test_fields_of_the_whole_request_reach_every_video() -> None:
    """vLLM's place for them; what a part says goes before."""
    url = data_url(MOVIE)
    whole = {"fps": 1.0, "max_pixels": 8 * 784}
    one, two = Loading().load(part(url), part(url, nframes=12), mm_processor_kwargs=whole)
    assert (one.info()["frames"], two.info()["frames"]) == (4, 12)
    assert one.sampling.sizing == two.sampling.sizing
    assert one.sampling.sizing.visual_tokens <= 8


@pytest.mark.parametrize(
    ("bad", "kind", "place"),
    [
        (part("data:video/mp4,hello"), InvalidVideo, "video_url"),
        (part("data:video/mp4;base64,!!!!"), InvalidVideo, "video_url"),
        (part("data:video/mp4;base64,"), InvalidVideo, "video_url"),
        (part(data_url(b"GIF89a")), InvalidVideo, "video_url"),
        (part(data_url(MOVIE[:-3000])), InvalidVideo, "video_url"),
        (part("file:///etc/passwd"), InvalidVideo, "video_url"),
        (part("http://127.0.0.1:1/x.mp4"), InvalidVideo, "video_url"),
        (part("data:video/jpeg;base64,"), InvalidImage, "video_url[0]"),
        (part("data:video/jpeg;base64,!!"), InvalidImage, "video_url[0]"),
        ({"type": "video", "video": [image_url(), "ftp://x/y"]}, InvalidImageURL, "video[1]"),
        ({"type": "video", "video": [image_url()] * 33}, TooManyItems, "video"),
        (part("data:video/jpeg;base64," + "," * 32), TooManyItems, "video_url"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_bad_item_is_named(bad: dict[str, Any], kind: type[RequestError], place: str) -> None:
    """The second video of the message is at fault, and ``param`` says so, to the frame."""
    with pytest.raises(kind) as caught:
        Loading().load(part(data_url(MOVIE)), bad)
    assert caught.value.param == f"messages[0].content[2].{place}"
    if kind is InvalidVideo:
        assert "image/jpeg" not in caught.value.message, "a video is told of in its own words"


def test_blocked_and_missing_read_the_same() -> None:
    """A client cannot map a network by asking for videos."""
    messages = []
    with served({}) as address:
        for local in (True, False):
            with pytest.raises(InvalidVideo) as caught:
                Loading(local=local).load(part(f"{address}/x.mp4"))
            messages.append(caught.value.message)
    assert messages[0] == messages[1]


def test_a_video_of_too_many_bytes_is_refused() -> None:
    """From whichever source; of a list the sum counts."""
    small = VideoLimits(max_bytes=5000)
    with pytest.raises(VideoTooLarge, match="at most 5000"):
        Loading(small).load(part(data_url(MOVIE)))
    with pytest.raises(VideoTooLarge, match="at most 5000"):
        Loading(small).load({"type": "video", "video": [image_url()] * 4})


def test_damage_is_found_before_the_engine_is_asked() -> None:
    """New bytes are decoded while loading, so that the error still has a status of its own."""
    broken = bytearray(MOVIE)
    for place in range(MOVIE.index(b"mdat") + 2000, MOVIE.index(b"mdat") + 4000, 3):
        broken[place] ^= 0x5A
    with pytest.raises(InvalidVideo):
        Loading().load(part(data_url(bytes(broken))))


def test_a_smaller_copy_is_another_video_of_the_same_frames() -> None:
    """What shrinking a request makes: same sampling, smaller frames, the old one untouched."""
    loading = Loading()
    video = loading.load(part(data_url(MOVIE)))[0]
    small = loading.loader.resized(video, 8 * 784)
    assert loading.loader.resized(video, 10**9) is video
    assert small.key != video.key
    assert small.visual_tokens < video.visual_tokens
    asyncio.run(loading.loader.ready([small]))
    assert small.frames().shape[0] == video.frames().shape[0]
    assert small.info()["clamped"]
    assert not video.info()["clamped"]


@pytest.mark.parametrize("listed", [True, False])
def test_frames_are_of_the_formats_that_are_taken(listed: bool) -> None:
    """``media.formats`` holds for each frame of a list, in either of its forms."""
    made = io.BytesIO()
    Image.new("RGB", (84, 84)).save(made, "TIFF")
    frame = base64.b64encode(made.getvalue()).decode()
    urls = [f"data:image/jpeg;base64,{frame}"] * 2
    text = "data:video/jpeg;base64," + ",".join([frame] * 2)
    loading = Loading()
    loading.loader.formats = ["JPEG"]
    with pytest.raises(InvalidImage, match="holds TIFF data; this server takes JPEG"):
        loading.load({"type": "video", "video": urls} if listed else part(text))


def test_a_headers_frame_waits_its_turn_to_be_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is not known before: memory for the largest frame is held, and given back."""
    loading, held = Loading(), []
    read_header = video_module.read_header

    def spied(*args: Any, **named: Any) -> Any:
        held.append(loading.loader.decoding.held)
        return read_header(*args, **named)

    monkeypatch.setattr(video_module, "read_header", spied)
    loading.load(part(data_url(MOVIE)))
    assert held[0] >= VideoLimits().max_pixels
    assert loading.loader.decoding.held == 0
