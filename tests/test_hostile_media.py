"""Hostile addresses, files, amounts and texts against the whole application, over real sockets.

Each is answered with a 4xx of its kind. Nothing of the other side, of a library or of the file is
told, the next good request succeeds, and nothing stays in flight. Here is what takes a look inside:
the sockets that are opened, the pixels that the engine sees. ``tests.hostile`` has the rest, on the
real engine.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from qwen2vl_serve.profile import load_profile
from tests.hostile import addresses, texts
from tests.hostile.pictures import inline, png, saved
from tests.launch.test_serve import self_signed
from tests.media.movies import data_url as movie_url
from tests.media.movies import movie
from tests.media.test_fetch import Names, Site, http
from tests.media.test_fetch import site as site  # noqa: PLC0414  (a fixture)
from tests.ports import quiet_port
from tests.test_app import Running, error_of, eventually, running

LEAK = re.compile(
    r"127\.0|10\.0\.0|169\.254|Errno|Traceback|aiohttp|PIL|pillow|/usr|/tmp|\.py|[A-Za-z0-9+/]{60}",
    re.IGNORECASE,
)


def image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "x"}]
    return {"messages": [{"role": "user", "content": content}], **fields}


GOOD = asked(image(inline(png())))


class Sockets:
    """Every socket that the server's fetcher opens."""

    def __init__(self, api: Running) -> None:
        self.opened: list[Any] = []
        fetcher = api.app.state.api.loader.fetcher
        guarded = fetcher._guarded_socket

        def counted(address: Any) -> socket.socket:
            one = guarded(address)
            self.opened.append(address)
            return one

        fetcher._guarded_socket = counted


def refused(api: Running, body: dict[str, Any], *codes: str) -> dict[str, Any]:
    """Send what is to be refused; look at the answer and at what it leaves behind."""
    answer = api.chat(body)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) in (
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
    ), answer.text
    assert error["code"] in codes, answer.text
    assert not LEAK.search(answer.text), answer.text
    assert api.chat(GOOD).status_code == 200
    eventually(lambda: "qwen2vl_requests_in_flight 0.0" in api.metrics())
    assert "qwen2vl_media_held_bytes 0.0" in api.metrics()
    return error


def serving(*overrides: str) -> Any:
    return running(profile=load_profile("demo", overrides))


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    with serving("media.limit_mm_per_prompt.video=1") as one:
        yield one


