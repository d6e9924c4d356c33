"""Fetching by URL, for addresses that strangers choose.

A URL is parsed once. A name is used only if ``AddressRules`` admits every address that it resolves
to. Every socket is opened by ``_guarded_socket``, which sees the numeric address of each attempt,
so that no name, number format, redirect or second resolution reaches another one; Host and SNI stay
those of the URL.

A proxy, where the profile has one, is told the address that was judged: whoever resolves a name
decides where it leads.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from qwen2vl_serve.media.addresses import AddressRules
from qwen2vl_serve.media.proxies import Proxies

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_LENGTH = 8192


Take = Callable[[int], Awaitable[None]]
"""Called with a number of bytes before they are held; it may wait, or raise to refuse them."""


class FetchError(Exception):
    """The address may not be used, or yields nothing usable; the text is for the log only."""


class FetchTimeout(FetchError):
    """The other side did not connect, answer or finish in time."""


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched; times in seconds, sizes in bytes.

    ``allowed_domains`` (empty: all) and ``denied_domains`` hold for subdomains as well, and are
    ASCII in lower case without outer dots, as a profile makes them; ``allowed_networks`` (CIDR)
    opens networks that are not public. ``proxy`` is the profile's ``media.proxy``.
    """

    max_bytes: int = 32 * 1024 * 1024
    connect_seconds: float = 5.0
    idle_seconds: float = 5.0
    total_seconds: float = 20.0
    max_redirects: int = 3
    ports: frozenset[int] = frozenset({80, 443})
    allowed_domains: frozenset[str] = field(default_factory=frozenset)
    denied_domains: frozenset[str] = field(default_factory=frozenset)
    allowed_networks: tuple[str, ...] = ()
    proxy: str | None = field(default=None, repr=False)


