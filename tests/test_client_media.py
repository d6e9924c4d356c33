"""Pictures and videos as content parts."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen2vl_client import MediaError, image_part, video_part
from qwen2vl_client.media import ImageSource, media_type, sources
from qwen2vl_client.request import user_message


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), 200 if mode in "L1" else None).save(buffer, format=kind, **options)
    return buffer.getvalue()


def url_of(part: dict[str, Any]) -> str:
    return str(part[part["type"]]["url"])


def content_of(part: dict[str, Any]) -> tuple[str, bytes]:
    head, _, data = url_of(part).partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data, validate=True)


KINDS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}


@pytest.mark.parametrize(("kind", "mime"), KINDS.items())
def test_bytes_paths_and_open_files_are_sent_unchanged(
    kind: str, mime: str, tmp_path: Path
) -> None:
    """The type is that of the bytes, whatever the file is called."""
    data = encoded(kind)
    path = tmp_path / "named.jpg"
    path.write_bytes(data)
    given_as: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        path,
        str(path),
        io.BytesIO(data),
    ]
    for source in given_as:
        assert content_of(image_part(source)) == (mime, data)


@pytest.mark.parametrize(
    "url",
    ["http://h/a.jpg", "https://h/a.jpg?x=1", "HTTPS://h/a", "data:image/png;base64,AAAA"],
)
def test_urls_are_sent_as_they_are(url: str) -> None:
    """The server fetches them: queries, capitals and the data of ``data:`` stay to the letter."""
    assert image_part(url) == {"type": "image_url", "image_url": {"url": url}}


def test_an_open_file_may_be_given_again(tmp_path: Path) -> None:
    """From its beginning, also where it was read or has just been written; a pipe as it comes."""
    data = encoded("PNG")
    buffer = io.BytesIO()
    buffer.write(data)
    for _ in range(2):
        assert content_of(image_part(buffer)) == ("image/png", data)

    class Pipe:
        def read(self) -> bytes:
            return data

    assert content_of(image_part(Pipe())) == ("image/png", data)  # type: ignore[arg-type]


def test_a_path_may_use_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string that begins with ``~`` starts at ``HOME``; blanks and Chinese may follow."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "图片 1.png").write_bytes(encoded("PNG"))
    assert content_of(image_part("~/图片 1.png"))[0] == "image/png"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pillow_images_keep_their_pixels(mode: str) -> None:
    """PNG without loss; what PNG cannot hold becomes RGB."""
    picture = Image.effect_noise((9, 7), 80).convert("RGB").convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        picture = Image.frombytes("I;16", (9, 7), os.urandom(126))
    mime, data = content_of(image_part(picture))
    sent = Image.open(io.BytesIO(data))
    assert mime == "image/png"
    assert (
        sent.convert("RGBA").tobytes()
        == (picture if mode not in {"CMYK", "YCbCr"} else picture.convert("RGB"))
        .convert("RGBA")
        .tobytes()
    )


@pytest.mark.parametrize("mode", ["I", "F"])
@pytest.mark.parametrize("value", [0, 200, 32768])
def test_pixels_of_no_known_range_are_refused(mode: str, value: int) -> None:
    """As an array of such numbers is: PNG would cut them to 0 to 255, which leaves white or black.

    What is offered instead is taken.
    """
    picture = Image.new(mode, (9, 7), value)
    with pytest.raises(MediaError) as caught:
        image_part(picture)
    for word in (f"mode {mode}", "0 to 255", 'convert("L")', 'convert("I;16")'):
        assert word in str(caught.value)
    _, data = content_of(image_part(picture.convert("I").convert("I;16")))
    assert Image.open(io.BytesIO(data)).getextrema() == (value, value)


@pytest.mark.parametrize("mode", ["I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_are_kept_in_any_byte_order(mode: str) -> None:
    """Which PNG writes as its own, not cut to 255."""
    picture = Image.frombytes(mode, (3, 1), b"\x80\x00\x01\x02\xff\xfe")
    _, data = content_of(image_part(picture))
    sent = Image.open(io.BytesIO(data)).convert("I")
    assert sent.tobytes() == picture.convert("I").tobytes()


def test_an_opened_photo_is_sent_upright() -> None:
    """PNG would lose the EXIF orientation that the server applies to a file."""
    photo = Image.new("RGB", (40, 20), "white")
    photo.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    photo.save(buffer, format="JPEG", quality=95, exif=exif)
    _, data = content_of(image_part(Image.open(buffer)))
    sent = Image.open(io.BytesIO(data)).convert("RGB")
    assert sent.size == (20, 40)
    assert sent.getpixel((10, 2)) == pytest.approx((254, 0, 0), abs=12)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.jpg", ["no picture file 'missing.jpg' in "]),
        (Path("/missing.jpg"), ["no picture file '/missing.jpg'"]),
        ("/", ["folder"]),
        ("/dev/zero", ["device"]),
        ("a\0b", ["cannot read the picture"]),
        ("A" * 5000, ["too long", "5000 characters"]),
        (b"", ["empty"]),
        ("", ["empty", "path"]),
        (b"%PDF-1.7", ["a PDF"]),
        (b"<?xml?><svg/>", ["an SVG"]),
        (b"plain text", ["no known kind", "plain te"]),
        (b"\x00\x00\x00\x18ftypmp42", ["video/mp4, not a picture"]),
        ("ftp://h/a.jpg", ["ftp://", "http://"]),
        ("file:///a.jpg", ["file://", "as its path"]),
        (42, ["int", "path"]),
        (None, ["NoneType"]),
        (io.StringIO("text"), ["mode 'rb'"]),
    ],
)
def test_what_is_no_picture_is_refused_in_plain_words(source: Any, words: list[str]) -> None:
    """A ``MediaError`` of under 600 characters says what it is instead, or what to give."""
    with pytest.raises(MediaError) as caught:
        image_part(source)
    for word in words:
        assert word.lower() in str(caught.value).lower()
    assert len(str(caught.value)) < 600


def test_an_open_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Closed, open for writing, with nothing to give yet: a ``MediaError`` names the mode."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    with path.open("rb") as closed:
        pass
    with path.open("ab") as writing, io.BytesIO() as emptied:
        emptied.close()
        for file in (closed, writing, emptied):
            with pytest.raises(MediaError, match="mode 'rb'"):
                image_part(file)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with (
        os.fdopen(reader, "rb", buffering=0) as waiting,
        pytest.raises(MediaError, match="no bytes"),
    ):
        image_part(waiting)
    os.close(writer)


def test_a_pipe_is_read_to_its_end() -> None:
    """What cannot be rewound is read from where it is."""
    reader, writer = os.pipe()
    os.write(writer, encoded("PNG"))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert content_of(image_part(pipe)) == ("image/png", encoded("PNG"))


@pytest.mark.parametrize("mode", ["PA", "RGBa", "LA"])
def test_what_is_see_through_stays_so(mode: str) -> None:
    """Its hidden colour is not what the model is shown."""
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 0)).convert(mode)
    _, data = content_of(image_part(picture))
    sent = Image.open(io.BytesIO(data)).convert("RGBA")
    assert sent.getchannel("A").getextrema() == (0, 0)


def test_an_array_without_sides_is_refused() -> None:
    """A single number in an array is neither a picture nor a video."""
    number = np.array(3, dtype=np.uint8)
    for part in (image_part, video_part):
        with pytest.raises(MediaError, match="array"):
            part(number)


def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    """A link that leads to itself is a ``MediaError`` too, and not the system's ``OSError``."""
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(MediaError, match=r"cannot read|there is no"):
        image_part(loop)


