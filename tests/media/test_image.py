"""Decoding: pixels equal to the reference's, and nothing damaged taken for a picture."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from qwen2vl_serve.errors import ImageTooLarge, InvalidImage
from qwen2vl_serve.media.image import decode, file_kind, installed_formats, read_header
from qwen2vl_serve.vision import PixelBudget, smart_resize

BUDGET = PixelBudget(3136, 1_003_520)
LIMIT = 100_000_000


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with edges and noise, so that chroma and rounding matter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / (7 + 3 * c)) * 90 + np.cos(y / (5 + 2 * c)) * 60 + 128 for c in range(3)]
    pixels = np.stack(channels, -1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 30)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def ours(data: bytes) -> np.ndarray:
    header = read_header(data, LIMIT, "p")
    return decode(data, smart_resize(header.height, header.width, BUDGET), "p")


def reference(data: bytes) -> np.ndarray:
    """qwen_vl_utils on the upright picture."""
    from qwen_vl_utils import fetch_image

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    settings = {"min_pixels": BUDGET.min_pixels, "max_pixels": BUDGET.max_pixels}
    return np.asarray(fetch_image({"image": upright, **settings}))


FILES = {
    "4:2:0": encoded(photo(640, 480), "JPEG", quality=85),
    "4:4:4": encoded(photo(640, 480), "JPEG", quality=92, subsampling=0),
    "progressive": encoded(photo(641, 479), "JPEG", progressive=True),
    "odd size": encoded(photo(333, 517), "JPEG"),
    "large": encoded(photo(2500, 1900), "JPEG"),
    "grey JPEG": encoded(photo(300, 300, "L"), "JPEG"),
    "CMYK": encoded(photo(300, 200, "CMYK"), "JPEG"),
    "PNG": encoded(photo(300, 200), "PNG"),
    "palette": encoded(photo(300, 200).quantize(64), "PNG"),
    "black and white": encoded(photo(300, 200, "1"), "PNG"),
    "WebP": encoded(photo(300, 200), "WEBP"),
    "lossless WebP": encoded(photo(300, 200), "WEBP", lossless=True),
    "GIF": encoded(photo(300, 200), "GIF"),
    "BMP": encoded(photo(300, 200), "BMP"),
    "TIFF": encoded(photo(300, 200), "TIFF", compression="tiff_lzw"),
    "199:1": encoded(photo(1990, 10), "PNG"),
    "1:199": encoded(photo(10, 1990), "PNG"),
    "200:1": encoded(photo(2000, 10), "PNG"),
    "1:200": encoded(photo(10, 2000), "PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_the_references(name: str) -> None:
    """Bit for bit, for each format, sampling and mode that the reference decodes."""
    assert np.array_equal(ours(FILES[name]), reference(FILES[name]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_stands_upright(orientation: int, kind: str) -> None:
    """All eight EXIF orientations in each format that has them, sizes included."""
    if kind not in installed_formats():
        pytest.skip("this Pillow cannot")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photo(300, 200), kind, exif=exif)
    header = read_header(data, LIMIT, "p")
    expected = (300, 200) if orientation < 5 else (200, 300)
    assert (header.width, header.height) == expected
    assert np.array_equal(ours(data), reference(data))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def oriented_chunks(orientation: int) -> dict[str, bytes]:
    """Each way in which a PNG may say how it stands."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    raw = exif.tobytes()
    hexed = (b"\nexif\n%8d\n" % len(raw)) + raw.hex().encode() + b"\n"
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    return {
        "eXIf": chunk(b"eXIf", raw[6:]),
        "tEXt": chunk(b"tEXt", b"Raw profile type exif\0" + hexed),
        "zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed)),
        "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        "iTXt, compressed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    }


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("way", oriented_chunks(6))
def test_a_png_stands_upright_wherever_it_says_so(way: str, behind: bool) -> None:
    """As Pillow reads it; most PNGs say nothing."""
    data = encoded(photo(120, 60), "PNG")
    at = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    turned = data[:at] + oriented_chunks(6)[way] + data[at:]
    header = read_header(turned, LIMIT, "p")
    assert (header.width, header.height) == (60, 120)
    assert np.array_equal(ours(turned), reference(turned))


