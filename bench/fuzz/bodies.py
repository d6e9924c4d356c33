"""Request bodies in the dialects that clients speak, with whatever can be wrong in them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, get_args

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from bench.fuzz.drawn import drawn
from bench.fuzz.seeds import VIDEOS, seeds
from qwen2vl_serve.profile import Overflow
from qwen2vl_serve.protocol.chat import UNSUPPORTED, ChatRequest

SITE = "http://127.0.0.1:00000"
"""Stands for the hostile site, whose port is known when the request is sent."""


class Raw(str):
    """A piece of JSON that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object that may have a key twice."""


def written(value: Any, *, ascii_only: bool = True) -> str:
    """Return JSON of ``value``, in which ``Raw`` and ``Pairs`` may stand; deep values by a loop."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        inner = (f"{json.dumps(k)}:{written(v, ascii_only=ascii_only)}" for k, v in value)
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(one, ascii_only=ascii_only) for one in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def _url(kind: str, data: bytes) -> str:
    head = "video" if kind in VIDEOS else "application" if kind == "pdf" else "image"
    return f"data:{head}/{kind};base64," + base64.b64encode(data).decode()


PICTURES = tuple(_url("png", data) for data in seeds()["png"][:5])
MOVIES = tuple(_url("mp4", data) for data in seeds()["mp4"][:2])

