"""The cases of a run, one after another; equal seeds give equal cases."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bench.fuzz.bodies import PICTURES, SITE, drawn_bodies
from bench.fuzz.document import drawn_requests
from bench.fuzz.mutation import mutated
from bench.fuzz.seeds import VIDEOS, seeds
from bench.fuzz.site import Script, hostile
from qwen2vl_serve.profile import Overflow

BATCH, DOCUMENT_BATCH = 100, 25
"""How many bodies, and how many requests by the document, are drawn at a time."""

WEIGHTS = {
    "jpeg": 8, "png": 10, "webp": 7, "gif": 5, "bmp": 4, "tiff": 8, "avif": 5, "heic": 4,
    "pdf": 0.3, "mp4": 6, "webm": 3, "mkv": 3, "body": 16, "transport": 5, "upload": 6,
    "files": 2, "fetch": 6, "document": 8, "talk": 6,
}  # fmt: skip
"""Which share of the cases is of which kind; a PDF costs a process of its own."""


@dataclass(frozen=True)
class Case:
    """One request: raw HTTP, in which ``SITE`` stands for the address of the hostile site.

    It is sent in ``pieces`` with ``pause`` seconds in between. At its end a client that is ``half``
    gone sends no more, one that is ``gone`` hears no more either. ``malformed`` HTTP may be refused
    by the HTTP parser, in plain text.
    """

    name: str
    kind: str
    request: bytes
    pieces: int = 1
    pause: float = 0.0
    client: Literal["here", "half", "gone"] = "here"
    malformed: bool = False
    script: Script | None = None


def cases(seed: int) -> Iterator[Case]:
    """Yield cases without end."""
    kinds = [kind for kind in WEIGHTS if kind in {*seeds(), *_MAKERS, "document"}]
    weights = [WEIGHTS[kind] for kind in kinds]
    bodies = _drawn(drawn_bodies, BATCH, seed)
    requests = _drawn(drawn_requests, DOCUMENT_BATCH, seed)
    number = 0
    while True:
        rng = random.Random(f"{seed}-{number}")  # noqa: S311  (not for secrets)
        kind = rng.choices(kinds, weights)[0]
        name = f"{seed}-{number}"
        if kind in ("body", "transport"):
            yield _MAKERS[kind](rng, name, next(bodies))
        elif kind == "document":
            yield Case(name, kind, next(requests))
        elif kind in _MAKERS:
            yield _MAKERS[kind](rng, name, b"")
        else:
            yield _medium(rng, name, kind)
        number += 1


def _drawn(draw: Callable[[int, int], Sequence[bytes]], count: int, seed: int) -> Iterator[bytes]:
    number = seed * 1_000_003
    while True:
        yield from draw(count, number)
        number += 1


def _medium(rng: random.Random, name: str, kind: str) -> Case:
    """A damaged file, as a data URL, an upload, or from a site."""
    data = _damaged(rng, kind)
    way = rng.choice(("data", "data", "data", "data", "explain", "upload", "site"))
    if way == "upload" and kind not in VIDEOS:
        return Case(name, kind, http("POST", "/v1/files", _form(data), _FORM))
    if way == "site":
        script = Script((b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data,))
        return Case(name, kind, _shown(rng, kind, f"{SITE}/{name}/a.{kind}"), script=script)
    mime = "video" if kind in VIDEOS else "application" if kind == "pdf" else "image"
    url = f"data:{mime}/{kind};base64,{base64.b64encode(data).decode()}"
    if kind in ("jpeg", "png", "webp") and rng.random() < 0.05:
        url = f"data:video/jpeg;base64,{url.partition(',')[2]},{url.partition(',')[2]}"
        kind_shown = "mp4"
    else:
        kind_shown = kind
    path = "/v1/chat/completions" + ("/explain" if way == "explain" else "")
    return Case(name, kind, _shown(rng, kind_shown, url, path))


def _damaged(rng: random.Random, kind: str) -> bytes:
    files = seeds()[kind]
    others = files if rng.random() < 0.8 else [one for each in seeds().values() for one in each]
    return mutated(rng, rng.choice(files), others)


def _shown(rng: random.Random, kind: str, url: str, path: str = "/v1/chat/completions") -> bytes:
    part: dict[str, Any]
    if kind in VIDEOS:
        part = {"type": "video_url", "video_url": {"url": url}}
    elif kind == "pdf":
        part = {"type": "file", "file": {"file_data": url}}
    else:
        part = {"type": "image_url", "image_url": {"url": url}}
        if rng.random() < 0.2:
            part["max_pixels"] = rng.choice((1, 3136, 50_000, 10**9))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [part]}]}
    if rng.random() < 0.2:
        body["overflow"] = rng.choice(get_args(Overflow))
    if rng.random() < 0.3:
        body["include_media_info"] = True
    if rng.random() < 0.2:
        body["stream"] = True
    return http("POST", path, json.dumps(body).encode(), "application/json")


def _body(rng: random.Random, name: str, body: bytes) -> Case:
    path = "/v1/chat/completions" + rng.choice(("", "", "/explain"))
    return Case(name, "body", http("POST", path, body, "application/json"))


def _talk(rng: random.Random, name: str, _: bytes) -> Case:
    """A conversation that seldom fits into the window, its turns in any order."""
    messages: list[dict[str, Any]] = []
    for _turn in range(rng.choice((1, 2, 6, 30))):
        role = rng.choice(("user", "user", "assistant", "assistant", "system", "developer"))
        text = "word " * rng.choice((1, 30, 400, 1500, 5000))
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if role == "user" and rng.random() < 0.3:
            picture = {"type": "image_url", "image_url": {"url": rng.choice(PICTURES)}}
            content.insert(rng.randrange(2), picture)
        messages.append({"role": role, "content": rng.choice((text, content))})
    body: dict[str, Any] = {"messages": messages, "overflow": rng.choice(get_args(Overflow))}
    if rng.random() < 0.5:
        body["max_tokens"] = rng.choice((1, 500, 4000))
    if rng.random() < 0.3:
        body["stream"] = True
    path = "/v1/chat/completions" + rng.choice(("", "", "", "/explain"))
    return Case(name, "talk", http("POST", path, json.dumps(body).encode(), "application/json"))


def _transport(rng: random.Random, name: str, body: bytes) -> Case:
    """A body that arrives otherwise than announced."""
    path, kind = "/v1/chat/completions", "application/json"
    request = http("POST", path, body, kind)
    more: dict[str, Any] = {}
    match rng.randrange(9):
        case 0:
            request = http("POST", path, body[: len(body) // 2], kind)
        case 1:
            request = http("POST", path, body, kind, length=str(len(body) + rng.choice((1, 5000))))
            more = {"client": "half"}
        case 2:
            length = rng.choice(("-1", "x", "1, 2", "1e3", "0x10", str(10**30), "9" * 19, ""))
            request = http("POST", path, body, kind, length=length)
            more = {"client": "half", "malformed": True}
        case 3:
            at = rng.randrange(len(body) + 1)
            bad = rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0"))
            request = http("POST", path, body[:at] + bad + body[at:], kind)
        case 4:
            coding = rng.choice(("utf-16", "utf-8-sig", "utf-32"))
            request = http("POST", path, body.decode("utf-8", "replace").encode(coding), kind)
        case 5:
            size = rng.choice((b"%x" % len(body), b"-1", b"zz", b"f" * 20, b"", b"0"))
            end = rng.choice((b"\r\n0\r\n\r\n", b"", b"\r\n"))
            head = _head("POST", path, kind, "Transfer-Encoding: chunked\r\n")
            request = head + size + b"\r\n" + body + end
            more = {"client": "half", "malformed": True}
        case 6:
            odd = rng.choice(("text/plain", "", f"{kind}; charset=utf-7", "é", "a" * 9000))
            request = http("POST", path, body, odd)
            more = {"malformed": True}
        case 7:
            pieces, client = rng.choice((2, 5, 10)), rng.choice(("here", "half"))
            more = {"pieces": pieces, "pause": 0.05, "client": client}
        case _:
            # Gone while the server reads or answers.
            at = rng.choice((len(request), len(request) - 1, rng.randrange(len(request))))
            request, more = request[:at], {"client": "gone"}
    return Case(name, "transport", request, **more)


def _upload(rng: random.Random, name: str, _: bytes) -> Case:
    """A form, whole or mutated, of a file, whole or mutated."""
    kinds = [kind for kind in seeds() if kind != "pdf"]
    kind = rng.choice(kinds)
    data = rng.choice(seeds()[kind]) if rng.random() < 0.5 else _damaged(rng, kind)
    body = _form(data, rng)
    if rng.random() < 0.6:
        body = _damaged_form(rng, body)
    content_type = _FORM
    if rng.random() < 0.15:
        content_type = rng.choice(
            ("multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=x",
             'multipart/form-data; boundary="', "multipart/form-data; boundary=" + "x" * 500,
             "multipart/form-data; boundary=x; charset=utf-99", "MULTIPART/FORM-DATA; BOUNDARY=x")
        )  # fmt: skip
    request = http("POST", "/v1/files", body, content_type)
    if rng.random() < 0.1:
        return Case(name, "upload", request[: rng.randrange(len(request))], client="half")
    return Case(name, "upload", request)


def _damaged_form(rng: random.Random, body: bytes) -> bytes:
    match rng.randrange(6):
        case 0:
            return body.replace(b"\r\n", b"\n", rng.choice((1, -1)))
        case 1:
            return body[: -rng.randrange(1, 20)]
        case 2:
            return body + body
        case 3:
            word = rng.choice((b"--x", b"form-data", b"name", b"purpose", b"filename", b'"', b":"))
            return body.replace(word, rng.choice((b"", b"\0", b"\xff", b"a" * 9000, word * 3)))
        case _:
            return mutated(rng, body, (body,))


_FORM = "multipart/form-data; boundary=x"
_NAMES = (
    b"a.png", b"", b"../../etc/passwd", b"\xff\xfe.png", b"a\0b", b"a" * 5000, b"C:\\x.png",
    b"%0d%0a", b'a"; name="purpose', "猫.png".encode(), b"\xe2\x80\xae.png",
)  # fmt: skip


def _form(data: bytes, rng: random.Random | None = None) -> bytes:
    """Return a form with boundary x; with ``rng`` its names and fields vary."""
    filename, purpose = b"a.png", b"vision"
    more: list[tuple[bytes, bytes]] = []
    if rng is not None:
        filename = rng.choice(_NAMES)
        purpose = rng.choice((b"vision", b"vision", b"user_data", b"", b"fine-tune", b"\xff"))
        if rng.random() < 0.3:
            seconds = rng.choice(
                (b"60", b"0", b"-1", b"9" * 30, b"1e3", "٣".encode(), b"\xff", b"")
            )
            more = [(b"expires_after[anchor]", b"created_at"), (b"expires_after[seconds]", seconds)]
        if rng.random() < 0.1:
            more += [(rng.randbytes(3).hex().encode(), b"v")] * rng.choice((1, 20))
    fields = [(b"purpose", purpose), *more]
    parts = [b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % field for field in fields]
    head = b'Content-Disposition: form-data; name="file"; filename="%s"\r\n' % filename
    parts.append(head + b"Content-Type: image/png\r\n\r\n" + data)
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"


def _files(rng: random.Random, name: str, _: bytes) -> Case:
    """The other routes of uploads."""
    query = rng.choice(
        ("", "?limit=0", "?limit=99999999999999999999", "?limit=%D9%A3", "?order=up", "?after=x",
         "?purpose=%00", "?limit=2&limit=x", "?%ff=%ff", "/file-" + "0" * 64, "/%2e%2e", "/%00",
         "/" + "a" * 3000, "/file-x%2f..", "//", "/..%2f..", "/%ff")
    )  # fmt: skip
    method = rng.choice(("GET", "GET", "DELETE", "PUT", "HEAD", "OPTIONS"))
    return Case(
        name, "files", http(method, f"/v1/files{query}", b"", ""), malformed=method == "HEAD"
    )


def _fetch(rng: random.Random, name: str, _: bytes) -> Case:
    """A good picture or video at a site that does not keep to HTTP."""
    kind = rng.choice(("png", "jpeg", "mp4"))
    url = f"{SITE}/{name}/a.{kind}"
    script = hostile(rng, rng.choice(seeds()[kind]), f"/{name}/a.{kind}")
    return Case(name, "fetch", _shown(rng, kind, url), script=script)


def http(
    method: str, path: str, body: bytes, content_type: str, *, length: str | None = None
) -> bytes:
    """Return a raw request that ends its connection."""
    line = f"Content-Length: {len(body) if length is None else length}\r\n"
    return _head(method, path, content_type, line) + body


def _head(method: str, path: str, content_type: str, more: str) -> bytes:
    lines = f"Host: 127.0.0.1\r\nConnection: close\r\nContent-Type: {content_type}\r\n{more}"
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


_MAKERS: dict[str, Any] = {
    "body": _body,
    "transport": _transport,
    "upload": _upload,
    "files": _files,
    "fetch": _fetch,
    "talk": _talk,
}


def to_json(case: Case) -> str:
    """Return a case as a file keeps it."""
    script = case.script
    kept: dict[str, Any] = {**case.__dict__, "request": _packed(case.request)}
    if script is not None:
        kept["script"] = {**script.__dict__, "pieces": [_packed(one) for one in script.pieces]}
    return json.dumps(kept, indent=1)


def from_json(text: str) -> Case:
    """Return what ``to_json`` kept."""
    kept = json.loads(text)
    if (script := kept["script"]) is not None:
        pieces = tuple(base64.b64decode(one) for one in script["pieces"])
        kept["script"] = Script(**{**script, "pieces": pieces})
    return Case(**{**kept, "request": base64.b64decode(kept["request"])})


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def only(kinds: Sequence[str], seed: int) -> Iterator[Case]:
    """Yield the cases of some kinds."""
    return (case for case in cases(seed) if case.kind in kinds)
