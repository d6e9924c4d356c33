"""Two sites of the runner's own, one that no server may reach and one that may be allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.fuzz.site import Script, Site, site

INNER, OPEN = "127.0.0.1", "127.0.0.2"


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    """Return an answer; ``Content_Type`` is a header."""
    head = {"Content-Length": str(len(body)), "Connection": "close"}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


@dataclass(frozen=True)
class Sites:
    """``inner`` on 127.0.0.1 and ``open`` on 127.0.0.2, at one port."""

    inner: Site
    open: Site

    @property
    def port(self) -> int:
        return self.inner.port

    def settings(self) -> tuple[str, ...]:
        """Return what a profile says to let a server fetch from 127.0.0.2 and .3 alone."""
        return (
            f"media.allowed_ports=[80, 443, {self.port}]",
            f"media.allowed_networks=[{OPEN}/31]",
        )

    def put(self, name: str, *pieces: bytes, pause: float = 0.0, ending: str = "close") -> str:
        """Have the open site answer with this; return the address."""
        self.open.scripts[name] = Script(pieces, pause, ending=ending)
        return f"http://{OPEN}:{self.port}/{name}"


@contextmanager
def sites(port: int = 0) -> Iterator[Sites]:
    """Run both."""
    from tests.hostile.pictures import png

    with site(INNER, port) as inner, site(OPEN, inner.port) as outer:
        # Whoever gets in is rewarded, so that it shows.
        inner.otherwise = Script((http("200 OK", png(), Content_Type="image/png"),))
        yield Sites(inner, outer)
