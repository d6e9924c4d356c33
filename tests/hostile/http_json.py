"""Class A: what is not HTTP, not JSON, too large, or for another address."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

from tests.hostile.case import GOOD, Case, Lazy, Outcome, Refusal, asked, refused, served
from tests.hostile.target import Target

TITLE = "HTTP and JSON"

HELLO = json.dumps(asked()).encode()
DEEP = 200_000

NOT_JSON: dict[str, Lazy] = {
    "empty": b"",
    "white space": b" \r\n\t ",
    "truncated": HELLO[:-3],
    "trailing comma": HELLO[:-1] + b",}",
    "two documents": HELLO + HELLO,
    "top-level array": b"[" + HELLO + b"]",
    "top-level string": json.dumps(HELLO.decode()).encode(),
    "top-level null": b"null",
    "top-level number": b"1",
    "single quotes": HELLO.replace(b'"', b"'"),
    "comment": b"/* x */" + HELLO,
    "bad UTF-8": HELLO.replace(b"Hello", b"\xff\xfe"),
    "overlong UTF-8": HELLO.replace(b"Hello", b"\xc0\xaf"),
    "UTF-16 with BOM": HELLO.decode().encode("utf-16"),
    "UTF-32": HELLO.decode().encode("utf-32"),
    "raw control character": HELLO.replace(b"Hello", b"a\x01b"),
    "raw line end in a string": HELLO.replace(b"Hello", b"a\nb"),
    "bad escape": HELLO.replace(b"Hello", rb"\x41"),
    "half an escape": HELLO.replace(b"Hello", rb"\u12"),
    "NaN": HELLO[:-1] + b', "temperature": NaN}',
    "Infinity": HELLO[:-1] + b', "temperature": -Infinity}',
    "a number of 5000 digits": HELLO[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
    "a fraction of a leading zero": HELLO[:-1] + b', "temperature": 01}',
    "deep arrays": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"messages": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "deep and never closed": b'{"messages": ' + b"[" * DEEP,
    "form": b"messages=Hello&max_tokens=1",
    "XML": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>",
}

CODED = {"UTF-16 with BOM", "UTF-32"}
"""JSON of old, which other servers may read."""

KINDS = {
    "none": (),
    "text/plain": ("Content-Type: text/plain",),
    "a form": ("Content-Type: application/x-www-form-urlencoded",),
    "multipart": ("Content-Type: multipart/form-data; boundary=x",),
    "text/json": ("Content-Type: text/json",),
    "nonsense": ("Content-Type: ;;;,",),
}

SMUGGLED = {
    "length and chunks": (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    ),
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a list of lengths": b"Content-Length: 5, 6\r\n\r\nabcdef",
    "signed length": b"Content-Length: +5\r\n\r\nabcde",
    "negative length": b"Content-Length: -5\r\n\r\nabcde",
    "hexadecimal length": b"Content-Length: 0x5\r\n\r\nabcde",
    "space before the colon": b"Content-Length : 5\r\n\r\nabcde",
    "a length beyond 64 bits": b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
    "chunked, identity": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "folded header": b" folded: x\r\n\r\n",
    "header without colon": b"no colon\r\n\r\n",
    "NUL in a name": b"X\x00Y: 1\r\n\r\n",
    "NUL in a value": b"X: a\x00b\r\n\r\n",
    "bare CR in a value": b"X: a\rb\r\n\r\n",
    "chunk size of letters": b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "negative chunk": b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n",
    "chunk longer than told": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n",
    "chunk beyond 64 bits": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n",
}

NOT_HTTP = {
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "garbage": b"GARBAGE\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a broken authority": b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in the path": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "an SSH client": b"SSH-2.0-OpenSSH_9.7\r\n",
}

ROUTES = {
    ("GET", "/v1/nothing"): (404, "not_found"),
    ("POST", "/v1/nothing"): (404, "not_found"),
    ("GET", "/v1/chat/completions/"): (404, "not_found"),
    ("GET", "/..%2f..%2fetc/passwd"): (404, "not_found"),
    ("GET", "/v1/models/none"): (404, "model_not_found"),
    ("GET", "/v1/chat/completions"): (405, "method_not_allowed"),
    ("DELETE", "/v1/chat/completions"): (405, "method_not_allowed"),
    ("PUT", "/v1/models"): (405, "method_not_allowed"),
    ("BREW", "/v1/models"): (400, "malformed_request"),
    ("TRACE", "/v1/models"): (405, "method_not_allowed"),
}

HEADS = {
    "one header of 200 KB": b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    "2,000 headers": b"".join(b"X-%d: %s\r\n" % (n, b"a" * 90) for n in range(2000)) + b"\r\n",
    "a name of 100 KB": b"a" * 100_000,
}


def cases() -> list[Case]:
    """Return the class."""
    return [
        *(
            refused("A", name, body, "invalid_json", ours=name in CODED)
            for name, body in NOT_JSON.items()
        ),
        served("A", "a key given twice: the last holds", HELLO[:-1] + b', "max_tokens": 2}', two),
        served("A", "UTF-8 in escapes", HELLO.replace(b"Hello", rb"\ud83d\ude00")),
        *(kind(name, lines) for name, lines in KINDS.items()),
        kind(
            "gzip body", ("Content-Type: application/json", "Content-Encoding: gzip"), zipped=True
        ),
        # Another server may wait for the body before it looks at its length.
        replace(sent("65 MiB announced", announced, 413, "request_too_large"), ours=True),
        sent("65 MiB in chunks", chunked, 413, "request_too_large"),
        *(wire(name, rest) for name, rest in SMUGGLED.items()),
        *(raw(name, data, 400, "malformed_request") for name, data in NOT_HTTP.items()),
        *(
            wire(f"head: {name}", rest, 431, "request_head_too_large")
            for name, rest in HEADS.items()
        ),
        raw(
            "head: a path of 100 KB",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            431,
            "request_head_too_large",
        ),
        *(route(*words, *wanted) for words, wanted in ROUTES.items()),
        Case("A", "two requests in one packet", pipelined),
    ]


def two(answer: dict[str, object]) -> str | None:
    """Greedy or not, a limit of 2 allows more than the 1 before it."""
    used = answer["usage"]
    assert isinstance(used, dict)
    return None if used["completion_tokens"] == 2 else f"{used['completion_tokens']} tokens"


def kind(name: str, lines: tuple[str, ...], zipped: bool = False) -> Case:
    """A body that is not declared as plain JSON."""

    def run(target: Target) -> Outcome:
        body = gzip.compress(HELLO) if zipped else HELLO
        head = target.head("POST", "/v1/chat/completions", *lines, f"Content-Length: {len(body)}")
        request = head + b"\r\n" + body
        return Refusal(415, ("unsupported_content_type",)).judge(request, target.send(request))

    return Case("A", f"content type: {name}", run, ours=name in ("none", "text/json"))


LARGE = 65 * 1024 * 1024


def announced(target: Target) -> list[bytes]:
    """A length over the cap, and little behind it."""
    lines = ("Content-Type: application/json", f"Content-Length: {LARGE}")
    return [target.head("POST", "/v1/chat/completions", *lines) + b"\r\n" + b" " * 1000]


def chunked(target: Target) -> list[bytes]:
    """A body that grows over the cap."""
    lines = ("Content-Type: application/json", "Transfer-Encoding: chunked")
    piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    head = target.head("POST", "/v1/chat/completions", *lines) + b"\r\n"
    return [head, *[piece] * 65, b"%x\r\n%s\r\n0\r\n\r\n" % (len(HELLO), HELLO)]


def sent(name: str, pieces: object, status: int, code: str) -> Case:
    """Bytes that are refused."""

    def run(target: Target) -> Outcome:
        all_of_them = pieces(target)  # type: ignore[operator]
        return Refusal(status, (code,)).judge(b"", target.send(*all_of_them))

    return Case("A", name, run)


def wire(name: str, rest: bytes, status: int = 400, code: str = "malformed_request") -> Case:
    """A good request's first lines, and what ends them badly."""

    def run(target: Target) -> Outcome:
        head = target.head("POST", "/v1/chat/completions", "Content-Type: application/json")
        return unread(target, head + rest, status, code)

    return Case("A", name, run)


