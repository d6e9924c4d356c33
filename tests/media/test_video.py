"""Decoding videos: the reference's frames, to the bit, and nothing of what is damaged."""

from __future__ import annotations

import http.server
import importlib
import io
import struct
import tempfile
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_serve.errors import (
    APIError,
    ImageTooLarge,
    InvalidImage,
    InvalidVideo,
    VideoTooLarge,
)
from qwen2vl_serve.media.sampling import REFERENCE, sample_file, sample_list
from qwen2vl_serve.media.video import (
    VideoHeader,
    VideoLimits,
    decode,
    decode_listed,
    frame_indices,
    read_header,
    read_listed_header,
)
from qwen2vl_serve.protocol.content import VideoFields
from qwen2vl_serve.torchvision_ops import declare_missing_operators
from tests.media.movies import movie, picture

LIMITS = VideoLimits()
KINDS = [
    ("mp4", "libx264"),
    ("mp4", "libx265"),
    ("mp4", "mpeg4"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("mov", "libx264"),
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """qwen_vl_utils, reading as torchvision's ``read_video`` did before it was taken out.

    The two other readers it knows are not installed, or do not load, beside CPU torch.
    """
    declare_missing_operators()
    torch: Any = importlib.import_module("torch")
    vision: Any = importlib.import_module("qwen_vl_utils.vision_process")

    def read(ele: dict[str, Any]) -> Any:
        with av.open(ele["video"]) as container:
            rate = float(container.streams.video[0].average_rate or 0)
            frames = [frame.to_rgb().to_ndarray() for frame in container.decode(video=0)]
        video = torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2)
        count = vision.smart_nframes(ele, total_frames=len(frames), video_fps=rate)
        index = torch.linspace(0, len(frames) - 1, count).round().long()
        return video[index], {}, count / len(frames) * rate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "VIDEO_READER_BACKENDS", {"pyav": read})
        patch.setattr(vision, "get_video_reader_backend", lambda: "pyav")
        yield vision


def frames_of(data: bytes, **fields: Any) -> np.ndarray:
    header = read_header(data, LIMITS, "it")
    sampling = sample_file(header, VideoFields(**fields), REFERENCE, "it")
    size = sampling.sizing.height, sampling.sizing.width
    return decode(data, frame_indices(header.frames, sampling.frames), size, LIMITS, "it")


def jpeg(frame: np.ndarray, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(frame).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(("form", "codec"), KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nframes": 6},
        {"fps": 1.0, "max_pixels": 140 * 784},
        {"fps": 5.0, "min_pixels": 200 * 784},
        {"fps": 3.0, "total_pixels": 900 * 784},
        {"resized_height": 392, "resized_width": 504},
    ],
    ids=str,
)
def test_the_frames_are_the_references(
    theirs: Any, tmp_path: Path, form: str, codec: str, fields: dict[str, Any]
) -> None:
    """Sampled, resized and rounded alike: every value of every frame is equal."""
    data = movie(33, (322, 242), form, codec)
    path = tmp_path / "video"
    path.write_bytes(data)
    expected = theirs.fetch_video({"video": str(path), **fields}).permute(0, 2, 3, 1).numpy()
    ours = frames_of(data, **fields)
    assert ours.shape == expected.shape
    assert np.array_equal(ours, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60),
    st.tuples(st.integers(32, 400), st.integers(32, 400)),
    st.tuples(st.sampled_from([1, 5, 12, 24, 30, 60]), st.sampled_from([0.5, 1.0, 2.0, 7.5])),
)
def test_any_length_size_and_rate(
    theirs: Any, count: int, size: tuple[int, int], rates: tuple[int, float]
) -> None:
    """Random videos at random rates: still the reference's frames."""
    even, (rate, fps) = (size[0] // 2 * 2, size[1] // 2 * 2), rates
    data = movie(count, even, codec="mpeg4", rate=rate)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        expected = theirs.fetch_video({"video": file.name, "fps": fps})
    assert np.array_equal(frames_of(data, fps=fps), expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(280, 280), (333, 222), (90, 410)])
def test_listed_frames_are_the_references(theirs: Any, count: int, size: tuple[int, int]) -> None:
    """Resized twice, as theirs are; an odd list ends with its last frame twice."""
    files = [jpeg(picture(number, size)) for number in range(count)]
    images = [Image.open(io.BytesIO(file)) for file in files]
    expected = theirs.fetch_video({"video": images}).permute(0, 2, 3, 1).numpy()
    header = read_listed_header(files, None, LIMITS, "it")
    sampling = sample_list(header, VideoFields(), REFERENCE, "it")
    size = sampling.sizing.height, sampling.sizing.width
    ours = decode_listed(files, sampling.shape, size, LIMITS, "it")
    assert ours.shape == expected.shape
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize(("form", "codec"), KINDS)
def test_the_header_tells_what_decodes(form: str, codec: str) -> None:
    """Sides, frames and rate, for each container and codec."""
    header = read_header(movie(41, (320, 180), form, codec, rate=25), LIMITS, "it")
    assert header == VideoHeader(320, 180, 41, 25.0)
    assert header.duration == 1.64