@pytest.fixture
def guarded(site: Site) -> Iterator[Running]:
    """A server that may use the site's port, but not its address."""
    with serving(f"media.allowed_ports=[80, 443, {site.port}]") as one:
        yield one


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on."""
    return quiet_port()


@pytest.fixture
def fetching(site: Site, closed_port: int) -> Iterator[Running]:
    """A server that may fetch from the site."""
    with serving(
        f"media.allowed_ports=[{site.port}, {closed_port}]",
        "media.allowed_networks=[127.0.0.0/8]",
        "media.max_download_bytes=100000",
        "media.download_seconds=10.0",
    ) as one:
        yield one


# D. Addresses.

NEVER = [*addresses.LOOPBACK, *addresses.NOWHERE, *addresses.BEYOND]


@pytest.mark.parametrize("url", NEVER, ids=lambda url: url[:50].encode("unicode_escape").decode())
def test_no_packet_is_sent_to_a_forbidden_address(guarded: Running, site: Site, url: str) -> None:
    """No socket is even made for it; as a picture, a video and a frame alike."""
    sockets = Sockets(guarded)
    url = url.replace("{port}", str(site.port))
    error = refused(guarded, asked(image(url)), "invalid_image_url", "file_not_found")
    assert error["param"] == "messages[0].content[0].image_url"
    for part in (
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video", "video": [url]},
        {"type": "input_image", "image_url": url},
        {"type": "file", "file": {"file_data": url}},
    ):
        refused(guarded, asked(part), "invalid_image_url", "invalid_video", "file_not_found")
    assert (site.connections, sockets.opened) == (0, [])


def named(api: Running, **names: list[str]) -> Names:
    """Let the server resolve these names, and no others."""
    resolver = Names(**names)
    api.app.state.api.loader.fetcher._resolver = resolver
    return resolver


def test_a_name_of_an_inner_address_is_never_connected_to(guarded: Running, site: Site) -> None:
    """However public the name looks."""
    sockets = Sockets(guarded)
    named(guarded, inner=["10.0.0.1"], loop=["127.0.0.1"])
    for host in ("inner.example.org", "loop.example.org"):
        refused(guarded, asked(image(f"http://{host}:{site.port}/")), "invalid_image_url")
    assert (site.connections, sockets.opened) == (0, [])


def test_a_name_that_resolves_anew_gains_nothing(guarded: Running, site: Site) -> None:
    """Rebinding: the address that was judged is the one that is connected to, once per request."""
    sockets = Sockets(guarded)
    resolver = named(guarded, evil=["192.0.2.1", "127.0.0.1", "127.0.0.1"])
    for _ in range(3):
        refused(guarded, asked(image(f"http://evil.test:{site.port}/")), "invalid_image_url")
    assert len(resolver.asked) == 3
    assert (site.connections, sockets.opened) == (0, [])


@pytest.mark.parametrize(
    "target",
    ["http://10.0.0.1/", "http://169.254.169.254/", "http://[fd00::1]/", "file:///etc/passwd",
     "http://93.184.216.34:22/", "ftp://127.0.0.1/", "http://user@127.0.0.1/", "", "\\\\x"],
)  # fmt: skip
def test_a_redirect_leads_nowhere_that_an_address_may_not(
    fetching: Running, site: Site, target: str
) -> None:
    """The hop is judged like the first address: only the site itself is ever connected to."""
    sockets = Sockets(fetching)
    site.answers["/"] = http("302 Found", Location=target)
    url = f"http://127.0.0.1:{site.port}/"
    refused(fetching, asked(image(url)), "invalid_image_url")
    assert {str(one[4][0]) for one in sockets.opened} == {"127.0.0.1"}


def test_a_redirect_loop_ends(fetching: Running, site: Site) -> None:
    """After three hops."""
    site.answers["/"] = http("302 Found", Location="/")
    refused(fetching, asked(image(f"http://127.0.0.1:{site.port}/")), "invalid_image_url")
    assert site.connections == 4


# E. Fetching.


def test_a_certificate_of_nobody_is_refused(
    closed_port: int, tmp_path: Path, fetching: Running
) -> None:
    """TLS is checked: a site that signs for itself reads as one that is not there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))
    handshakes = []

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as raw:
            try:
                context.wrap_socket(raw, server_side=True)
            except OSError as error:  # SSLError is one
                handshakes.append(type(error).__name__)

    with socket.create_server(("127.0.0.1", closed_port)) as listener:
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{closed_port}/"
        error = refused(fetching, asked(image(url)), "invalid_image_url")
        thread.join(60)
    assert handshakes, "the server did not even try"
    closed = f"http://127.0.0.1:{closed_port}/"
    assert refused(fetching, asked(image(closed)), "invalid_image_url") == error


def test_blocked_refused_missing_and_unresolved_read_the_same(
    fetching: Running, site: Site, closed_port: int
) -> None:
    """To the letter, so that nobody can scan a network by it."""
    closed = f"http://127.0.0.1:{closed_port}/"
    answers = {
        refused(fetching, asked(image(url)), "invalid_image_url")["message"]
        for url in (
            closed,
            "http://10.0.0.1/",
            f"http://127.0.0.1:{site.port}/missing",
            f"http://127.0.0.1:{site.port}9/",
            f"http://no-such-name.invalid:{site.port}/",
            "file:///etc/passwd",
        )
    }
    assert len(answers) == 1


# F. Files.

NOISE = Image.effect_noise((300, 200), 90).convert("RGB")


def upright(orientation: int) -> tuple[bytes, np.ndarray]:
    """A JPEG that is stored turned, and how it looks."""
    pixels = np.zeros((112, 56, 3), np.uint8)
    pixels[:56, :28], pixels[:56, 28:], pixels[56:, :28] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turned = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = Image.fromarray(pixels)
    for one in turned:
        stored = stored.transpose(Image.Transpose(one))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(stored, "JPEG", exif=exif.tobytes(), quality=98, subsampling=0)
    return data, pixels


def seen(api: Running, data: bytes, width: int, height: int) -> np.ndarray:
    """What the engine sees of a picture at exactly this size."""
    part = image(inline(data), resized_height=height, resized_width=width)
    answer = api.chat(asked(part))
    assert answer.status_code == 200, answer.text
    (picture,) = api.engine.media[-1]
    pixels = picture.pixels()
    assert pixels.shape == (height, width, 3)
    return np.asarray(pixels)