MAGIC = {
    b"": None,
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
    b"BM": "image/bmp",
    b"RIFF\x00\x00\x00\x00WEBP": "image/webp",
    b"\x00\x00\x00\x18ftypavif": "image/avif",
    b"\x00\x00\x00\x18ftypheic": "image/heic",
    b"\x00\x00\x00\x18ftypmp42": "video/mp4",
    b"\x1aE\xdf\xa3": "video/webm",
}


@settings(deadline=None)
@given(st.sampled_from(list(MAGIC)), st.binary(max_size=64))
def test_any_bytes_are_a_picture_or_refused(magic: bytes, rest: bytes) -> None:
    """Whatever follows, a picture's magic number makes it one; all else is a ``MediaError``."""
    data = magic + rest
    mime = MAGIC[magic] or media_type(data)
    if mime is not None and mime.startswith("image/"):
        assert content_of(image_part(data)) == (mime, data)
    else:
        with pytest.raises(MediaError):
            image_part(data)


ADDRESSES = ["http://", "https://h/", "HTTPS://", "data:", "DATA:image/png;base64,"]
OTHERS = ["", "ftp://", "file://", "file-", "~", "/"]


@settings(deadline=None)
@given(st.sampled_from(ADDRESSES + OTHERS), st.text(max_size=60))
def test_any_string_is_an_address_or_refused(beginning: str, rest: str) -> None:
    """An address or a file's id is sent to the letter; no other text raises but ``MediaError``."""
    text = beginning + rest
    if beginning in ADDRESSES:
        assert url_of(image_part(text)) == text
        return
    try:
        part = image_part(text)
    except MediaError:
        return
    assert part["image_url"] in ({"url": text}, {"file_id": text})


