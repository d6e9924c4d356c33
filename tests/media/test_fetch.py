"""Fetching over real sockets: what is followed, cut, refused, and never connected to."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchPolicy, FetchTimeout

LOOPBACK = ("127.0.0.0/8",)


@dataclass
class Site:
    """A scripted site on loopback: path → raw answer or a function that writes one."""

    port: int
    answers: dict[str, Any] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    connections: int = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    head = {"Content-Length": str(len(body)), "Connection": "close"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            scripted.connections += 1
            head = b""
            while b"\r\n\r\n" not in head:
                piece = self.request.recv(4096)
                if not piece:
                    return
                head += piece
            scripted.heads.append(head.decode())
            answer = scripted.answers.get(head.split()[1].decode(), http("404 Not Found"))
            if callable(answer):
                answer(self.request)
            else:
                self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A fetcher that hangs up is what several tests are about."""

    with Server(("127.0.0.1", 0), Handler) as server:
        scripted = Site(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield scripted
        server.shutdown()


async def freely(size: int) -> None:
    """Let every byte be held."""


def fetch(site: Site, url: str, resolver: AbstractResolver | None = None, **policy: Any) -> bytes:
    async def run() -> bytes:
        settings = {"allowed_networks": LOOPBACK, "ports": frozenset({site.port}), **policy}
        fetcher = Fetcher(FetchPolicy(**settings), resolver)
        try:
            return await fetcher.fetch(url, freely)
        finally:
            await fetcher.close()

    return asyncio.run(run())


class Names(AbstractResolver):
    """Resolves each name to the next of its addresses, as a rebinding attacker's server does."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        known = self.addresses[host.split(".", maxsplit=1)[0]]
        address = known.pop(0) if len(known) > 1 else known[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
        ]

    async def close(self) -> None:
        """Nothing is held."""


def test_a_body_comes_back_as_it_was_sent(site: Site) -> None:
    """Bytes unchanged; no cookie, no compression asked for, the Host of the URL."""
    site.answers["/a"] = http("200 OK", b"\x89PNG bytes", Set_Cookie="a=b")
    assert fetch(site, site.url("/a")) == b"\x89PNG bytes"
    head = site.heads[0].lower()
    assert f"host: 127.0.0.1:{site.port}" in head
    assert "accept-encoding: identity" in head
    assert "cookie" not in head


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "localhost",
        "localhost.",
        "①②⑦.⓪.⓪.①",
        "127.0.0.1.",
        "[::ffff:127.0.0.1]",
    ],
)
def test_loopback_in_any_spelling_is_never_connected_to(site: Site, host: str) -> None:
    """A listener on loopback sees no connection at all."""
    site.answers["/"] = http("200 OK", b"secret")
    with pytest.raises(FetchError):
        fetch(site, site.url("/", host), allowed_networks=())
    assert site.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1/",
        "//127.0.0.1/",
        "127.0.0.1/x",
        "http://",
        "http:///x",
        "http://user@127.0.0.1:{port}/",
        "http://user:pass@127.0.0.1:{port}/",
        "http://127.0.0.1:{port}\\@example.org/",
        "http://127.0.0.1:{port}/\r\nX: y",
        "http://127.0.0.1:{port}/a b",
        "http://[::1%25lo]:{port}/",
        "http://127.0.0.1:22/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:{port}/" + "a" * 9000,
    ],
)
def test_an_unusable_url_is_refused_before_any_connection(site: Site, url: str) -> None:
    """Other schemes, credentials, control characters and other ports never reach a socket."""
    with pytest.raises(FetchError):
        fetch(site, url.replace("{port}", str(site.port)))
    assert site.connections == 0


def test_a_name_is_connected_where_it_was_judged(site: Site) -> None:
    """A name that first resolves to a public and then to an inner address gains nothing.

    The first answer (TEST-NET, not admitted here) is the one that counts; loopback, the second,
    is neither asked for nor connected to.
    """
    names = Names(evil=["192.0.2.1", "127.0.0.1"])
    with pytest.raises(FetchError):
        fetch(site, site.url("/", "evil.test"), names, allowed_networks=())
    assert names.asked == ["evil.test"]
    assert site.connections == 0


class Several(AbstractResolver):
    """Resolves every name to all of its addresses, in their order."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.addresses
        ]

    async def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize(
    "inner", ["10.0.0.1", "169.254.169.254", "::1", "fd00::1", "64:ff9b:1::a00:1", "0.0.0.0"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_name_with_one_inner_address_among_its_own_is_refused(
    site: Site, inner: str, first: bool
) -> None:
    """Not even the admitted one is connected to, whichever comes first in the answer."""
    site.answers["/"] = http("200 OK", b"x")
    addresses = [inner, "127.0.0.1"] if first else ["127.0.0.1", inner]
    with pytest.raises(FetchError) as caught:
        fetch(site, site.url("/", "mixed.test"), Several(*addresses))
    assert not isinstance(caught.value, FetchTimeout)
    assert site.connections == 0


def test_a_name_with_several_admitted_addresses_is_fetched_from_one_that_answers(
    site: Site,
) -> None:
    """Nobody listens on the first; several of them are no reason to refuse."""
    site.answers["/"] = http("200 OK", b"x")
    assert fetch(site, site.url("/", "site.test"), Several("127.0.0.2", "127.0.0.1")) == b"x"


def test_a_name_of_the_system_is_resolved_and_judged(site: Site) -> None:
    """Without a resolver of the tests' own, and again after the fetcher was closed."""
    site.answers["/"] = http("200 OK", b"x")
    both = (*LOOPBACK, "::1/128")

    async def run() -> list[bytes]:
        fetcher = Fetcher(FetchPolicy(allowed_networks=both, ports=frozenset({site.port})))
        bodies = []
        for _ in range(2):
            bodies.append(await fetcher.fetch(site.url("/", "localhost"), freely))
            await fetcher.close()
        return bodies

    assert asyncio.run(run()) == [b"x", b"x"]


def test_a_name_with_an_admitted_address_is_fetched_under_its_own_host(site: Site) -> None:
    """The connection goes to the resolved address, the Host header stays the name."""
    site.answers["/"] = http("200 OK", b"x")
    assert fetch(site, site.url("/", "site.test"), Names(site=["127.0.0.1"])) == b"x"
    assert f"host: site.test:{site.port}" in site.heads[0].lower()


def test_redirects_are_followed_and_judged_one_by_one(site: Site) -> None:
    """Relative and absolute hops work; a hop to an inner name is refused unconnected."""
    names = Names(site=["127.0.0.1"], inner=["10.0.0.1"])
    site.answers |= {
        "/one": http("302 Found", Location="/two"),
        "/two": http("307 Temporary Redirect", Location=site.url("/end", "site.test")),
        "/end": http("200 OK", b"end"),
        "/inward": http("302 Found", Location=site.url("/", "inner.test")),
        "/file": http("302 Found", Location="file:///etc/passwd"),
        "/nowhere": http("302 Found"),
        "/loop": http("302 Found", Location="/loop"),
    }
    assert fetch(site, site.url("/one", "site.test"), names) == b"end"
    for path in ("/inward", "/file", "/nowhere", "/loop"):
        site.connections = 0
        with pytest.raises(FetchError):
            fetch(site, site.url(path, "site.test"), names)
        assert site.connections <= 4, "the first request and three redirects"


@pytest.mark.parametrize(
    "answer",
    [
        http("404 Not Found", b"no"),
        http("500 Internal Server Error"),
        http("206 Partial Content", b"x"),
        http("200 OK", gzip.compress(b"x" * 100), Content_Encoding="gzip"),
        http("200 OK", b"x" * 2000),
        http("200 OK", b"", Content_Length="99999999999"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024
        + b"\r\n400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n",
        http("200 OK", b"x" * 100, Content_Length="500"),
        b"not http at all\r\n\r\n",
        b"",
    ],
    ids=["404", "500", "206", "gzip", "large", "announced", "chunked", "short", "noise", "gone"],
)  # fmt: skip
def test_what_is_no_whole_plain_body_is_refused(site: Site, answer: bytes) -> None:
    """One error for all, so that nothing is learnt about the other side."""
    site.answers["/"] = answer
    with pytest.raises(FetchError) as caught:
        fetch(site, site.url("/"), max_bytes=1500)
    assert not isinstance(caught.value, FetchTimeout)


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"x")
        time.sleep(0.05)


def silence(connection: socket.socket) -> None:
    connection.settimeout(60)
    connection.recv(1)


def stop_in_the_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-")
    silence(connection)


def stop_in_the_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx")
    silence(connection)


@pytest.mark.parametrize(
    ("answer", "idle", "total"),
    [
        (drip, 600.0, 1.0),
        (silence, 0.4, 600.0),
        (stop_in_the_head, 0.4, 600.0),
        (stop_in_the_body, 0.4, 600.0),
    ],
    ids=["drip", "no-first-byte", "half-a-head", "half-a-body"],
)
def test_slow_answers_end_in_time(
    site: Site, answer: Callable[[socket.socket], None], idle: float, total: float
) -> None:
    """A drip ends by the limit of the whole, silence by that of being idle; not of themselves.

    All would go on for most of a minute, and then end in another error or none.
    """
    site.answers["/"] = answer
    with pytest.raises(FetchTimeout):
        fetch(site, site.url("/"), idle_seconds=idle, total_seconds=total)


def test_a_connection_that_is_not_made_ends_in_time() -> None:
    """A listener whose queue is full lets further ones hang; the limit of connecting ends that."""
    with socket.socket() as full, contextlib.ExitStack() as held:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with contextlib.suppress(TimeoutError):
            for _ in range(64):
                held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.5))
        site = Site(port)
        with pytest.raises(FetchTimeout):
            fetch(site, site.url("/"), connect_seconds=0.3, idle_seconds=600.0, total_seconds=600.0)


