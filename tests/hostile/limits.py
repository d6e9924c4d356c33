"""Class G: each thing small enough, all together too much."""

from __future__ import annotations

import re
from typing import Any

from tests.hostile import pictures
from tests.hostile.case import Case, Outcome, asked, image, refused, served, shown
from tests.hostile.pictures import inline, png
from tests.hostile.target import Target
from tests.media.movies import data_url as movie_url
from tests.media.movies import movie

TITLE = "limits"

MANY, WINDOW = "too_many_items", "context_length_exceeded"


def picture(colour: str = "red") -> dict[str, Any]:
    """Return a small good picture as a part."""
    return image(inline(png(colour=colour)))


def film(frames: int = 8) -> dict[str, Any]:
    """Return a small good video as a part."""
    return {"type": "video_url", "video_url": {"url": movie_url(movie(frames, (64, 48)))}}


def turns() -> dict[str, Any]:
    """Return five pictures over three turns."""
    two = {"role": "user", "content": [picture(), picture("blue")]}
    said = {"role": "assistant", "content": "y"}
    last = {"role": "user", "content": [picture("lime")]}
    return {"messages": [two, said, two, said, last], "max_tokens": 1}


def long_text(words: int, **fields: Any) -> dict[str, Any]:
    """Return a request of so many words."""
    return asked("word " * words, **fields)


def cases() -> list[Case]:
    """Return the class."""
    return [
        refused(
            "G",
            "5 pictures of 4",
            lambda: shown(*[picture()] * 5),
            MANY,
            words=("5 images", "at most 4"),
        ),
        refused(
            "G", "100 pictures", lambda: shown(*[picture()] * 100), MANY, words=("100 images",)
        ),
        refused("G", "5 pictures over the turns", turns, MANY, words=("5 images",)),
        refused("G", "2 videos of 1", lambda: shown(film(), film()), MANY, words=("2 videos",)),
        refused(
            "G",
            "pictures and videos mixed",
            lambda: shown(picture(), film(), picture(), film()),
            MANY,
            words=("2 videos",),
        ),
        refused("G", "a text beyond the window", lambda: long_text(6000), WINDOW, words=("4096",)),
        refused(
            "G",
            "text and max_tokens together",
            lambda: long_text(4000, max_tokens=100),
            WINDOW,
            words=("4096",),
            ours=True,
        ),
        refused(
            "G",
            "max_tokens beyond the window",
            asked(max_tokens=5000),
            WINDOW,
            words=("4096",),
            ours=True,
        ),
        refused("G", "max_tokens of 10^9", asked(max_tokens=10**9), WINDOW, ours=True),
        refused(
            "G",
            "pictures and max_tokens together",
            lambda: shown(*[picture()] * 4, max_tokens=4000),
            WINDOW,
            words=("4096", "content[0]", "content[3]"),
            ours=True,
        ),
        Case("G", "the max_pixels that is told fits", told_and_taken, ours=True),
        refused(
            "G",
            "all bytes together",
            lambda: shown(*(image(inline(large(n))) for n in range(4))),
            "media_too_large",
            needs="limits",
            ours=True,
            words=("limits.max_media_bytes",),
        ),
        refused(
            "G",
            "all pixels together",
            lambda: shown(*(image(inline(wide(n))) for n in range(4))),
            "media_too_large",
            needs="limits",
            ours=True,
            words=("limits.max_media_pixels",),
        ),
        refused(
            "G",
            "all frames together",
            lambda: shown({**film(40), "nframes": 40, "max_frames": 64}),
            "media_too_large",
            "invalid_value",
            needs="limits",
            ours=True,
        ),
        refused("G", "n of 100,000", asked(n=100_000, temperature=1.0), "invalid_value", param="n"),
        served("G", "4 pictures of 4", lambda: shown(*[picture()] * 4)),
        served("G", "a picture and a video", lambda: shown(picture(), film())),
    ]


def large(number: int) -> bytes:
    """Return a picture of some 180 KB."""
    return pictures.saved(pictures.noise((300, 200 + number)), "PNG")


def wide(number: int) -> bytes:
    """Return a picture of a megapixel and few bytes."""
    return png((1000, 1000 + number))


def told_and_taken(target: Target) -> Outcome:
    """What the refusal advises is served."""
    part = image(inline(png((600, 600))), max_pixels=401_408)
    body = shown(part, part, max_tokens=4096 - 140)
    answer, _ = target.chat(body)
    found = re.search(rb"max_pixels (\d+)", answer.body)
    if answer.status != 400 or found is None:
        return Outcome(f"{answer.told}: {answer.body[:300]!r}")
    part["max_pixels"] = int(found[1])
    again, _ = target.chat(body | {"max_tokens": 4096 - 140})
    return Outcome(None if again.status == 200 else f"{again.told}: {again.body[:300]!r}")