class TestVideos:
    MP4 = b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00"

    @pytest.mark.parametrize(
        ("data", "mime"),
        [
            (MP4, "video/mp4"),
            (b"\x00\x00\x00\x14ftypqt  ", "video/quicktime"),
            (b"\x1aE\xdf\xa3....", "video/webm"),
            (b"RIFF\x00\x00\x00\x00AVI LIST", "video/x-msvideo"),
        ],
    )
    def test_files_are_sent_by_their_type(self, data: bytes, mime: str, tmp_path: Path) -> None:
        """The first bytes tell it, not the name, whether bytes, a path or an open file is given."""
        path = tmp_path / "v.dat"
        path.write_bytes(data)
        for source in (data, path, str(path), io.BytesIO(data)):
            part = video_part(source)
            assert part["type"] == "video_url"
            assert content_of(part) == (mime, data)

    def test_urls_are_sent_as_they_are(self) -> None:
        """The server fetches the film; the client sends its address and nothing of its content."""
        assert url_of(video_part("https://h/v.mp4")) == "https://h/v.mp4"

    def test_frames_travel_in_order_in_one_address(self, tmp_path: Path) -> None:
        """Files keep their bytes, whatever their format; a Pillow image is encoded."""
        path = tmp_path / "f.png"
        path.write_bytes(encoded("PNG"))
        frames: list[ImageSource] = [encoded("JPEG"), path, Image.new("RGB", (8, 6))]
        head, *parts = url_of(video_part(frames)).split(",")
        assert head == "data:video/jpeg;base64"
        sent = [base64.b64decode(part, validate=True) for part in parts]
        assert sent[:2] == [encoded("JPEG"), path.read_bytes()]
        assert Image.open(io.BytesIO(sent[2])).size == (8, 6)

    @pytest.mark.parametrize(
        ("source", "word"),
        [([], "empty"), (["http://h/a.jpg"], "inline"), ([b"x"], "no known kind")],
    )
    def test_frames_that_cannot_be_sent_are_refused(self, source: Any, word: str) -> None:
        """No frame at all, an address among them, bytes of no picture: each error says which."""
        with pytest.raises(MediaError, match=word):
            video_part(source)

    def test_a_picture_in_place_of_a_video_is_explained(self) -> None:
        """The error shows the list in a list that the frames of one video are given as."""
        with pytest.raises(MediaError, match=r"videos=\[\[frame1, frame2\]\]"):
            video_part(encoded("JPEG"))


class TestUserMessage:
    def test_media_come_before_the_text(self) -> None:
        """Pictures first, then videos, then the question, all parts of one message."""
        message = user_message("What?", [encoded("PNG"), "http://h/b.jpg"], ["http://h/v.mp4"])
        assert message is not None
        assert [part["type"] for part in message["content"]] == [
            "image_url",
            "image_url",
            "video_url",
            "text",
        ]

    def test_one_picture_needs_no_list(self, tmp_path: Path) -> None:
        """A path, a string, bytes, a Pillow image or an open file is one part beside the text."""
        path = tmp_path / "a.png"
        path.write_bytes(encoded("PNG"))
        singles: list[Any] = [path, str(path), path.read_bytes(), Image.open(path), path.open("rb")]
        for source in singles:
            message = user_message("x", source)
            assert message is not None
            assert len(message["content"]) == 2

    def test_text_alone_stays_a_string(self) -> None:
        """Without media there is no list of parts; without anything there is no message."""
        assert user_message("x") == {"role": "user", "content": "x"}
        assert user_message(None) is None

    @pytest.mark.parametrize("given_images", [{"a": 1}, 5, object()])
    def test_what_is_no_list_is_refused(self, given_images: object) -> None:
        """A mapping, a number or another object is a ``MediaError``, not Python's ``TypeError``."""
        with pytest.raises(MediaError):
            user_message("x", given_images)

    def test_generators_are_read(self) -> None:
        """What a generator yields is a list of sources, in its order."""
        assert sources(name for name in ("a", "b")) == ["a", "b"]