def near(pixels: np.ndarray, wanted: Any, tolerance: int = 6) -> bool:
    return bool(np.abs(pixels.astype(int) - np.asarray(wanted, int)).max() <= tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phones_picture_stands_upright(api: Running, orientation: int) -> None:
    """All eight EXIF orientations."""
    data, wanted = upright(orientation)
    pixels = seen(api, data, 56, 112)
    for y, x in ((20, 10), (20, 45), (90, 10), (90, 45)):
        assert near(pixels[y, x], wanted[y, x], 12), (y, x)


def test_unusual_samples_are_shown_right(api: Running) -> None:
    """CMYK, alpha on white, palettes, 16 bits scaled, and the first frame of an animation."""
    size = (56, 56)
    red = Image.new("RGB", size, (200, 30, 30))
    assert near(seen(api, saved(red.convert("CMYK"), "JPEG"), *size), (200, 30, 30), 8)
    assert near(seen(api, png(size, (0, 0, 0, 0), "RGBA"), *size), 255)
    assert near(seen(api, png(size, (0, 0, 0, 127), "RGBA"), *size), 128, 1)
    assert near(seen(api, saved(red.quantize(4), "PNG"), *size), (200, 30, 30), 8)
    wide = Image.fromarray(np.full((56, 56), 32768, np.uint16))
    assert near(seen(api, saved(wide, "PNG"), *size), 128, 1)
    frames = [Image.new("RGB", size, colour) for colour in ("lime", "blue", "red")]
    for form in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        assert near(seen(api, data, *size), (0, 255, 0))
    assert near(seen(api, saved(red.convert("L"), "PNG"), *size), 81, 1)
    assert near(seen(api, saved(Image.new("1", size, 1), "PNG"), *size), 255)


# G. Limits.


FILM = movie_url(movie(40, (320, 240)))


@pytest.mark.parametrize(
    ("override", "parts", "words"),
    [
        ("limits.max_media_bytes=1500", 4, "1500"),
        ("limits.max_media_pixels=100000", 2, "120000"),
        ("limits.max_media_frames=4", 0, "8 frames"),
    ],
)
def test_all_media_of_a_request_have_a_budget(override: str, parts: int, words: str) -> None:
    """In bytes, pixels and frames; each item alone is small enough."""
    film = {"type": "video_url", "video_url": {"url": FILM}, "nframes": 8}
    pictures = [image(inline(saved(NOISE.quantize(2 + n), "PNG"))) for n in range(parts)]
    with serving(override) as api:
        answer = api.chat(asked(*(pictures or [film])))
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (400, "media_too_large")
        assert words in error["message"]
        assert override.partition("=")[0] in error["message"]


def test_what_does_not_fit_the_window_is_counted_out() -> None:
    """By an engine that counts: each picture's tokens and the budget that fits are named.

    Under a policy the server counts as well; the scripted engine's window is 4096 tokens.
    """
    with serving() as api:
        part = image(inline(png((600, 600))))
        body = asked(part, part, max_tokens=4096 - 90, overflow="drop_oldest_images")
        error = error_of(api.chat(body))
        assert error["code"] == "context_length_exceeded"
        assert re.search(r"content\[0\]\.image_url \d+ tokens, .*content\[1\]", error["message"])
        found = re.search(r"max_pixels (\d+) for each picture", error["message"])
        assert found is not None
        part["max_pixels"] = int(found[1])
        assert api.chat(body).status_code == 200


# H. Texts.


@pytest.mark.parametrize("text", texts.FORGED)
def test_control_tokens_are_refused_wherever_they_stand(api: Running, text: str) -> None:
    """Whole, or split at any letter over two parts, in every role."""
    for role in ("user", "system", "developer", "assistant"):
        refused(api, {"messages": [{"role": role, "content": text}]}, "reserved_token")
    place = text.index("<|") + 1 + len(text) % 5
    halves = [{"type": "text", "text": text[:place]}, {"type": "text", "text": text[place:]}]
    for role in ("user", "system", "assistant"):
        refused(api, {"messages": [{"role": role, "content": halves}]}, "reserved_token")
    picture = image(inline(png()))
    refused(api, asked(picture, *halves, picture), "reserved_token")


@pytest.mark.parametrize("text", texts.TEXTS.values(), ids=texts.TEXTS)
def test_texts_of_every_script_arrive_as_they_are(api: Running, text: str) -> None:
    """Joiners, right-to-left marks, combining letters and what only resembles a token."""
    assert api.chat({"messages": [{"role": "user", "content": text}]}).status_code == 200
    assert api.engine.requests[-1].messages[0].content == text
    assert json.loads(json.dumps(text)) == text


def test_a_broken_film_is_refused(api: Running) -> None:
    """Cut short, or something else under its name."""
    for data in (b"\0\0\0\x18ftypmp42" + b"\0" * 99, b"\x1aE\xdf\xa3" + b"\0" * 99, png(), b""):
        part = {"type": "video_url", "video_url": {"url": movie_url(data)}}
        refused(api, asked(part), "invalid_video")
