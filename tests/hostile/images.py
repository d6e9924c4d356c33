"""Class F: files that are no pictures, pictures that are bombs, and odd ones that must be seen."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from PIL import Image

from tests.hostile import pictures
from tests.hostile.case import Case, Outcome, image, refused, shown
from tests.hostile.pictures import header, inline, noise, png, saved, text_bomb
from tests.hostile.target import Target

TITLE = "pictures"


def half(form: str, cut: int) -> str:
    """Return a file without its end."""
    return inline(saved(noise(), form)[:-cut])


UNUSABLE: dict[str, Callable[[], str]] = {
    "bad base64": lambda: "data:image/png;base64,!!!!",
    "URL-safe alphabet": lambda: (
        "data:image/png;base64," + base64.urlsafe_b64encode(saved(noise(), "PNG")).decode()
    ),
    "no padding": lambda: inline(png() + b"\0" * (-len(png()) % 3 + 1)).rstrip("="),
    "white space": lambda: inline(png()).replace(",", ", "),
    "no comma": lambda: "data:image/png;base64",
    "no base64": lambda: "data:image/png,%89PNG",
    "a data URL of nothing": lambda: "data:,",
    "empty": lambda: "data:image/png;base64,",
    "SVG": lambda: inline(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    "SVG with prologue": lambda: inline(b"<?xml version='1.0'?><!DOCTYPE svg><svg></svg>"),
    "SVG that reads files": lambda: inline(
        b"<!DOCTYPE s [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>", "image/svg+xml"
    ),
    "PDF": lambda: inline(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
    "EPS": lambda: inline(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "PSD": lambda: inline(
        b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(400)
    ),
    "ICO": lambda: inline(saved(noise((32, 32)), "ICO")),
    "text": lambda: inline(b"hello"),
    "a zip archive": lambda: inline(b"PK\3\4" + bytes(99)),
    "a page": lambda: inline(b"<html><script>alert(1)</script></html>"),
    "a pickle": lambda: inline(b"\x80\x04\x95cos\nsystem\n(S'x'\ntR."),
    "cut JPEG": lambda: half("JPEG", 2000),
    "JPEG head alone": lambda: inline(saved(noise(), "JPEG")[:40]),
    "cut PNG": lambda: half("PNG", 5000),
    "cut GIF": lambda: half("GIF", 5000),
    "cut WebP": lambda: half("WEBP", 1000),
    "corrupt PNG data": lambda: inline(saved(noise(), "PNG").replace(b"IDAT", b"IDAT\0\0\0\0", 1)),
    "PNG that ends within its data": lambda: inline(header(300, 200)),
    "0 × 0": lambda: inline(header(0, 0)),
    "0 wide": lambda: inline(header(0, 9)),
    "sides of 201 to 1": lambda: inline(png((4020, 20))),
    "sides of 1 to 201": lambda: inline(png((20, 4020))),
}

OURS = {
    "URL-safe alphabet", "no padding", "white space", "ICO", "PSD",
}  # fmt: skip
"""Of these another server may make a picture and be right."""

BOMBS: dict[str, Callable[[], bytes]] = {
    "100,000²": lambda: header(100_000, 100_000),
    "the largest header": lambda: header(2**31 - 1, 2**31 - 1),
    "over the cap": lambda: header(20_000, 20_000),
    "zTXt": lambda: text_bomb(b"zTXt"),
    "iTXt": lambda: text_bomb(b"iTXt"),
}


def cases() -> list[Case]:
    """Return the class."""
    return [
        *(
            refused(
                "F",
                name,
                lambda url=url: shown(image(url())),
                "invalid_image",
                ours=name in OURS,
                param="messages[0].content[0].image_url",
            )
            for name, url in UNUSABLE.items()
        ),
        *(
            refused("F", name, lambda data=data: shown(image(inline(data()))), "image_too_large")
            for name, data in BOMBS.items()
        ),
        *(
            seen(f"EXIF orientation {turn}", lambda turn=turn: pictures.turned(turn), upright)
            for turn in pictures.TURNS
        ),
        seen("CMYK", lambda: saved(pictures.shapes().convert("CMYK"), "TIFF"), from_cmyk),
        seen("alpha", pictures.clear, upright),
        seen("16 bits", pictures.wide, pictures.grey),
        seen("grey", lambda: saved(pictures.shapes().convert("L"), "PNG"), pictures.grey),
        seen("a palette", lambda: saved(pictures.few_colours(), "PNG"), plain),
        *(
            seen(f"animated {form}", lambda form=form: pictures.animated(form), plain)
            for form in ("GIF", "WEBP", "PNG")
        ),
        Case("F", "a wrong picture would be noticed", noticed),
    ]


def upright() -> bytes:
    """Return the picture as it looks."""
    return saved(pictures.shapes(), "PNG")


def plain() -> bytes:
    """Return the same without a palette."""
    return saved(pictures.few_colours().convert("RGB"), "PNG")


def from_cmyk() -> bytes:
    """Return what is left of the colours behind CMYK."""
    there: Image.Image = pictures.shapes().convert("CMYK")
    return saved(there.convert("RGB"), "PNG")


SAME = 0.02
"""Equal pixels give equal logprobs but for rounding, whatever else a machine computes."""


def seen(name: str, odd: Callable[[], bytes], as_plain: Callable[[], bytes]) -> Case:
    """Return a case: to the model an odd file and a plain one of the same pixels are one."""

    def run(target: Target) -> Outcome:
        wrong, apart = _apart(target, odd(), as_plain())
        if wrong is None and apart > SAME:
            wrong = f"not the same pixels: logprobs differ by {apart:.3f}"
        return Outcome(wrong)

    return Case("F", name, run)


def noticed(target: Target) -> Outcome:
    """The measure itself: a quarter turn, a shade of grey and a lost alpha are seen."""
    for other in (
        pictures.shapes().rotate(90, expand=True),
        pictures.shapes().convert("L").convert("RGB"),
        pictures.shapes().transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ):
        wrong, apart = _apart(target, saved(other, "PNG"), upright())
        if wrong or apart <= SAME:
            return Outcome(wrong or f"other pixels, and logprobs differ by {apart:.4f} only")
    return Outcome()


def _apart(target: Target, one: bytes, other: bytes) -> tuple[str | None, float]:
    """Return what went wrong, else how far the model's views of two pictures are apart."""
    views = []
    for data in (one, other):
        body = shown(
            image(inline(data)), text="Describe the picture.",
            max_tokens=6, temperature=0, logprobs=True, top_logprobs=5,
        )  # fmt: skip
        answer, _ = target.chat(body)
        if answer.status != 200:
            return f"{answer.told}: {answer.body[:200]!r}", 0.0
        views.append(_view(json.loads(answer.body)))
    if [token for token, _ in views[0]] != [token for token, _ in views[1]]:
        return None, float("inf")
    pairs = zip(views[0], views[1], strict=True)
    return None, max(abs(a - b) for (_, a), (_, b) in pairs)


def _view(answer: dict[str, Any]) -> list[tuple[str, float]]:
    content = answer["choices"][0]["logprobs"]["content"]
    return [(one["token"], one["logprob"]) for one in content]
