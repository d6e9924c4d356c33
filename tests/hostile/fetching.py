"""Class E: sites that answer with something else than a picture, too much, slowly or never."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import tempfile
import threading
from pathlib import Path

from bench.fuzz.site import Script
from tests.hostile.case import Case, Outcome, Refusal, image, shown
from tests.hostile.pictures import png
from tests.hostile.sites import OPEN, http
from tests.hostile.target import Target
from tests.launch.test_serve import self_signed

TITLE = "fetching"

LARGE = 40 * 1024 * 1024
URL, BYTES, LATE = "invalid_image_url", "invalid_image", "image_download_timeout"


def answers() -> dict[str, tuple[str, Script]]:
    """Return what sites say, with the code of the error."""
    picture = png()
    length = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    bomb = gzip.compress(b"\0" * 50_000_000)
    return {
        "404": (URL, Script((http("404 Not Found", b"no"),))),
        "403": (URL, Script((http("403 Forbidden", b"no"),))),
        "500": (URL, Script((http("500 Internal Server Error", b"no"),))),
        "204": (URL, Script((b"HTTP/1.1 204 No Content\r\n\r\n",))),
        "a page": (BYTES, Script((http("200 OK", b"<html>x</html>", Content_Type="text/html"),))),
        "nothing": (BYTES, Script((http("200 OK", Content_Type="image/png"),))),
        "a gzip bomb": (URL, Script((http("200 OK", bomb, Content_Encoding="gzip"),))),
        "an unknown encoding": (URL, Script((http("200 OK", picture, Content_Encoding="br"),))),
        "half of what was told": (URL, Script((length % (2 * len(picture)) + picture,))),
        "a negative length": (URL, Script((length % -1 + picture,))),
        "40 MiB": (URL, Script((length % LARGE + b"x" * LARGE,))),
        "100 GB told": (URL, Script((length % 10**11 + b"x",))),
        "40 MiB without a length": (URL, Script((b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * LARGE,))),
        "chunks that end early": (URL, Script((chunks + b"ffff\r\n" + b"x" * 9999,))),
        "chunks of letters": (URL, Script((chunks + b"zz\r\nx\r\n",))),
        "a header of 100 KB": (URL, Script((http("200 OK", b"", X="y" * 100_000),))),
        "noise": (URL, Script((b"\x16\x03\x01\x02\x00\x01" * 9,))),
        "nothing at all": (URL, Script(())),
        "a reset": (URL, Script((length % 999 + b"x",), ending="reset")),
        "silence": (LATE, Script((), ending="hang")),
        "a head and silence": (LATE, Script((b"HTTP/1.1 200 OK\r\n",), ending="hang")),
        "a drip": (LATE, Script((length % 999, b"x"), pause=0.2, endless=True)),
        "an endless head": (LATE, Script((b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), 0.2, True)),
    }


ALSO = {
    "an endless head": (URL,),
    # As soon as all media of a request are too much the site is left.
    "40 MiB without a length": ("media_too_large",),
}

NAMES = tuple(answers())


def cases() -> list[Case]:
    """Return the class."""
    return [
        Case("E", "a picture", _good, needs="fetching"),
        *(Case("E", name, _answered(name), needs="fetching") for name in NAMES),
        Case("E", "a certificate of nobody", _untrusted, needs="fetching"),
        Case("E", "no oracle: refused reads as blocked and as missing", _alike, needs="fetching"),
    ]


def _good(target: Target) -> Outcome:
    return fetches(target)


def fetches(target: Target) -> Outcome:
    """Return what is wrong with the answer about a good picture of the open site."""
    url = target.sites.put("good", http("200 OK", png(), Content_Type="image/png"))
    answer, _ = target.chat(shown(image(url)))
    return Outcome(None if answer.status == 200 else f"{answer.told}: {answer.body[:200]!r}")


def _answered(name: str) -> object:
    def run(target: Target) -> Outcome:
        code, script = answers()[name]
        url = target.sites.put("bad")
        target.sites.open.scripts["bad"] = script
        answer, request = target.chat(shown(image(url)))
        codes = (code, *ALSO.get(name, ()))
        return Refusal(codes=codes).judge(request, answer)

    return run


def _untrusted(target: Target) -> Outcome:
    """The port is the site's own, so that the server may use it: TLS is spoken there for once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(*self_signed(Path(folder)))
    tried = threading.Event()
    host = OPEN.replace("127.0.0.2", "127.0.0.3")

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as raw:
            tried.set()
            try:
                with context.wrap_socket(raw, server_side=True) as line:
                    line.recv(4096)
                    line.sendall(http("200 OK", png(), Content_Type="image/png"))
            except OSError:
                pass

    with socket.create_server((host, target.sites.port)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        reply, request = target.chat(shown(image(f"https://{host}:{target.sites.port}/")))
    if not tried.is_set():
        return Outcome(unlike="the server did not even try")
    return Refusal(codes=(URL,)).judge(request, reply)


def _alike(target: Target) -> Outcome:
    """To the letter, so that nobody can scan a network by it."""
    port = target.sites.port
    texts = set()
    for url in (
        f"http://127.0.0.3:{port}/",  # nobody listens
        f"http://127.0.0.1:{port}/",  # not allowed
        f"http://127.0.0.2:{port}/missing",
        f"http://no-such-name.invalid:{port}/",
        f"http://127.0.0.2:{port + 1 if port < 65535 else port - 1}/",
    ):
        answer, request = target.chat(shown(image(url)))
        outcome = Refusal(codes=(URL,)).judge(request, answer)
        if outcome.unsafe:
            return outcome
        error = json.loads(answer.body)["error"]
        texts.add(error["message"])
    return Outcome(None if len(texts) == 1 else f"{len(texts)} texts tell them apart")
