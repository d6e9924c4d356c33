"""Ours beside stock vLLM on large pictures: ``python -m bench.media``.

A 12-megapixel JPEG of about 2.7 MB, as phones take them: sent again in each turn of a
conversation, as every OpenAI client does; the same with ours knowing it by the id of an upload;
never seen before; and no picture at all, which is the engine's own time. ``bench.rounds`` tells how
they are measured; with ``--ours media.fast_decode=true`` ours decodes at a fraction of the size.
Reading a body of 4 MB is compared with Python's ``json`` in this process.
"""

# ruff: noqa: T201 -- a command prints its results
from __future__ import annotations

import base64
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from pydantic_core import from_json

from bench import rounds
from bench.traffic import Case, text
from qwen2vl_serve.media.image import decode
from qwen2vl_serve.vision import PixelBudget, smart_resize

WIDTH, HEIGHT = 4000, 3000
QUALITY = 85  # gives about 2.7 MB
TURNS = 4  # that are measured: the second to the fifth
BODY_BYTES = 4_000_000
ROUNDS = 8


@lru_cache(maxsize=1)
def landscape() -> Image.Image:
    """Structure at every scale and a sensor's noise: it packs like a photo."""
    rng = np.random.default_rng(0)
    total = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells in (4, 16, 64, 256):
        coarse = rng.normal(0, 60 / cells**0.3, (cells * 3, cells * 4, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., c]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    total += rng.normal(0, 4.5, total.shape[:2]).astype(np.float32)[..., None]
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=16)
def photo(number: int) -> str:
    """Return the data URL of a 12-megapixel JPEG; no two numbers share one."""
    picture = landscape().copy()
    mark = Image.new("RGB", (64, 64), tuple((number >> shift) % 256 for shift in (0, 8, 16)))
    picture.paste(mark, (number * 64 % (WIDTH - 64), 100))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _conversation(model: str, picture: int, turns: int) -> dict[str, Any]:
    """The body of the last of ``turns``: the picture in the first, answers in between."""
    shown = [
        {"type": "image_url", "image_url": {"url": photo(picture)}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": shown}]
    for turn in range(2, turns + 1):
        messages.append({"role": "assistant", "content": "The picture shows a landscape."})
        messages.append({"role": "user", "content": f"What else? This is question {turn}."})
    return text(model, 0) | {"messages": messages}


def _again(first: int, model: str, number: int) -> dict[str, Any]:
    return _conversation(model, first + number // TURNS, number % TURNS + 2)


def _first_turn(first: int, model: str, number: int) -> dict[str, Any] | None:
    """Before the second turn the first is sent; the others follow a turn that was measured."""
    opens = number % TURNS == 0
    return _conversation(model, first + number // TURNS, 1) if opens else None


def _fresh(model: str, number: int) -> dict[str, Any]:
    return _conversation(model, 1_000_000 + number, 1)


def _without(model: str, number: int, turns: int | None = None) -> dict[str, Any]:
    """The same texts and no picture: what remains is the engine's own time."""
    body = _conversation(model, 0, turns or number % TURNS + 2)
    body["messages"][0]["content"] = (
        f"{number // TURNS} {body['messages'][0]['content'][1]['text']}"
    )
    return body


def _first_without(model: str, number: int) -> dict[str, Any] | None:
    return _without(model, number, 1) if number % TURNS == 0 else None


CASES = (
    Case(
        "12 MP JPEG again, turns 2 to 5",
        partial(_again, 0),
        before=partial(_first_turn, 0),
        warm_up=TURNS,
        same_answers=False,
    ),
    Case(
        "the same, to ours by file_id",
        partial(_again, 2_000_000),
        before=partial(_first_turn, 2_000_000),
        warm_up=TURNS,
        same_answers=False,
        by_id=True,
    ),
    Case(
        "the same turns without a picture",
        _without,
        before=_first_without,
        warm_up=TURNS,
        same_answers=False,
    ),
    Case("12 MP JPEG, not seen before", _fresh, warm_up=3, same_answers=False),
)


def parse_ratio(size: int = BODY_BYTES, repeats: int = 30) -> float:
    """How many times as long ``json`` takes to read a picture request of ``size`` bytes."""
    data = base64.b64encode(np.random.default_rng(0).bytes(size)).decode()[:size]
    content = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()

    def seconds(read: Callable[[bytes], object]) -> float:
        begun = time.perf_counter()
        read(body)
        return time.perf_counter() - begun

    pairs = [(seconds(json.loads), seconds(from_json)) for _ in range(repeats)]
    return median(theirs / mine for theirs, mine in pairs)


def fast_decode_error() -> float:
    """Mean difference of ``media.fast_decode`` from the exact pixels, in levels of 255."""
    data = base64.b64decode(photo(0).partition(",")[2])
    size = smart_resize(HEIGHT, WIDTH, PixelBudget(56 * 56, 1280 * 28 * 28))
    exact, fast = (decode(data, size, "photo", fast=fast).astype(int) for fast in (False, True))
    return float(np.abs(exact - fast).mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and return 0; 1 when a server failed."""
    status = rounds.run("media", __doc__ or "", CASES, argv, ROUNDS)
    if status == 0:
        print(f"\nreading a body of 4 MB: {parse_ratio():.1f} times as fast as json")
        print(f"fast_decode: {fast_decode_error():.2f} of 255 levels off on average")
    return status


if __name__ == "__main__":
    sys.exit(main())