RAW = st.sampled_from(
    [
        "NaN", "-Infinity", "1e999", "-1e999", "9" * 5000, "-0", "1E400", "0.1e-999", "01", "+1",
        "1.", "0x10", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x"', "'a'", "nul", "[1,]",
        "[" * 300 + "]" * 300, "[" * 50_000, '{"a":' * 200 + "1" + "}" * 200, "undefined", "{,}",
    ]
).map(Raw)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 5000),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**40, -1, 0]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "\x00", "\ud800", "\u202eabc", "👩‍👩‍👧", "a" * 5000, "<|im_start|>", "<|image_pad|>",
         "<|im_", "end|>", "../../etc", "%00", "{{7*7}}", "'\"\\", "\ufeff", "1", "true",
         "null", "high", "user"]
    ),
)  # fmt: skip
JUNK: SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    RAW,
    st.recursive(
        st.one_of(st.none(), NUMBERS, TEXTS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)

URLS = st.one_of(
    st.sampled_from(PICTURES),
    st.sampled_from(
        [
            "http://127.0.0.1:1/", "http://[::1]/", "http://2130706433/", "http://0x7f.1/",
            "http://169.254.169.254/latest/", "http://[64:ff9b::7f00:1]/", "http://a@b/", "http://",
            "http://localhost./", "http:\\\\127.0.0.1", "http://[", "http://a:99999/", "http://%/",
            "http://a/\r\nX: y", "//a/b", "file:///etc/passwd", "ftp://a/b", "upload:x",
            "upload:file-" + "0" * 64, "file-" + "0" * 64, "data:", "data:,", "data:;base64,",
            "data:image/png;base64,", "data:image/png;base64,====", "data:image/png;base64,AA=A",
            "data:image/png;base64,-_-_", "data:image/png,%89PNG", "DATA:IMAGE/PNG;BASE64,AAAA",
            "data:image/svg+xml;base64,PHN2Zz4=", "data:video/jpeg;base64," + "AA==," * 9,
            "data:video/jpeg;base64," + "," * 5000, "http://xn--/", "http://" + "a" * 300 + "/",
            "http://ａ.example/", "http://1。1。1。1/", "javascript:1", "http://0/", "\x00",
            f"{SITE}/missing", f"{SITE}//..//", f"{SITE}/%00",
        ]
    ),
    st.sampled_from(PICTURES).flatmap(
        lambda url: st.integers(0, len(url)).map(lambda at: url[:at] + "\n" + url[at:])
    ),
    TEXTS,
)  # fmt: skip
FILE_IDS = st.one_of(st.just("file-" + "0" * 64), TEXTS)


def _mostly(usual: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """What a field is for, and now and then something else."""
    # Hypothesis prefers the ends of a range, so the odd one lies within.
    return st.integers(0, 12).flatmap(lambda n: JUNK if n == 5 else usual)


_PIXELS = st.one_of(st.integers(1, 2_000_000), NUMBERS)
PICTURE_FIELDS = {
    "min_pixels": _mostly(_PIXELS),
    "max_pixels": _mostly(_PIXELS),
    "resized_height": _mostly(st.one_of(st.integers(1, 900), NUMBERS)),
    "resized_width": _mostly(st.one_of(st.integers(1, 900), NUMBERS)),
    "pages": _mostly(st.sampled_from(["1", "1-3", "4-", "0", "3-1", "99999", "1-99999", "-"])),
    "detail": _mostly(st.sampled_from(["auto", "low", "high", "original"])),
    "uuid": JUNK,
    "content_hash": JUNK,
    "cache_control": JUNK,
}
VIDEO_FIELDS = {
    "fps": _mostly(st.one_of(st.floats(0.01, 60), NUMBERS)),
    "nframes": _mostly(st.one_of(st.integers(2, 64), NUMBERS)),
    "min_frames": _mostly(st.one_of(st.integers(1, 64), NUMBERS)),
    "max_frames": _mostly(st.one_of(st.integers(2, 64), NUMBERS)),
    "total_pixels": _mostly(_PIXELS),
    **{k: v for k, v in PICTURE_FIELDS.items() if k not in ("pages", "detail")},
}


def _some(fields: dict[str, SearchStrategy[Any]], most: int = 2) -> SearchStrategy[dict[str, Any]]:
    """Return an object with a few of the fields."""
    if not fields:
        return st.just({})
    names = st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({k: fields[k] for k in chosen}))


def _part(
    kind: str, key: str, value: SearchStrategy[Any], beside: dict[str, SearchStrategy[Any]]
) -> SearchStrategy[Any]:
    whole = st.fixed_dictionaries({"type": st.just(kind), key: _mostly(value)})
    return st.tuples(whole, _some(beside)).map(lambda both: {**both[0], **both[1]})


def _inside(
    key: str, value: SearchStrategy[Any], fields: dict[str, SearchStrategy[Any]]
) -> SearchStrategy[Any]:
    inner = st.fixed_dictionaries({key: _mostly(value)})
    return st.tuples(inner, _some(fields)).map(lambda both: {**both[0], **both[1]})


_FILES = st.one_of(
    _inside("file_id", FILE_IDS, {"filename": JUNK, "file_data": URLS}),
    _inside("file_data", URLS, {"filename": JUNK}),
)
PARTS = st.one_of(
    _part("text", "text", TEXTS, {"x": JUNK}),
    _part("image_url", "image_url", _inside("url", URLS, PICTURE_FIELDS), PICTURE_FIELDS),
    _part("image_url", "image_url", _inside("file_id", FILE_IDS, PICTURE_FIELDS), PICTURE_FIELDS),
    _part("input_image", "image_url", URLS, {**PICTURE_FIELDS, "file_id": FILE_IDS}),
    _part("file", "file", _FILES, PICTURE_FIELDS),
    _part(
        "video_url",
        "video_url",
        _inside("url", st.one_of(st.sampled_from(MOVIES), URLS), VIDEO_FIELDS),
        VIDEO_FIELDS,
    ),
    _part("video", "video", st.one_of(st.lists(URLS, max_size=6), URLS), VIDEO_FIELDS),
    _part("image_embeds", "image_embeds", JUNK, {}),
    _part("input_audio", "input_audio", JUNK, {}),
    JUNK,
)
_CONTENT = st.one_of(TEXTS, st.lists(PARTS, max_size=4))
MESSAGES = st.tuples(
    st.fixed_dictionaries(
        {
            "role": _mostly(
                st.sampled_from(
                    ["user", "user", "user", "system", "assistant", "developer", "tool"]
                )
            ),
            "content": _mostly(_CONTENT),
        }
    ),
    _some({"name": JUNK, "tool_calls": JUNK, "refusal": JUNK, "tool_call_id": JUNK}, 1),
).map(lambda both: {**both[0], **both[1]})

_FIELDS: dict[str, SearchStrategy[Any]] = {
    **dict.fromkeys([*ChatRequest.model_fields, *UNSUPPORTED], JUNK),
    "model": _mostly(st.just("demo")),
    "stream": _mostly(st.booleans()),
    "max_tokens": _mostly(NUMBERS),
    "temperature": _mostly(st.floats()),
    "stop": _mostly(st.lists(TEXTS, max_size=6)),
    "logit_bias": _mostly(st.dictionaries(TEXTS, NUMBERS, max_size=3)),
    "include_media_info": _mostly(st.booleans()),
    "overflow": _mostly(st.sampled_from(get_args(Overflow))),
    "vl_high_resolution_images": _mostly(st.booleans()),
    "mm_processor_kwargs": _mostly(_some(VIDEO_FIELDS, 3)),
    "response_format": _mostly(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "json_schema"]), "json_schema": JUNK}
        )
    ),
    "extra": JUNK,
}
del _FIELDS["messages"]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw a body: an object with messages, a few more fields, now and then a key twice."""
    messages = draw(_mostly(st.lists(MESSAGES, min_size=1, max_size=3)))
    pairs = Pairs([("messages", messages)])
    pairs.extend(draw(_some(_FIELDS, 3)).items())
    if draw(st.integers(0, 15)) == 5:
        pairs.append((draw(st.sampled_from([name for name, _ in pairs])), draw(JUNK)))
    whole = draw(JUNK) if draw(st.integers(0, 60)) == 37 else pairs
    text = written(whole, ascii_only=draw(st.booleans()))
    return text.encode("utf-8", "surrogatepass")


def drawn_bodies(count: int, number: int) -> Sequence[bytes]:
    """Return about ``count`` bodies; equal numbers give equal bodies."""
    return drawn(bodies(), count, number)
