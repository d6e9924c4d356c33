"""What an mp4's index takes is told before FFmpeg expands it."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest

from qwen2vl_serve.errors import VideoTooLarge
from qwen2vl_serve.media.boxes import index_entries
from qwen2vl_serve.media.video import VideoLimits, read_header
from tests.media.movies import movie

MOST = 1_000_000
MANY = struct.pack(">I", 58_000_000)


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content) + 8) + name + content


def told(data: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """Return the file with ``value`` written ``offset`` bytes after the name of a box."""
    at = data.index(name) + offset
    return data[:at] + value + data[at + len(value) :]


def with_sound(seconds: int) -> bytes:
    """A QuickTime film with PCM sound: a sample for each of its values."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as made:
        film = made.add_stream("mpeg4", rate=1)
        film.width = film.height = 64
        film.pix_fmt = "yuv420p"
        sound = made.add_stream("pcm_s16le", rate=48_000, layout="mono")
        picture = np.zeros((64, 64, 3), np.uint8)
        for second in range(seconds):
            made.mux(film.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            values = np.zeros((1, 48_000), np.int16)
            heard = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
            heard.rate, heard.pts = 48_000, second * 48_000
            made.mux(sound.encode(heard))
        made.mux(film.encode())
    return file.getvalue()


FILM = movie(5, (64, 64), codec="mpeg4")
FRAGMENTS = movie(5, (64, 64), codec="mpeg4", movflags="frag_keyframe+empty_moov")
PRETENDED = box(b"trak", box(b"mdia", box(b"hdlr", bytes(8) + b"soun" + bytes(12))))


@pytest.mark.parametrize(
    "data",
    [
        told(FILM, b"stsz", 8, struct.pack(">I", 1) + MANY),
        told(FILM, b"stsz", 0, b"stz2" + bytes(8) + MANY),
        told(FRAGMENTS, b"trun", 8, MANY),
        told(FILM, b"stsz", 8, struct.pack(">I", 1) + MANY) + box(b"free", PRETENDED),
        FILM + box(b"moov", box(b"cmov", bytes(20))),
        FILM + box(b"elst", bytes(8 + 12 * 400_000)),
    ],
    ids=["stsz", "stz2", "trun", "pretended", "cmov", "edits"],
)
def test_a_long_index_is_refused_before_it_is_read(data: bytes) -> None:
    """A few bytes may announce any number of samples; gigabytes would be kept for them."""
    with pytest.raises(VideoTooLarge, match="index"):
        read_header(data, VideoLimits(), "it")


def test_an_index_told_within_the_media_is_found() -> None:
    """An index of fragments leads FFmpeg into what is otherwise never read as boxes."""
    hidden = box(b"mdat", box(b"moof", box(b"trun", bytes(4) + MANY)))
    assert index_entries(FILM + hidden, MOST) <= MOST
    assert index_entries(FILM + hidden + box(b"sidx", bytes(24)), MOST) > MOST


def test_a_long_honest_film_is_read() -> None:
    """Sound that has a sample for each value takes few entries: 30 seconds are 1,440,000."""
    data = with_sound(30)
    assert index_entries(data, MOST) < 10_000
    assert read_header(data, VideoLimits(), "it").frames == 30


@pytest.mark.parametrize("data", [FILM, FRAGMENTS, FILM[:200], b"", b"\0" * 40])
def test_an_ordinary_file_has_few_entries(data: bytes) -> None:
    """Whole, in fragments, cut short or no film at all."""
    assert index_entries(data, MOST) < 100


WORDS = "an elephant's trunk, Vogelstimmen, eine Attraktion, stsz stco " * 200


@pytest.mark.parametrize("form", ["mp4", "mov"])
@pytest.mark.parametrize("flags", ["", "use_metadata_tags"])
def test_texts_may_hold_any_word(form: str, flags: str) -> None:
    """What is written of a film, as downloaders do, is not read as boxes."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options={"movflags": flags} if flags else {}) as made:
        for name in ("title", "comment", "description", "synopsis"):
            made.metadata[name] = WORDS
        film = made.add_stream("mpeg4", rate=1)
        film.width = film.height = 64
        picture = np.zeros((64, 64, 3), np.uint8)
        made.mux(film.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        made.mux(film.encode())
    data = file.getvalue()
    assert data.count(b"trunk") >= 200
    assert index_entries(data, MOST) < 100
    assert index_entries(data + box(b"uuid", b"a trunk" * 99), MOST) < 100


def test_boxes_beside_texts_are_counted() -> None:
    """A text hides nothing of what FFmpeg reads as a box, wherever it lies."""
    index = box(b"trun", bytes(4) + MANY)
    for hidden in (
        box(b"moov", box(b"udta", index)),
        box(b"moov", box(b"udta", box(b"\xa9nam", b"a") + index)),
        box(b"udta", box(b"\xa9nam", index)),
        box(b"moov", box(b"mvex", box(b"\xa9nam", index))),
        box(b"moov", box(b"udta", box(b"meta", bytes(4) + box(b"hdlr") + box(b"ilst", index)))),
        box(b"moov", box(b"udta", box(b"\xa9nam", index))) + box(b"sidx", bytes(24)),
    ):
        assert index_entries(FILM + hidden, MOST) > MOST