def test_the_header_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded before the request has been given room for it."""
    decoded = []

    def load(picture: Image.Image) -> None:
        decoded.append(picture)

    data = encoded(photo(120, 60), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert read_header(data, LIMIT, "p").width == 120
    assert decoded == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_are_white(mode: str) -> None:
    """Whatever colour hides behind full transparency."""
    image = Image.new("RGBA", (84, 84), (255, 0, 0, 0)).convert(mode)
    assert (ours(encoded(image, "PNG" if mode != "PA" else "TIFF")) == 255).all()


def test_a_transparent_palette_entry_is_white() -> None:
    """GIF and PNG palettes name one entry as see-through."""
    image = Image.new("P", (84, 84), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert (ours(encoded(image, "PNG", transparency=0)) == 255).all()


def keyed(image: np.ndarray, *colour: int) -> bytes:
    """A PNG of samples, grey or BGR, with a chunk that calls one colour see-through."""
    data: bytes = cv2.imencode(".png", image)[1].tobytes()
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour)) + data[at:]


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_the_transparent_colour_of_an_rgb_png_is_shown_as_the_reference_shows_it(
    depth: type[np.unsignedinteger[Any]],
) -> None:
    """``to_rgb`` of qwen_vl_utils knows alpha by the mode RGBA alone; of RGB it ignores tRNS.

    So do we: the colour stays what it is, bit for bit, and is not made white.
    """
    from qwen_vl_utils.vision_process import to_rgb

    scale = 257 if depth == np.uint16 else 1
    samples = np.asarray(photo(140, 84)).astype(depth) * depth(scale)
    samples[:42] = np.array((30, 20, 10), depth) * depth(scale)
    data = keyed(samples, 10 * scale, 20 * scale, 30 * scale)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.mode, image.info.get("transparency") is not None) == ("RGB", True)
        assert np.array_equal(ours(data), np.asarray(to_rgb(image)))
    assert ours(data)[10, 10].tolist() == [10, 20, 30]


def test_the_transparent_grey_of_a_png_is_white() -> None:
    """Pinned: alpha on white, as for grey with alpha, palettes and grey of 16 bits.

    ``to_rgb`` of qwen_vl_utils would show what hides behind: it looks at the mode RGBA alone.
    """
    samples = np.full((84, 84), 100, np.uint8)
    samples[:42] = 7
    seen = ours(keyed(samples, 7))
    assert (seen[:30] == 255).all()
    assert (seen[50:] == 100).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """A ramp over 16 bits stays a ramp over 8."""
    ramp = np.linspace(0, 65535, 140 * 140).astype(np.uint16).reshape(140, 140)
    seen = ours(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(seen[..., 0].astype(int) - (ramp // 257).astype(int)).max() <= 1


@pytest.mark.parametrize(("sample", "shown"), [(255, 1), (256, 1), (257, 1), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_of_one_range(kind: str, sample: int, shown: int) -> None:
    """What the file says, not its brightest sample: a dark picture stays dark."""
    dark = np.full((84, 84), sample, np.uint16)
    assert (ours(encoded(Image.fromarray(dark), kind)) == shown).all()


def test_clear_samples_of_sixteen_bits_are_white() -> None:
    """A grey PNG may name one sample as see-through."""
    samples = np.full((84, 84), 30_000, np.uint16)
    samples[:, 42:] = 500
    data = encoded(Image.fromarray(samples), "PNG")
    at = data.index(b"IDAT") - 4
    seen = ours(data[:at] + chunk(b"tRNS", struct.pack(">H", 500)) + data[at:])
    assert (seen[:, 50:] == 255).all()
    assert (seen[:, :30] == 117).all()


def test_an_animation_is_its_first_frame() -> None:
    """Pinned: the first frame of GIF and WebP."""
    frames = [Image.new("RGB", (84, 84), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert ours(data)[40, 40].tolist() == [255, 0, 0]


def png(width: int, height: int, data: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


ROWS = b"".join(b"\0" + bytes([200] * 192) for _ in range(64))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7 whatever",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS" + bytes(100),
        FILES["4:2:0"][:4000],
        FILES["PNG"][:4000],
        FILES["GIF"][:4000],
        FILES["WebP"][:4000],
        FILES["TIFF"][:4000],
        png(64, 64, zlib.compress(ROWS[: len(ROWS) // 2])),
        png(64, 64, zlib.compress(ROWS)[:20]),
        png(64, 64, b"\0" * 50),
        png(0, 64, zlib.compress(ROWS)),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_damaged_or_foreign_is_refused(data: bytes) -> None:
    """Never a black or half picture; never a library's words."""
    with pytest.raises(InvalidImage) as caught:
        ours(data)
    assert "0x" not in caught.value.message