@pytest.mark.parametrize(
    ("allowed", "denied", "host", "admitted"),
    [
        ({"site.test"}, set(), "site.test", True),
        ({"site.test"}, set(), "a.site.test", True),
        ({"site.test"}, set(), "SITE.test.", True),
        ({"site.test"}, set(), "notsite.test", False),
        (set(), {"site.test"}, "a.site.test", False),
        ({"site.test"}, {"a.site.test"}, "a.site.test", False),
        (set(), {"other.test"}, "site.test", True),
    ],
)
def test_domains_can_be_allowed_and_denied_with_their_subdomains(
    site: Site, allowed: set[str], denied: set[str], host: str, admitted: bool
) -> None:
    """Denial wins; a trailing dot or another case changes nothing."""
    site.answers["/"] = http("200 OK", b"x")
    names = Names(site=["127.0.0.1"], a=["127.0.0.1"], notsite=["127.0.0.1"], SITE=["127.0.0.1"])
    lists = {"allowed_domains": frozenset(allowed), "denied_domains": frozenset(denied)}
    if admitted:
        assert fetch(site, site.url("/", host), names, **lists) == b"x"
    else:
        with pytest.raises(FetchError):
            fetch(site, site.url("/", host), names, **lists)


def test_the_environments_proxy_is_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would connect where this process may not judge."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site.answers["/"] = http("200 OK", b"x")
    assert fetch(site, site.url("/")) == b"x"