def raw(name: str, data: bytes, status: int, code: str) -> Case:
    """What is no request."""
    return Case("A", name, lambda target: unread(target, data, status, code))


def unread(target: Target, data: bytes, status: int, code: str) -> Outcome:
    """A refusal, or the end of the connection without a word, are both safe."""
    answer = target.send(data)
    if answer.status == 0:
        # A reset may overtake the answer while the client still sends.
        return GOOD if len(data) > 100_000 else Outcome(unlike="closed without a word")
    return Refusal(status, (code,)).judge(data, answer)


def route(method: str, path: str, status: int, code: str) -> Case:
    """A path or a method that is not there."""

    def run(target: Target) -> Outcome:
        request = target.head(method, path, "Content-Length: 0", "Connection: close") + b"\r\n"
        return Refusal(status, (code,)).judge(request, target.send(request))

    # Some redirect to the path without its last stroke.
    return Case("A", f"{method} {path}", run, ours=path.endswith("/"))


def pipelined(target: Target) -> Outcome:
    """Two answers, in their order."""
    first = target.head("GET", "/v1/models") + b"\r\n"
    last = target.head("GET", "/v1/models/none", "Connection: close") + b"\r\n"
    with target.connect() as line:
        line.sendall(first + last)
        found = b""
        while piece := line.recv(65536):
            found += piece
    both = found.startswith(b"HTTP/1.1 200 ") and found.count(b"HTTP/1.1 404 ") == 1
    return GOOD if both else Outcome(f"not two answers: {found[:100]!r}")
