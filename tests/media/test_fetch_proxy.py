"""Fetching through a proxy: it is told where to go by address, and only where anybody may go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import runpy
import select
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver
from yarl import URL

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.media import proxies as proxies_module
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchPolicy, FetchTimeout
from tests.media.test_fetch import LOOPBACK, Names, Several, Site, freely, http, silence
from tests.media.test_fetch import site as site  # noqa: PLC0414  (a fixture)
from tests.media.test_fetch_https import Secure
from tests.media.test_fetch_https import secure as secure  # noqa: PLC0414  (a fixture)
from tests.media.test_fetch_https import trusted as trusted  # noqa: PLC0414  (a fixture)

VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@dataclass
class Proxy:
    """A proxy on loopback, which connects wherever it is told to; ``answer`` is said instead."""

    port: int
    heads: list[str] = field(default_factory=list)
    answer: Any = None

    def url(self, credentials: str = "") -> str:
        return f"http://{credentials}127.0.0.1:{self.port}"

    @property
    def targets(self) -> list[str]:
        """What it was asked for, without the versions."""
        return [head.split(" HTTP/1.1", 1)[0] for head in self.heads]


def _head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = connection.recv(4096)
        if not piece:
            break
        head += piece
    return head


def _joined(one: socket.socket, other: socket.socket) -> None:
    while True:
        for ready in select.select([one, other], [], [], 60)[0]:
            piece = ready.recv(65536)
            if not piece:
                return
            (other if ready is one else one).sendall(piece)


def _passed_on(connection: socket.socket, head: bytes) -> None:
    method, target, _ = head.decode().split(" ", 2)
    authority = target if method == "CONNECT" else target.split("/")[2]
    host, _, port = authority.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=60) as onward:
        if method == "CONNECT":
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = "/" + target.split("/", 3)[3]
            onward.sendall(head.replace(target.encode(), path.encode(), 1))
        _joined(connection, onward)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                head = _head(self.request)
                made.heads.append(head.decode())
                if callable(made.answer):
                    made.answer(self.request)
                elif made.answer is not None:
                    self.request.sendall(made.answer)
                else:
                    _passed_on(self.request, head)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        made = Proxy(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine that runs this has set is not what is tested."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def fetch(
    port: int, url: str, proxy: str | None, resolver: AbstractResolver | None = None, **policy: Any
) -> bytes:
    async def run() -> bytes:
        settings = {"allowed_networks": LOOPBACK, "ports": frozenset({port}), **policy}
        fetcher = Fetcher(FetchPolicy(proxy=proxy, **settings), resolver)
        try:
            return await fetcher.fetch(url, freely)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def secured(site: Secure, proxy: str | None, host: str = "site.test", **policy: Any) -> bytes:
    names = Names(**{host.split(".", 1)[0]: ["127.0.0.1"]})
    return fetch(site.port, f"https://{host}:{site.port}/", proxy, names, **policy)


def test_https_goes_through_a_tunnel_to_the_address_that_was_judged(
    trusted: Secure, proxy: Proxy
) -> None:
    """CONNECT names the address; SNI, certificate and Host are the name's.

    Host of CONNECT too, as aiohttp has it: proxies must not go by it (RFC 9112, 3.2.2).
    """
    assert secured(trusted, proxy.url()) == b"whole"
    assert proxy.targets == [f"CONNECT 127.0.0.1:{trusted.port}"]
    assert trusted.asked == ["site.test"]
    assert f"host: site.test:{trusted.port}" in trusted.heads[0].lower()


def test_a_certificate_of_another_name_is_refused_through_a_tunnel_too(
    trusted: Secure, proxy: Proxy
) -> None:
    """Whoever sits at the other end, the proxy itself among them."""
    with pytest.raises(FetchError):
        secured(trusted, proxy.url(), "other.test")
    assert trusted.heads == []


def test_http_asks_the_proxy_for_the_address_that_was_judged(site: Site, proxy: Proxy) -> None:
    """The target is the address; Host is the name, for a proxy that passes it on."""
    site.answers["/a?b=c"] = http("200 OK", b"x")
    url = site.url("/a?b=c", "site.test")
    assert fetch(site.port, url, proxy.url(), Names(site=["127.0.0.1"])) == b"x"
    assert proxy.targets == [f"GET http://127.0.0.1:{site.port}/a?b=c"]
    assert f"host: site.test:{site.port}" in site.heads[0].lower()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "[::1]", "[::ffff:7f00:1]",
     "169.254.169.254", "10.0.0.1"],
)  # fmt: skip
def test_an_inner_address_is_not_even_told_to_the_proxy(
    proxy: Proxy, host: str, scheme: str
) -> None:
    """It would reach there what this machine may not, and what is its own network."""
    with pytest.raises(FetchError):
        fetch(80, f"{scheme}://{host}:80/", proxy.url(), allowed_networks=())
    assert proxy.heads == []


@pytest.mark.parametrize("inner", ["10.0.0.1", "169.254.169.254", "::1"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_leads_inward_is_not_told_to_the_proxy(
    proxy: Proxy, scheme: str, inner: str
) -> None:
    """Not with a public address beside it either."""
    with pytest.raises(FetchError):
        fetch(80, f"{scheme}://mixed.test:80/", proxy.url(), Several("127.0.0.1", inner))
    assert proxy.heads == []


def test_a_name_that_is_bound_anew_gains_nothing(site: Site, proxy: Proxy) -> None:
    """It is resolved once, and the proxy is told the answer."""
    site.answers["/"] = http("200 OK", b"x")
    names = Names(evil=["127.0.0.1", "10.0.0.1"])
    assert fetch(site.port, site.url("/", "evil.test"), proxy.url(), names) == b"x"
    assert names.asked == ["evil.test"]


def test_the_proxy_itself_is_no_address_for_strangers(proxy: Proxy) -> None:
    """That this machine may connect to it is the operator's word, not a URL's."""
    with pytest.raises(FetchError):
        fetch(proxy.port, f"http://127.0.0.1:{proxy.port}/", proxy.url(), allowed_networks=())
    assert proxy.heads == []


def test_redirects_are_judged_one_by_one_through_a_proxy(site: Site, proxy: Proxy) -> None:
    """Each hop is a request to the proxy of its own, and an inward one is none."""
    site.answers |= {
        "/one": http("302 Found", Location="/two"),
        "/two": http("200 OK", b"end"),
        "/inward": http("302 Found", Location=site.url("/", "inner.test")),
    }
    names = Names(site=["127.0.0.1"], inner=["10.0.0.1"])
    assert fetch(site.port, site.url("/one", "site.test"), proxy.url(), names) == b"end"
    assert len(proxy.heads) == 2
    with pytest.raises(FetchError):
        fetch(site.port, site.url("/inward", "site.test"), proxy.url(), names)
    assert len(proxy.heads) == 3


@pytest.mark.parametrize("where", ["profile", "environment"])
def test_the_proxys_password_is_told_to_the_proxy_alone(
    trusted: Secure, proxy: Proxy, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `Proxy-Authorization` of CONNECT; it is in no error, no repr, and not sent onward."""
    address = proxy.url("user:sesame%40x@")
    if where == "environment":
        monkeypatch.setenv("HTTPS_PROXY", address)
        address = "environment"
    assert secured(trusted, address) == b"whole"
    expected = base64.b64encode(b"user:sesame@x").decode()
    assert f"proxy-authorization: basic {expected}".lower() in proxy.heads[0].lower()
    assert "authorization" not in trusted.heads[0].lower()
    assert "sesame" not in repr(FetchPolicy(proxy=address))
    proxy.answer = http("407 Proxy Authentication Required", Proxy_Authenticate="Basic")
    with pytest.raises(FetchError) as caught:
        secured(trusted, address)
    assert str(caught.value) == "the proxy answers 407"


