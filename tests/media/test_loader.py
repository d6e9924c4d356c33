"""Loading what a request shows: keys by content, errors by item, decoding once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qwen2vl_serve.errors import InvalidImage, InvalidImageURL, MediaTooLarge, RequestError
from qwen2vl_serve.line import Line
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.loader import (
    DECODE_THREADS,
    HASHED_HERE,
    READ_HERE,
    MediaBudget,
    MediaLoader,
    Medium,
)
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.media.sizing import Bounds
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from qwen2vl_serve.vision import PixelBudget

BOUNDS = Bounds(PixelBudget(3136, 1_003_520), PixelBudget(3136, 1_003_520))
LIMITS = RequestLimits(max_messages=99, max_n=1, max_tokens=None, images=99, videos=0)


def data_url(colour: str, size: tuple[int, int] = (280, 280)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


async def loaded(loader: MediaLoader, request: ChatRequest) -> Sequence[Medium]:
    """Load the media of a request that ends with that."""
    async with loader.ledger.account() as account:
        media = await loader.fetch(request, account)
        await loader.ready(media)
        return media


class Loading:
    """One loader over several requests, as a server has it."""

    def __init__(self, max_image_pixels: int = 10_000_000) -> None:
        self.loader = MediaLoader(Fetcher(FetchPolicy()), BOUNDS, max_image_pixels)

    def load(self, *parts: dict[str, Any]) -> list[Picture]:
        return list(asyncio.run(loaded(self.loader, self.asked(*parts))))

    def asked(self, *parts: dict[str, Any]) -> ChatRequest:
        text = {"type": "text", "text": "x"}
        body = {"messages": [{"role": "user", "content": [text, *parts]}]}
        return parse_chat(json.dumps(body).encode(), LIMITS)


def test_pictures_come_in_the_order_of_the_text() -> None:
    """However long each takes to load."""
    urls = [data_url("red", (2800, 2800)), data_url("lime"), data_url("blue", (28, 28))]
    pictures = Loading().load(*map(part, urls))
    assert [one.pixels()[5, 5].tolist() for one in pictures] == [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
    ]


def test_equal_bytes_at_one_size_have_one_key_and_nothing_else_does() -> None:
    """Content and size make the key; another size or another content makes another."""
    red, blue = data_url("red"), data_url("blue")
    one, again, smaller, other = Loading().load(
        part(red), part(red), part(red, max_pixels=20_000), part(blue)
    )
    assert one.key == again.key
    assert len({one.key, smaller.key, other.key}) == 3


def test_known_bytes_are_not_decoded_again() -> None:
    """A picture of an earlier turn costs a hash; its pixels are there when they are needed."""
    loading = Loading()
    first = loading.load(part(data_url("red")))[0]
    second = loading.load(part(data_url("red")))[0]
    assert first.info()["cached"] is False
    assert second.info()["cached"] is True
    assert np.array_equal(first.pixels(), second.pixels())
    assert second.info()["cached"] is False, "now they were needed"


def test_the_report_tells_sizes_and_tokens() -> None:
    """Source and resized sides in pixels, tokens, and whether a wish was cut."""
    picture = Loading().load(part(data_url("red", (640, 480)), max_pixels=10**9))[0]
    assert picture.info() == {
        "type": "image",
        "width": 640,
        "height": 480,
        "resized_width": 644,
        "resized_height": 476,
        "visual_tokens": 391,
        "clamped": True,
        "cached": False,
    }


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("data:image/png,hello", InvalidImage),
        ("data:image/png;base64", InvalidImage),
        ("data:image/png;base64,!!!!", InvalidImage),
        ("data:image/png;base64,-_-_", InvalidImage),
        ("data:image/png;base64,aGVsbG8", InvalidImage),
        ("data:image/png;base64,aGVs\nbG8=", InvalidImage),
        ("data:image/png;base64,", InvalidImage),
        ("http://127.0.0.1/x.png", InvalidImageURL),
        ("file:///etc/passwd", InvalidImageURL),
        ("ftp://example.org/x.png", InvalidImageURL),
        ("x" * 20, InvalidImageURL),
    ],
)
def test_the_bad_item_is_named(url: str, kind: type[RequestError]) -> None:
    """The second picture of the message is at fault, and ``param`` says so."""
    with pytest.raises(kind) as caught:
        Loading().load(part(data_url("red")), part(url))
    assert caught.value.param == "messages[0].content[2].image_url"


def test_damage_is_found_before_the_engine_is_asked() -> None:
    """New bytes are decoded while loading, so that the error still has a status of its own."""
    cut = base64.b64encode(base64.b64decode(data_url("red").partition(",")[2])[:-30]).decode()
    with pytest.raises(InvalidImage):
        Loading().load(part("data:image/png;base64," + cut))


def test_a_request_without_pictures_loads_nothing() -> None:
    """Text alone passes through."""
    assert Loading().load() == []


@pytest.mark.parametrize("named", ["max_media_bytes", "max_media_pixels"])
def test_a_request_keeps_to_its_budget_over_all_pictures(named: str) -> None:
    """Each picture is small enough, together they are not: refused before any is decoded."""
    pictures = [part(data_url(colour)) for colour in ("red", "blue", "lime")]
    one = len(base64.b64decode(data_url("red").partition(",")[2]))
    limit = {"max_media_bytes": 2 * one, "max_media_pixels": 2 * 280 * 280}[named]
    loading = Loading()
    loading.loader.budget = replace(MediaBudget(), **{named: limit})
    with pytest.raises(MediaTooLarge, match=rf"limits\.{named}"):
        loading.load(*pictures)
    assert loading.loader.known.figures().entries == 0
    assert len(loading.load(pictures[0])) == 1


def test_decoding_waits_its_turn_and_gives_its_place_back() -> None:
    """More than may be decoded at once still comes, one after another."""
    loading = Loading()
    loading.loader.decoding = Line(280 * 280 * 4)
    urls = [data_url(colour) for colour in ("red", "blue", "lime", "gray")]
    assert len(loading.load(*map(part, urls))) == 4
    assert loading.loader.decoding.held == 0


def test_what_is_decoded_counts_until_its_thread_is_done() -> None:
    """Though nobody waits for it any more: a client that leaves frees no memory by that."""
    begun, end = threading.Semaphore(0), threading.Event()

    class Slow(Picture):
        def decode(self) -> None:
            begun.release()
            end.wait(60)

    async def run() -> list[int]:
        loading = Loading()
        loader = loading.loader
        chat = loading.asked(part(data_url("red")))
        async with loader.ledger.account() as account:
            (known,) = await loader.fetch(chat, account)
        assert isinstance(known, Picture)
        shown = [Slow(known.data, known.header, known.sizing, f"{n}", "p") for n in range(6)]
        tasks = [asyncio.create_task(loader.ready([one])) for one in shown]
        for _ in range(DECODE_THREADS):
            assert await asyncio.to_thread(begun.acquire, timeout=60)
        held = [loader.decoding.held // known.decoding_bytes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        held.append(loader.decoding.held // known.decoding_bytes)
        end.set()
        async with asyncio.timeout(60):
            while loader.decoding.held:
                await asyncio.sleep(0.01)
        return held

    assert asyncio.run(run()) == [6, DECODE_THREADS], "two had not begun"


def test_a_header_is_read_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are not worth a thread; what may take time must not hold up other streams."""
    seen: dict[int, str] = {}
    loading = Loading()
    inspect = loading.loader.inspect

    def watched(data: bytes, param: str) -> Any:
        seen[len(data)] = threading.current_thread().name
        return inspect(data, param)

    monkeypatch.setattr(loading.loader, "inspect", watched)
    samples = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    noise = Image.fromarray(samples)
    packed = PngImagePlugin.PngInfo()
    packed.add_text("a", "a" * 1_000_000, zip=True)
    sent = {
        "short": data_url("red"),
        "png": encoded(noise.resize((60, 60)), "PNG"),
        "png with a text that unpacks": encoded(noise.resize((9, 9)), "PNG", pnginfo=packed),
        "jpeg": encoded(noise, "JPEG", quality=90),
        "jpeg with much before its pixels": encoded(noise, "JPEG", comment=bytes(READ_HERE)),
        "large jpeg": encoded(noise.resize((400, 400)), "JPEG", quality=100),
    }
    found = dict(zip(sent, loading.load(*map(part, sent.values())), strict=True))
    sizes = {name: one.size_bytes for name, one in found.items()}
    assert max(sizes["short"], sizes["png with a text that unpacks"]) <= READ_HERE
    assert min(sizes["png"], sizes["jpeg"]) > READ_HERE
    assert sizes["jpeg"] < HASHED_HERE < sizes["large jpeg"]
    here = threading.current_thread().name
    told = {name for name, size in sizes.items() if seen[size] == here}
    assert told == {"short", "jpeg"}


def encoded(picture: Image.Image, form: str, **options: Any) -> str:
    """Return a picture as a data URL."""
    data = io.BytesIO()
    picture.save(data, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def test_one_request_reads_so_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of many pictures keeps a host, and the server's sockets, from all being asked."""
    loading, now, most = Loading(), 0, 0
    data = base64.b64decode(data_url("red").partition(",")[2])

    async def read(*_: Any) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return data

    monkeypatch.setattr(loading.loader.sources, "read", read)
    assert len(loading.load(*[part(f"https://example.org/{n}.png") for n in range(40)])) == 40
    assert most == 16