class Fetcher:
    """Fetches bytes under a policy; pools of connections, to be closed at the end."""

    def __init__(self, policy: FetchPolicy, resolver: AbstractResolver | None = None) -> None:
        """``resolver`` replaces the system's name resolution; its answers are judged alike.

        Raises:
            ProfileError: a proxy of the environment is of no use.
        """
        self.policy = policy
        self._rules = AddressRules(policy.allowed_networks)
        self._proxies = Proxies(policy.proxy)
        self._resolver = resolver
        self._names: _JudgedResolver | None = None
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None

    async def fetch(self, url: str, take: Take) -> bytes:
        """Return the bytes at ``url``; while ``take`` waits, the time for it stands still.

        Raises:
            FetchError: blocked, refused, not 200, encoded, too large: one error for all, so
                that a client cannot scan a network by their difference.
            FetchTimeout: too slow.
        """
        try:
            async with asyncio.timeout(self.policy.total_seconds) as deadline:
                return await self._follow(self._checked(url), _without_clock(take, deadline))
        except TimeoutError as error:
            raise FetchTimeout(str(error) or "total time") from None
        except aiohttp.ClientHttpProxyError as error:
            raise FetchError(f"the proxy answers {error.status}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Some of these quote the address, others the bytes of the answer.
            raise FetchError(type(error).__name__) from None

    async def close(self) -> None:
        """Close the pools."""
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()
        if self._names is not None and self._resolver is None:
            await self._names.close()
        self._direct = self._proxied = self._names = None

    async def _follow(self, url: URL, take: Take) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            async with await self._asked(url) as answer:
                if answer.status in _REDIRECTS:
                    url = self._checked(str(url.join(URL(answer.headers.get("location", "")))))
                    continue
                return await self._read(answer, take)
        raise FetchError(f"more than {self.policy.max_redirects} redirects")

    async def _asked(self, url: URL) -> aiohttp.ClientResponse:
        """Return the answer at ``url``, of which the head has come."""
        proxy = self._proxies.of(url)
        if proxy is None:
            if self._direct is None:
                connector = self._connector(self._judged(), socket_factory=self._guarded_socket)
                self._direct = self._session(connector)
            return await self._direct.get(url, allow_redirects=False)
        if self._proxied is None:
            # Connects to proxies alone, wherever the operator has them.
            self._proxied = self._session(self._connector(aiohttp.DefaultResolver()))
        return await self._proxied.get(
            url.with_host(await self._address_of(url)),
            allow_redirects=False,
            proxy=proxy,
            headers={"host": url.host_port_subcomponent or ""},
            server_hostname=(url.raw_host or "").rstrip("."),
        )

    async def _address_of(self, url: URL) -> str:
        """Return an admitted address of the URL's host; raises ``OSError`` if there is none."""
        host, port = url.raw_host or "", url.port or 0
        try:
            ip_address(host)
        except ValueError:
            found = await self._judged().resolve(host, port, socket.AF_UNSPEC)
            # Whether the proxy has IPv6 is not known here.
            first = min(found, key=lambda one: one["family"] != socket.AF_INET)
            return first["host"]
        if not self._rules.admit(host):
            raise OSError("address not admitted")
        return host

    async def _read(self, answer: aiohttp.ClientResponse, take: Take) -> bytes:
        limit = self.policy.max_bytes
        if answer.status != 200:
            raise FetchError(f"status {answer.status}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise FetchError("encoded, though identity was asked for")
        if answer.content_length is not None and answer.content_length > limit:
            raise FetchError(f"announces {answer.content_length} bytes")
        body = bytearray()
        async for piece in answer.content.iter_any():
            body += piece
            if len(body) > limit:
                raise FetchError(f"more than {limit} bytes")
            await take(len(piece))
        return bytes(body)

    def _checked(self, text: str) -> URL:
        """Parse and judge everything that needs no network."""
        policy = self.policy
        if len(text) > _MAX_URL_LENGTH or any(c <= " " or c in '\\"<>^`{|}\x7f' for c in text):
            raise FetchError("not a URL: too long, or unsafe characters")
        url = URL(text)
        # Raw is what is resolved: ASCII, so that a name has one spelling.
        host = (url.raw_host or "").rstrip(".").lower()
        if url.scheme not in ("http", "https") or not host or "%" in host:
            raise FetchError("not an http(s) URL with a host")
        if url.user is not None or url.password is not None:
            raise FetchError("credentials in the URL")
        if url.port not in policy.ports:
            raise FetchError(f"port {url.port}")
        if _within(host, policy.denied_domains):
            raise FetchError("denied domain")
        if policy.allowed_domains and not _within(host, policy.allowed_domains):
            raise FetchError("not an allowed domain")
        return url

    def _judged(self) -> _JudgedResolver:
        if self._names is None:
            self._names = _JudgedResolver(self._resolver or aiohttp.DefaultResolver(), self._rules)
        return self._names

    def _connector(self, resolver: AbstractResolver, **guard: Any) -> aiohttp.TCPConnector:
        # Not limited here, where waiting for a connection would count as the other side's slowness.
        return aiohttp.TCPConnector(
            resolver=resolver, use_dns_cache=False, force_close=True, limit=0, **guard
        )

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        policy = self.policy
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=policy.connect_seconds, sock_read=policy.idle_seconds
            ),
            headers={"accept-encoding": "identity", "user-agent": "qwen2vl_serve"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    def _guarded_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, place = address
        if not self._rules.admit(str(place[0])):
            raise OSError("address not admitted")
        return socket.socket(family, kind, protocol)


class _JudgedResolver(AbstractResolver):
    """Resolves names of which every address is admitted.

    A public name has no use for an inner address: one that mixes them may be an attacker's, who
    has the public ones fail until the inner one's turn comes.
    """

    def __init__(self, resolver: AbstractResolver, rules: AddressRules) -> None:
        self._resolver = resolver
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return all addresses; raises ``OSError`` if one of them is not admitted."""
        found = await self._resolver.resolve(host, port, family)
        if not all(self._rules.admit(one["host"]) for one in found):
            raise OSError("an address of the name is not admitted")
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._resolver.close()


def _without_clock(take: Take, deadline: asyncio.Timeout) -> Take:
    """Return ``take``, whose waiting is ours and not the other side's slowness."""

    async def taken(size: int) -> None:
        loop, end = asyncio.get_running_loop(), deadline.when()
        begun = loop.time()
        deadline.reschedule(None)
        await take(size)
        if end is not None:
            deadline.reschedule(end + loop.time() - begun)

    return taken


def _within(host: str, domains: Iterable[str]) -> bool:
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)