def test_a_netrc_is_not_read(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's passwords are no stranger's; neither the one at home nor one that is named."""
    (tmp_path / ".netrc").write_text("default login operator password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in (None, str(tmp_path / ".netrc")):
        monkeypatch.delenv("NETRC", raising=False)
        if named:
            monkeypatch.setenv("NETRC", named)
        site.answers["/"] = http("200 OK", b"x")
        assert fetch(site, site.url("/", "site.test"), Names(site=["127.0.0.1"])) == b"x"
    assert len(site.heads) == 2
    assert not any("authorization" in head.lower() for head in site.heads)


def test_a_cookie_goes_nowhere(site: Site) -> None:
    """Set by a redirect or an answer, it is sent neither to the next hop nor with a later fetch."""
    cookie = {"Set_Cookie": "who=me; Path=/"}
    site.answers |= {
        "/one": http("302 Found", Location="/two", **cookie),
        "/two": http("200 OK", b"x", **cookie),
    }

    async def run() -> None:
        policy = FetchPolicy(allowed_networks=LOOPBACK, ports=frozenset({site.port}))
        fetcher = Fetcher(policy, Names(site=["127.0.0.1"]))
        for _ in range(2):
            assert await fetcher.fetch(site.url("/one", "site.test"), freely) == b"x"
        await fetcher.close()

    asyncio.run(run())
    assert len(site.heads) == 4
    assert not any("cookie" in head.lower() for head in site.heads)


def test_plain_text_where_tls_is_due_is_an_error_like_any_other() -> None:
    """Told at once, not waited for; certificates have ``test_fetch_https``."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(http("400 Bad Request"))
            self.request.recv(4096)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = Site(server.server_address[1])
        url = one.url("/").replace("http:", "https:")
        with pytest.raises(FetchError) as caught:
            fetch(one, url, idle_seconds=600.0, total_seconds=600.0)
        server.shutdown()
    assert not isinstance(caught.value, FetchTimeout)


def test_bytes_are_asked_for_as_they_come(site: Site) -> None:
    """Each piece before it is kept: a refusal ends the transfer, and passes as it is."""
    site.answers["/"] = http("200 OK", b"x" * 300_000)
    taken = []

    class Refused(Exception):
        pass

    async def take(size: int) -> None:
        taken.append(size)
        if sum(taken) > 100_000:
            raise Refused

    async def run() -> None:
        policy = FetchPolicy(allowed_networks=LOOPBACK, ports=frozenset({site.port}))
        fetcher = Fetcher(policy)
        try:
            await fetcher.fetch(site.url("/"), take)
        finally:
            await fetcher.close()

    with pytest.raises(Refused):
        asyncio.run(run())
    assert 100_000 < sum(taken) < 300_000


def test_waiting_for_room_is_not_the_other_sides_slowness(site: Site) -> None:
    """While a piece may not be kept yet, the time for the transfer stands still.

    Each piece waits for an hour of the event loop's clock, the transfer has a minute.
    """
    waited, first_taken = 0.0, threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(http("200 OK", b"x" * 1000)[:-500])
        first_taken.wait(60)
        time.sleep(0.2)  # the fetcher waits for this piece with the clock running again
        connection.sendall(b"x" * 500)

    site.answers["/"] = answer

    async def take(size: int) -> None:
        nonlocal waited
        waited += 3600
        first_taken.set()
        for _ in range(5):
            await asyncio.sleep(0)

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        clock = loop.time
        loop.time = lambda: clock() + waited  # type: ignore[method-assign]
        policy = FetchPolicy(
            allowed_networks=LOOPBACK, ports=frozenset({site.port}),
            idle_seconds=1e6, total_seconds=60,
        )  # fmt: skip
        fetcher = Fetcher(policy)
        try:
            return await fetcher.fetch(site.url("/"), take)
        finally:
            await fetcher.close()

    assert asyncio.run(run()) == b"x" * 1000


def test_slow_hosts_take_no_connection_from_others() -> None:
    """However many downloads are under way, one more begins at once: its time is its own."""

    async def run() -> bytes:
        asked = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            head = await reader.readuntil(b"\r\n\r\n")
            asked += 1
            if b"/good" in head:
                writer.write(http("200 OK", b"picture"))
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        port = server.sockets[0].getsockname()[1]
        settings = {"allowed_networks": LOOPBACK, "ports": frozenset({port})}
        fetcher = Fetcher(FetchPolicy(**settings, idle_seconds=60, total_seconds=60))
        url = f"http://127.0.0.1:{port}"
        tasks = [asyncio.create_task(fetcher.fetch(f"{url}/slow", freely)) for _ in range(150)]
        try:
            async with asyncio.timeout(30):
                while asked < 150:
                    await asyncio.sleep(0.01)
            return await fetcher.fetch(f"{url}/good", freely)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await fetcher.close()
            server.close()

    assert asyncio.run(run()) == b"picture"