def test_frames_that_are_only_referred_to_are_not_counted() -> None:
    """VP8 may keep frames for reference that are never shown: bit 4 of the head is clear."""
    made = io.BytesIO()
    with av.open(io.BytesIO(movie(30, form="webm", codec="libvpx"))) as source:
        stream = source.streams.video[0]
        with av.open(made, "w", format="webm") as container:
            copy = container.add_stream_from_template(stream)
            for number, packet in enumerate(source.demux(stream)):
                if packet.size:
                    head = bytes(packet)[0] & (0xEF if number in (7, 20) else 0xFF)
                    other = av.Packet(bytes([head]) + bytes(packet)[1:])
                    other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
                    other.is_keyframe, other.stream = packet.is_keyframe, copy
                    container.mux(other)
    assert read_header(made.getvalue(), LIMITS, "it").frames == 28
    assert len(frames_of(made.getvalue(), nframes=28)) == 28


def turned(data: bytes, matrix: tuple[int, ...]) -> bytes:
    """Write a transformation matrix into the track header of an mp4 file."""
    place = data.index(b"tkhd") + 44
    words = b"".join(word.to_bytes(4, "big", signed=True) for word in matrix)
    return data[:place] + words + data[place + 36 :]


ONE = 1 << 16


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [
        ((0, ONE, 0, -ONE, 0, 0, 160 * ONE, 0, 1 << 30), -1),
        ((-ONE, 0, 0, 0, -ONE, 0, 320 * ONE, 160 * ONE, 1 << 30), 2),
        ((0, -ONE, 0, ONE, 0, 0, 0, 320 * ONE, 1 << 30), 1),
    ],
    ids=["a quarter right", "upside down", "a quarter left"],
)
def test_a_phones_video_stands_upright(matrix: tuple[int, ...], turns: int) -> None:
    """Phones store what they film lying, with the turn beside it (ISO 14496-12, 8.3.2)."""
    data = movie(8, (320, 160))
    plain = read_header(data, LIMITS, "it")
    size = (plain.height, plain.width)
    lying = decode(data, frame_indices(8, 4), size, LIMITS, "it")
    upright = np.rot90(lying, turns, axes=(1, 2))
    header = read_header(turned(data, matrix), LIMITS, "it")
    assert (header.height, header.width) == upright.shape[1:3]
    seen = decode(turned(data, matrix), frame_indices(8, 4), upright.shape[1:3], LIMITS, "it")
    assert np.array_equal(seen, upright)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x1aE\xdf\xa3",
        b"\0\0\0\x18ftypmp42" + bytes(40),
        b"GIF89a" + bytes(100),
        jpeg(picture(0, (64, 64))),
        movie(8, form="avi", codec="mpeg4"),
        movie(8, form="matroska", codec="mjpeg"),
        b"RIFF\0\0\0\0AVI LIST",
        b"%PDF-1.7",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_served_video_is_refused(data: bytes) -> None:
    """Other containers, other codecs, other things: one error that says what is served."""
    with pytest.raises(InvalidVideo, match="send an mp4, webm or mkv") as caught:
        read_header(data, LIMITS, "messages[0]")
    assert caught.value.param == "messages[0]"


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    """FFmpeg knows formats that name files and addresses; none of them is ever tried."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(movie(8))
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{inner.server_port}/x.mp4"
        playlists = [
            f"#EXTM3U\n#EXTINF:1,\n{address}\n",
            f"ffconcat version 1.0\nfile {secret}\n",
            f"v=0\nc=IN IP4 127.0.0.1\n{address}\n",
            f'<?xml version="1.0"?><MPD><BaseURL>{address}</BaseURL></MPD>',
        ]
        for text in playlists:
            for head in (b"", b"\0\0\0\x08ftyp", b"\x1aE\xdf\xa3"):
                with pytest.raises(InvalidVideo):
                    read_header(head + text.encode(), LIMITS, "it")
        inner.shutdown()
    assert seen == []


@pytest.mark.parametrize(("form", "codec"), KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_video_that_is_cut_short_is_refused(form: str, codec: str, share: float) -> None:
    """Part of a file is not shown as if it were the whole."""
    options = {"movflags": "faststart"} if form == "mp4" else {}
    data = movie(40, (160, 120), form, codec, **options)
    with pytest.raises(InvalidVideo):
        frames_of(data[: int(len(data) * share)])


def trimmed(data: bytes, first: int, seconds: int) -> bytes:
    """An mp4 of 10 frames a second as editors trim it: only its edit list is another."""
    edit = data.index(b"elst")
    unit = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    file = bytearray(data)
    begin = struct.unpack_from(">i", data, edit + 16)[0] + first * scale // 10
    struct.pack_into(">Ii", file, edit + 12, seconds * unit, begin)
    return bytes(file)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize(("first", "seconds"), [(0, 4), (20, 4), (20, 2)])
def test_a_trimmed_film_is_shown_as_it_was_trimmed(codec: str, first: int, seconds: int) -> None:
    """What an edit list leaves out is not missing, unless the file is cut short as well."""
    data = movie(60, (160, 120), "mp4", codec, movflags="faststart")
    left = trimmed(data, first, seconds)
    header = read_header(left, LIMITS, "it")
    assert header.frames == 10 * seconds
    every = decode(data, range(60), (120, 160), LIMITS, "it")
    shown = decode(left, range(header.frames), (120, 160), LIMITS, "it")
    assert np.array_equal(shown, every[first : first + 10 * seconds])
    for missing in (100, len(left) // 2):
        with pytest.raises(InvalidVideo):
            read_header(left[:-missing], LIMITS, "it")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(KINDS[:1] + KINDS[2:6]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=20),
)
def test_damage_is_an_error_or_harmless(
    kind: tuple[str, str], damage: list[tuple[float, int]]
) -> None:
    """Whatever bytes change: frames of the right shape, or one of our errors; no crash."""
    good = MOVIES[kind]
    data = bytearray(good)
    for place, flip in damage:
        data[int(place * (len(data) - 1))] ^= flip
    try:
        frames = frames_of(bytes(data), nframes=4)
    except APIError as error:
        assert error.status == 400
    else:
        assert frames.dtype == np.uint8
        assert len(frames) == 4


MOVIES = {kind: movie(12, (96, 64), *kind) for kind in KINDS}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damaged_pictures_are_not_made_up(codec: str) -> None:
    """A decoder would conceal what is missing, with grey or with the frame before."""
    data = movie(30, (320, 240), codec=codec)
    media = data.index(b"mdat")
    broken = bytearray(data)
    for place in range(media + 1500, media + 3500, 3):
        broken[place] ^= 0x5A
    with pytest.raises(InvalidVideo):
        frames_of(bytes(broken))


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (VideoLimits(max_frames=20), "more than 20 frames"),
        (VideoLimits(max_pixels=10_000), "at most 10000 pixels a frame"),
        (VideoLimits(seconds=0.0), "takes more than 0 seconds"),
    ],
    ids=["frames", "pixels", "seconds"],
)
def test_limits_are_named(limits: VideoLimits, told: str) -> None:
    """What the limit is and what to do."""
    with pytest.raises(VideoTooLarge, match=told):
        read_header(movie(24), limits, "it")


def test_decoding_ends_at_the_deadline() -> None:
    """Also where the header was read in time."""
    with pytest.raises(VideoTooLarge, match="send it shorter"):
        decode(movie(24), [0, 23], (28, 28), VideoLimits(seconds=0.0), "it")
    files = [jpeg(picture(0, (56, 56)))] * 2
    with pytest.raises(VideoTooLarge):
        decode_listed(files, (56, 56), (56, 56), VideoLimits(seconds=0.0), "it")


def test_opening_ends_at_the_deadline(capfd: pytest.CaptureFixture[str]) -> None:
    """Damage that the fuzzer found: FFmpeg seeks to and fro for ever, before any packet."""
    data = (Path(__file__).parent / "endless.mp4").read_bytes()
    with pytest.raises(VideoTooLarge, match="takes more than"):
        read_header(data, VideoLimits(seconds=0.3), "it")
    assert capfd.readouterr().err == ""


def test_a_bad_frame_of_a_list_is_named() -> None:
    """Its number is in ``param``; a frame of another size is refused as well."""
    good = jpeg(picture(0, (64, 64)))
    with pytest.raises(InvalidImage) as caught:
        read_listed_header([good, b"x"], None, LIMITS, "it")
    assert caught.value.param == "it[1]"
    with pytest.raises(InvalidVideo, match="frame 1 is 80 × 64"):
        read_listed_header([good, jpeg(picture(0, (80, 64)))], None, LIMITS, "it")
    with pytest.raises(ImageTooLarge):
        read_listed_header([good], None, VideoLimits(max_pixels=100), "it")
    cut = jpeg(picture(3, (640, 480)))[:3000]
    with pytest.raises(InvalidImage) as caught:
        decode_listed([good, cut], (56, 56), (56, 56), LIMITS, "it")
    assert caught.value.param == "it[1]"
