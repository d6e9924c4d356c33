"""Class D: addresses of pictures that lead where no client may send a server."""

from __future__ import annotations

from tests.hostile.case import Case, Outcome, Refusal, image, shown
from tests.hostile.sites import http
from tests.hostile.target import Target

TITLE = "addresses"

LOOPBACK = [
    "http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://2130706433:{port}/",
    "http://0x7f000001:{port}/", "http://0x7f.0.0.1:{port}/", "http://0177.0.0.1:{port}/",
    "http://0.0.0.0:{port}/", "http://0:{port}/", "http://[::1]:{port}/", "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/", "http://[2002:7f00:1::]:{port}/",
    "http://[::127.0.0.1]:{port}/", "http://localhost:{port}/", "http://localhost.:{port}/",
    "http://LOCALHOST:{port}/", "http://127.0.0.1.:{port}/", "http://①②⑦.⓪.⓪.①:{port}/",
    "http://１２７.０.０.１:{port}/", "http://127。0。0。1:{port}/", "http://user@127.0.0.1:{port}/",
    "http://example.org@127.0.0.1:{port}/", "http://example.org\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/", "http://127.0.0.1:{port}\\.example.org/",
    "ftp://127.0.0.1:{port}/x", "gopher://127.0.0.1:{port}/", "//127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\r\nX: y", "http://127.0.0.1\r\n:{port}/",
    "http://127.0.0.1:{port}/\u0000", " http://127.0.0.1:{port}/", "http://%31%32%37.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/", "blob:http://127.0.0.1:{port}/", "http://[127.0.0.1]:{port}/",
    "http://127.0.0.1:{port}#@example.org/", "http://127.0.0.1:{port}?@example.org/",
]  # fmt: skip

NOWHERE = [
    "file:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", "javascript:alert(1)",
    "/etc/passwd", "http://", "http:///x", "http://" + "a" * 9000, "http://[::1", "http://1.2.3.4:x/",
    "http://1.2.3.4:99999/", "not an address", "upload:../../etc/passwd", "about:blank",
]  # fmt: skip

BEYOND = [
    "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/", "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/", "http://172.16.0.1/", "http://192.168.1.1/", "http://100.64.0.1/",
    "http://[fd00::1]/", "http://[fe80::1]/", "http://[fe80::1%25lo]/", "http://224.0.0.1/",
    "http://255.255.255.255/", "http://192.0.2.1/", "http://240.0.0.1/", "http://93.184.216.34:22/",
    "http://93.184.216.34:0/", "http://127.0.0.1:{port}@example.org/",
]  # fmt: skip
"""They lead away from this machine: no server is sent there that goes to loopback when told to."""

CODES = ("invalid_image_url", "file_not_found")

HOPS = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/",
    "//127.0.0.1:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://user@127.0.0.1:{port}/",
    "file:///etc/passwd", "ftp://127.0.0.1:{port}/", "\\\\127.0.0.1:{port}/", "",
]  # fmt: skip

LOOP = "http://127.0.0.2:{port}/loop"


def cases() -> list[Case]:
    """Return the class."""
    return [
        *(Case("D", _named(url), _sent_to(url)) for url in LOOPBACK),
        *(Case("D", _named(url), _sent_to(url)) for url in NOWHERE),
        *(Case("D", _named(url), _sent_to(url, beyond=True), ours=True) for url in BEYOND),
        *(
            Case("D", f"redirect to {_named(url)}", _redirected(url), needs="fetching")
            for url in HOPS
        ),
        Case("D", "a redirect in a circle", _redirected(LOOP), needs="fetching"),
    ]


def _named(url: str) -> str:
    return url[:50].encode("unicode_escape").decode() or "nothing"


def _sent_to(url: str, beyond: bool = False) -> object:
    def run(target: Target) -> Outcome:
        if beyond and target.unguarded:
            return Outcome("not sent: this server goes to loopback, it would go there too")
        return _without_a_packet(target, url.replace("{port}", str(target.sites.port)))

    return run


def _redirected(to: str) -> object:
    def run(target: Target) -> Outcome:
        place = to.replace("{port}", str(target.sites.port))
        url = target.sites.put("loop", http("302 Found", Location=place))
        return _without_a_packet(target, url)

    return run


def _without_a_packet(target: Target, url: str) -> Outcome:
    inner = target.sites.inner
    before = inner.connections
    answer, request = target.chat(shown(image(url)))
    if packets := inner.connections - before:
        target.unguarded = True
        return Outcome(f"{packets} connections to 127.0.0.1, {answer.told}")
    return Refusal(404 if url.startswith("upload:") else 400, CODES).judge(request, answer)