def animated(*chunks: bytes) -> bytes:
    """A PNG of 64 x 64 that says that it has two frames."""
    data = png(64, 64, b"")
    return data[:33] + b"".join((chunk(b"acTL", struct.pack(">II", 2, 0)), *chunks)) + data[-12:]


def frame(sequence: int, height: int = 64) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, 64, height, 0, 0, 1, 10, 0, 0))


def frame_data(sequence: int) -> bytes:
    return chunk(b"fdAT", struct.pack(">I", sequence) + zlib.compress(ROWS))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:5000]], ids=["whole", "cut short"])
def test_of_an_animated_png_its_own_picture_is_shown_if_it_is_whole(rows: bytes) -> None:
    """As its first frame or none of them, and only as the format has it: never black rows."""
    own = chunk(b"IDAT", zlib.compress(rows))
    files = [
        animated(frame(0), own, frame(1), frame_data(2)),
        animated(own, frame(0), frame_data(1), frame(2), frame_data(3)),
    ]
    if rows == ROWS:
        for data in files:
            assert (ours(data) == 200).all()
        files = [
            animated(frame(0, height=32), own, frame(1), frame_data(2)),
            animated(frame(0), frame_data(1), own, frame(2), frame_data(3)),
        ]
    for data in files:
        with pytest.raises(InvalidImage, match="damaged picture"):
            ours(data)


def test_what_a_png_says_of_itself_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    """A profile of the wrong kind, with a name that would look like a line of the server's log."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    named = chunk(b"iCCP", b"x\nPOST /v1/files 200\x1b[31m\0\0" + zlib.compress(profile))
    data = png(64, 64, zlib.compress(ROWS))
    assert (ours(data[:33] + named + data[33:]) == 200).all()
    assert capfd.readouterr() == ("", "")


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    """Of its size, its palette or its pixels."""
    data = encoded(photo(300, 200).quantize(64), "PNG")
    for kind in (b"IHDR", b"PLTE", b"IDAT"):
        start = data.index(kind)
        end = start + 4 + int.from_bytes(data[start - 4 : start])
        wrong = bytes([data[end] ^ 1])
        with pytest.raises(InvalidImage, match="damaged picture"):
            ours(data[:end] + wrong + data[end + 1 :])


def test_a_pixel_bomb_is_refused_by_its_header() -> None:
    """100,000 × 100,000 pixels are announced in 60 bytes and never allocated."""
    with pytest.raises(ImageTooLarge):
        read_header(png(100_000, 100_000, b""), LIMIT, "p")
    with pytest.raises(ImageTooLarge) as caught:
        read_header(FILES["PNG"], 1000, "messages[0]")
    assert "300 × 200" in caught.value.message
    assert "1000" in caught.value.message


def test_the_profile_alone_says_how_large_a_picture_may_be() -> None:
    """Pillow's own limit (178,956,970 pixels) and its warning before that are not in the way."""
    assert read_header(png(20_000, 10_000, b""), 200_000_000, "p").width == 20_000