def test_a_netrc_is_read_for_nobody(
    trusted: Secure, proxy: Proxy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the site nor for the proxy, though proxies are those of the environment."""
    (tmp_path / "netrc").write_text("default login operator password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("https_proxy", proxy.url())
    assert secured(trusted, "environment") == b"whole"
    assert len(proxy.heads) == 1
    assert "authorization" not in (proxy.heads[0] + trusted.heads[0]).lower()


def test_the_environment_tells_a_proxy_for_each_scheme(
    trusted: Secure, site: Site, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a variable is fetched directly, and so is everything where none is set."""
    site.answers["/"] = http("200 OK", b"x")
    url, names = site.url("/", "site.test"), Names(site=["127.0.0.1"])
    assert fetch(site.port, url, "environment", names) == b"x"
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.port}")
    assert fetch(site.port, url, "environment", names) == b"x"
    assert proxy.heads == []
    assert secured(trusted, "environment") == b"whole"
    assert len(proxy.heads) == 1


@pytest.mark.parametrize(
    ("without", "proxied"),
    [
        ("site.test", False),
        (".test", False),
        ("SITE.test", False),
        ("other.test, site.test:{port}", False),
        ("*", False),
        ("other.test", True),
        ("site.test:1", True),
        ("127.0.0.1", True),
    ],
)
def test_no_proxy_names_what_is_fetched_directly(
    site: Site, proxy: Proxy, without: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of the URL, with its subdomains; a trailing dot changes nothing."""
    monkeypatch.setenv("http_proxy", proxy.url())
    monkeypatch.setenv("no_proxy", without.replace("{port}", str(site.port)))
    site.answers["/"] = http("200 OK", b"x")
    for host in ("site.test", "site.test."):
        names = Names(site=["127.0.0.1"])
        assert fetch(site.port, site.url("/", host), "environment", names) == b"x"
    assert len(proxy.heads) == (2 if proxied else 0)


def test_no_proxy_is_read_on_every_system_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is what counts, not the settings of macOS or of Windows' registry."""

    def of_another_system(host: str) -> bool:
        raise AssertionError(host)

    monkeypatch.setattr(urllib.request, "proxy_bypass", of_another_system)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inner.example")
    proxies = runpy.run_path(proxies_module.__file__)["Proxies"]("environment")
    assert proxies.of(URL("http://inner.example/x.png")) is None
    assert proxies.of(URL("http://outer.example/x.png")) == URL("http://proxy.example:3128")


def test_what_no_proxy_names_is_judged_like_everything(
    site: Site, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable says how to get there, not that a stranger may."""
    monkeypatch.setenv("http_proxy", proxy.url())
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(FetchError):
        fetch(site.port, site.url("/"), "environment", allowed_networks=())
    assert site.connections == 0
    assert proxy.heads == []


@pytest.mark.parametrize(
    "address", ["socks5://user:sesame@127.0.0.1:1", "http://127.0.0.1:sesame", "http://"]
)
def test_an_unusable_variable_stops_the_start(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching directly instead would go round the proxy; the line names the variable."""
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(ProfileError, match=r"media\.proxy.*https_proxy") as caught:
        Fetcher(FetchPolicy(proxy="environment"))
    assert "sesame" not in str(caught.value)
    Fetcher(FetchPolicy())


@pytest.mark.parametrize("answer", [http("403 Forbidden"), http("502 Bad Gateway"), b"", b"no\r\n"])
def test_what_the_proxy_refuses_is_an_error_like_any_other(
    trusted: Secure, proxy: Proxy, answer: bytes
) -> None:
    """Not told apart for a client."""
    proxy.answer = answer
    with pytest.raises(FetchError) as caught:
        secured(trusted, proxy.url())
    assert not isinstance(caught.value, FetchTimeout)
    assert trusted.heads == []


def test_a_proxy_that_is_not_there_is_not_gone_round(site: Site) -> None:
    """What would be fetched directly is not."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(FetchError):
            fetch(site.port, site.url("/"), address)
    assert site.connections == 0


def test_a_proxy_that_says_nothing_ends_in_time(trusted: Secure, proxy: Proxy) -> None:
    """By the limit of the whole."""
    proxy.answer = silence
    with pytest.raises(FetchTimeout):
        secured(trusted, proxy.url(), total_seconds=0.5)
