"""Boxes are drawn where they are, with labels in letters and never in empty boxes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from qwen2vl_client import InvalidArgumentError, MediaError, draw, image_part
from qwen2vl_client.boxes import Box
from qwen2vl_client.draw import COLOURS, draw_boxes


@pytest.fixture
def chinese_font(tmp_path: Path) -> Path:
    """A font of our own that has 红 and 圆 (as two different blocks) and nothing else."""

    def block(height: int) -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, height), (900, height), (900, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", "red", "round"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord("红"): "red", ord("圆"): "round"})
    font.setupGlyf({".notdef": block(500), "red": block(800), "round": block(650)})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Two", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path = tmp_path / "two.ttf"
    font.save(path)
    return path


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def test_the_frame_runs_along_the_box() -> None:
    """Its outer pixels are coloured, not those outside or in the middle; the source is kept."""
    source = Image.new("RGB", (100, 80), "white")
    drawn = draw_boxes(source, [Box(20, 30, 60, 70)], width=2)
    for corner in ((20, 30), (59, 30), (20, 69), (59, 69)):
        assert drawn.getpixel(corner) == rgb(COLOURS[0])
    for other in ((19, 29), (60, 70), (40, 50), (22, 32)):
        assert drawn.getpixel(other) == (255, 255, 255)
    assert source.getcolors() == [(8000, (255, 255, 255))]


def test_boxes_of_one_label_share_a_colour() -> None:
    """A second label gets the next colour; the first keeps its own when it comes again."""
    boxes = [Box(5, 40, 30, 60, "a"), Box(40, 40, 60, 60, "b"), Box(70, 40, 90, 60, "a")]
    drawn = draw_boxes(Image.new("RGB", (100, 80), "white"), boxes)
    seen = [drawn.getpixel((box.left, box.bottom - 1)) for box in boxes]
    assert seen == [rgb(COLOURS[0]), rgb(COLOURS[1]), rgb(COLOURS[0])]


def test_the_picture_is_drawn_on_upright() -> None:
    """A photo that its camera turned has the size that the server reports of it."""
    store, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40), "white").save(store, "JPEG", exif=turned)
    assert draw_boxes(store.getvalue(), [Box(0, 0, 40, 60)]).size == (40, 60)


def test_pictures_are_given_as_to_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in the home folder; an open file that was sent before."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.png")
    assert draw_boxes("~/a.png", []).size == (60, 40)
    with (tmp_path / "a.png").open("rb") as file:
        image_part(file)
        assert draw_boxes(file, []).size == (60, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_see_through_is_drawn_on_white(mode: str) -> None:
    """As the server shows it to the model, and not in the colour that is hidden under it."""
    clear = Image.new("RGBA", (30, 20), (10, 20, 30, 0))
    picture = clear.quantize(8) if mode == "P" else clear.convert(mode)
    drawn = draw_boxes(picture, [])
    assert (drawn.mode, drawn.getpixel((5, 5))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize(
    ("mode", "sample", "shade"),
    [("I;16", 32896, 128), ("I;16B", 32896, 128), ("I", 32896, 128), ("I", 128, 128),
     ("F", 0.5, 127), ("F", 128.0, 128)],
)  # fmt: skip
def test_samples_of_more_than_eight_bits_keep_their_shades(
    mode: str, sample: float, shade: int
) -> None:
    """They are scaled as the server scales them; Pillow's own conversion would leave white."""
    grey = Image.new("F", (30, 20), sample)
    if mode != "F":
        grey = grey.convert("I").convert(mode)
    assert draw_boxes(grey, []).getpixel((5, 5)) == (shade, shade, shade)


@pytest.mark.parametrize("source", ["https://h/a.png", "file-" + "a" * 24])
def test_a_picture_that_is_elsewhere_is_not_looked_for_as_a_file(source: str) -> None:
    """A URL and the id of an uploaded file are told apart from the path of a missing file."""
    with pytest.raises(MediaError, match="give the file itself"):
        draw_boxes(source, [])


def test_a_label_in_chinese_is_drawn_with_a_font_that_has_it(
    chinese_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given by name, or found among the installed ones; other fonts are passed over."""
    blank = Image.new("RGB", (200, 120), "white")
    named = draw_boxes(blank, [Box(50, 60, 150, 110, "红圆")], font=chinese_font)
    monkeypatch.setattr(draw, "FONT_FOLDERS", (str(chinese_font.parent),))
    draw.installed_fonts.cache_clear()
    try:
        assert draw_boxes(blank, [Box(50, 60, 150, 110, "红圆")]).tobytes() == named.tobytes()
    finally:
        draw.installed_fonts.cache_clear()
    other = draw_boxes(blank, [Box(50, 60, 150, 110, "圆红")], font=chinese_font)
    assert other.tobytes() != named.tobytes()


def test_a_label_that_no_font_has_is_an_error_and_not_tofu(
    chinese_font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names what to install, or the characters that the given font lacks."""
    blank = Image.new("RGB", (200, 120), "white")
    monkeypatch.setattr(draw, "FONT_FOLDERS", ())
    draw.installed_fonts.cache_clear()
    try:
        with pytest.raises(InvalidArgumentError, match="fonts-noto-cjk"):
            draw_boxes(blank, [Box(5, 5, 50, 50, "红色圆形")])
    finally:
        draw.installed_fonts.cache_clear()
    with pytest.raises(InvalidArgumentError, match="lacks 色"):
        draw_boxes(blank, [Box(5, 5, 50, 50, "红色")], font=chinese_font)


def test_latin_labels_need_no_installed_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """The font that comes with Pillow is enough, so that a bare container draws ``a circle``."""
    monkeypatch.setattr(draw, "installed_fonts", lambda: ())
    plain = draw_boxes(Image.new("RGB", (200, 120), "white"), [Box(50, 60, 150, 110)])
    named = draw_boxes(Image.new("RGB", (200, 120), "white"), [Box(50, 60, 150, 110, "a circle")])
    assert named.tobytes() != plain.tobytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Pillow the error has the command that installs it, not an ImportError."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InvalidArgumentError, match="pip install pillow"):
        draw_boxes(b"", [])


@pytest.mark.parametrize("source", [b"no picture", "no/such.png", 7])
def test_what_is_no_picture_is_refused(source: object) -> None:
    """Other bytes, a path where nothing is, a number: a ``MediaError``, not Pillow's own."""
    with pytest.raises(MediaError, match="cannot draw on"):
        draw_boxes(source, [])  # type: ignore[arg-type]