def test_what_pillow_thinks_of_damaged_tags_is_not_logged(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """It would be the senders' words, kept for ever to be told once."""
    installed_formats.cache_clear()
    tag = struct.pack("<HHHLLL", 1, 305, 2, 9999, 26, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<L", 8) + tag
    assert ours(encoded(photo(84, 84), "JPEG", exif=exif)).shape == (84, 84, 3)
    assert [str(one.message) for one in recwarn] == []


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 2**32), st.integers(1, 40))
def test_a_mutated_file_gives_pixels_or_a_clear_error(name: str, seed: int, count: int) -> None:
    """Random bytes changed, cut or doubled: an array of the right shape or ``InvalidImage``."""
    data = bytearray(FILES[name][:60_000] if name == "large" else FILES[name])
    dice = random.Random(seed)
    for _ in range(count):
        data[dice.randrange(len(data))] = dice.randrange(256)
    if seed % 3 == 0:
        del data[dice.randrange(len(data)) :]
    try:
        header = read_header(bytes(data), 4_000_000, "p")
        size = smart_resize(header.height, header.width, BUDGET)
        assert decode(bytes(data), size, "p").shape == (*size, 3)
    except (InvalidImage, ImageTooLarge):
        pass
    except ValueError as error:
        assert "pixels" in str(error)  # an aspect ratio that no picture may have


SERVED = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WebP": "WEBP",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "AVIF": "AVIF",
    "HEIC": "HEIF",
}


@pytest.mark.parametrize("name", SERVED)
def test_each_format_can_be_switched_off(name: str) -> None:
    """On, it is read; off, the error names it and what is taken instead."""
    kind = SERVED[name]
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    read_header(FILES["PNG"], LIMIT, "p")
    data = encoded(photo(300, 200), kind)
    assert read_header(data, LIMIT, "p", [kind]).format in (kind, "MPO")
    assert ours(data).shape == (196, 308, 3)
    others = [one for one in installed_formats() if one != kind]
    with pytest.raises(InvalidImage) as caught:
        read_header(data, LIMIT, "p", others)
    held, _, taken = caught.value.message.partition(";")
    assert held == f"p holds {name} data"
    shown = {one for one, pillows in SERVED.items() if pillows in others}
    assert set(taken.removeprefix(" this server takes ").rstrip(".").split(", ")) == shown


def test_heic_pixels_are_pillows() -> None:
    """With the extra, HEIC goes the way of the others, turned upright once."""
    pillow_heif = pytest.importorskip("pillow_heif")
    read_header(FILES["PNG"], LIMIT, "p")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(photo(300, 200), "HEIF", exif=exif.tobytes())
    header = read_header(data, LIMIT, "p")
    assert (header.width, header.height) == (200, 300)
    assert np.array_equal(ours(data), reference(data))
    assert pillow_heif.open_heif(io.BytesIO(data)).size == (200, 300)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a", "JPEG XL"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "MP4"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\xff\xff\xff\xffftyp", "MP4"),
        (b"\0\0\0\x08free\0\0\0\x08mdat", "MP4"),
        (b"\0\0\0\x08wide\0\0\0\x08mdat", "MP4"),
        (b"BM\0\0free", "BMP"),
        (b"\r\n%PDF-1.4", "PDF"),
        (bytes(1100) + b"%PDF-1.4", None),
        (b"\x1aE\xdf\xa3", "Matroska"),
        (b"GIF8", None),
        (b"", None),
    ],
)
def test_a_file_is_known_by_its_first_bytes(data: bytes, kind: str | None) -> None:
    """What users send by mistake is named, so that they see which file it was."""
    assert file_kind(data) == kind


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_fast_decode_is_near_the_exact_one(orientation: int) -> None:
    """Small against a large JPEG, upright as well: the mean error stays under two levels."""
    image = photo(1200, 900)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "JPEG", quality=92, exif=exif)
    size = (168, 224) if orientation == 1 else (224, 168)
    exact, fast = decode(data, size, "p"), decode(data, size, "p", fast=True)
    assert fast.shape == exact.shape == (*size, 3)
    assert 0 < np.abs(exact.astype(int) - fast).mean() < 2


def test_a_fast_decode_changes_only_large_jpegs() -> None:
    """A PNG, and a JPEG that the model sees at more than half its size, stay exact."""
    image = photo(400, 300)
    for kind, size in (("PNG", (56, 84)), ("JPEG", (168, 224))):
        data = encoded(image, kind)
        assert np.array_equal(decode(data, size, "p"), decode(data, size, "p", fast=True))
