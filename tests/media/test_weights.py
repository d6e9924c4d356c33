"""What decoding takes in memory stays within the weights that waiting is counted by."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from qwen2vl_serve.media.headers import Header
from qwen2vl_serve.media.image import FORMATS, read_header
from qwen2vl_serve.media.weights import (
    FRAME_WEIGHT,
    LISTED_FRAME_WEIGHT,
    PIXEL_WEIGHTS,
    picture_weight,
)
from qwen2vl_serve.profile.media import MediaSection
from tests.media.test_image import encoded

SLACK = 24 * 1024 * 1024
"""Bytes beside those that grow with the picture: a library's tables, the model's own size."""

TURNED = Image.Exif()
TURNED[0x0112] = 6


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture that is made and packed in no time."""
    tile = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    smooth = cv2.GaussianBlur(tile, (0, 0), 4)
    tiled = np.tile(smooth, (-(-height // 40), -(-width // 50), 1))[:height, :width]
    return Image.fromarray(tiled).convert(mode)


def deep(image: Image.Image) -> bytes:
    samples = np.asarray(image.convert("RGBA")).astype(np.uint16) * 257
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    made: bytes = cv2.imencode(".png", samples, options)[1].tobytes()
    return made


CASES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda image: encoded(image, "JPEG", exif=TURNED),
    "JPEG, progressive": lambda image: encoded(
        image, "JPEG", progressive=True, subsampling=0, exif=TURNED
    ),
    "JPEG, CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG", exif=TURNED),
    "PNG": lambda image: encoded(image, "PNG", compress_level=1, exif=TURNED),
    "PNG, grey with alpha": lambda image: encoded(
        image.convert("LA"), "PNG", compress_level=1, exif=TURNED
    ),
    "PNG, 16 bits": deep,
    "WebP": lambda image: encoded(image.convert("RGBA"), "WEBP", method=0, exif=TURNED),
}


def peak(tmp_path: Path, *cases: bytes) -> int:
    """Return how many bytes more the second file takes than the process has after the first."""
    paths = [tmp_path / str(number) for number in range(len(cases))]
    for path, data in zip(paths, cases, strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-m", "tests.media.peak", *map(str, paths)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.parametrize("size", [(4000, 3000), (12000, 1000)], ids=["12 MP", "narrow"])
@pytest.mark.parametrize("name", CASES)
def test_a_picture_takes_no_more_than_its_weight(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    """The peak of a process of its own, turned by EXIF where that is a copy more."""
    data = CASES[name](drawn(*size))
    pixels, weight = size[0] * size[1], picture_weight(read_header(data, 10**8, "it"))
    taken = peak(tmp_path, CASES[name](drawn(640, 480)), data)
    assert taken <= pixels * weight + SLACK
    assert taken >= pixels * weight // 3, "a weight is no guess"


def test_a_deep_heic_takes_no_more_than_its_weight(tmp_path: Path) -> None:
    """Of 10 bits, not subsampled, with alpha, turned: the dearest that is easily made."""

    def packed(image: Image.Image) -> bytes:
        samples = np.asarray(image.convert("RGBA")).astype(np.uint16) << 8
        file = pillow_heif.from_bytes("RGBA;16", image.size, samples.tobytes())
        file[0].info["exif"] = TURNED.tobytes()
        data = io.BytesIO()
        file.save(data, quality=50, chroma=444)
        return data.getvalue()

    width, height = 2000, 1500
    data = packed(drawn(width, height))
    weight = picture_weight(read_header(data, 10**8, "it"))
    taken = peak(tmp_path, packed(drawn(640, 480)), data)
    assert width * height * weight // 3 <= taken <= width * height * weight + SLACK


def test_every_format_has_weights() -> None:
    """And every mode in which Pillow gives one of them; of another one the heaviest is taken."""
    assert PIXEL_WEIGHTS.keys() == FORMATS.keys()
    for kind, by_mode in PIXEL_WEIGHTS.items():
        heaviest = max(by_mode.values())
        assert picture_weight(Header(kind, 1, 1, "new")) == heaviest
        assert min(by_mode.values()) >= 3, "pixels are RGB in the end"
        assert heaviest < LISTED_FRAME_WEIGHT, "a frame of a list may be of any format"
    figures = {weight for by_mode in PIXEL_WEIGHTS.values() for weight in by_mode.values()}
    told = MediaSection.model_fields["max_decoding_bytes"].description or ""
    assert f"from {min(figures)} bytes to {max(figures)}, and {FRAME_WEIGHT} in one frame" in told
    assert picture_weight(Header("MPO", 1, 1)) == PIXEL_WEIGHTS["JPEG"]["RGB"]
