"""Lists of domains in a profile: every way to write a name means it, and nothing else is taken."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchPolicy
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.profile.media import MediaSection


class Asked(AbstractResolver):
    """Knows no name, and which it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.names.append(host)
        raise OSError("no such name")

    async def close(self) -> None:
        """Nothing is held."""


def asked_for(section: MediaSection, *hosts: str) -> list[str]:
    """Return the names that are resolved when URLs with these hosts are fetched."""
    resolver = Asked()
    policy = FetchPolicy(
        allowed_domains=frozenset(section.allowed_domains),
        denied_domains=frozenset(section.denied_domains),
    )

    async def freely(size: int) -> None:
        """Let every byte be held."""

    async def run() -> None:
        fetcher = Fetcher(policy, resolver)
        for host in hosts:
            with pytest.raises(FetchError):
                await fetcher.fetch(f"http://{host}/", freely)
        await fetcher.close()

    asyncio.run(run())
    return resolver.names


SPELLINGS = [
    ("Evil.test", "evil.test"),
    (".evil.test", "evil.test"),
    ("evil.test.", "evil.test"),
    ("evil\u3002test", "evil.test"),
    ("\uff45\uff56\uff49\uff4c.test", "evil.test"),
    ("xn--bcher-kva.de", "b\u00fccher.de"),
    ("XN--Bcher-KVA.de", "BU\u0308CHER.DE"),
    ("b\u00fccher.de", "xn--bcher-kva.de"),
    ("fa\u00df.de", "xn--fa-hia.de"),
    ("\u2603.net", "xn--n3h.net"),
    ("_dmarc.my_site.test", "_dmarc.my_site.test"),
    ("localhost", "LOCALHOST."),
    ("test", "evil.test"),
]


@pytest.mark.parametrize(("written", "host"), SPELLINGS)
def test_a_name_is_meant_however_it_is_written(written: str, host: str) -> None:
    """Case, outer dots and the two forms of IDNA are one; denied it is not even resolved."""
    denying = MediaSection(denied_domains=(written,))
    assert asked_for(denying, host, f"a.{host}", host.upper()) == []
    allowing = MediaSection(allowed_domains=(written,))
    assert len(asked_for(allowing, host, f"a.{host}")) == 2
    assert asked_for(allowing, "other.example") == []


@pytest.mark.parametrize("address", ["10.0.0.5", "[fd00::5]", "[FD00:0::5]"])
def test_an_address_may_be_allowed(address: str) -> None:
    """Beside names; as an address it needs no resolving, and the networks still judge it."""
    section = MediaSection(allowed_domains=(address.strip("[]"), "site.test"))
    policy = FetchPolicy(allowed_domains=frozenset(section.allowed_domains))
    assert Fetcher(policy)._checked(f"http://{address}/").port == 80
    with pytest.raises(FetchError):
        Fetcher(policy)._checked("http://10.0.0.6/")


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("*.evil.test", "evil.test"),
        ("https://x.test/", "x.test"),
        ("https://user@*.X.test:8080/a?b#c", "x.test"),
        ("x.test:8080", "x.test"),
        ("x.test/path", "x.test"),
        (" x.test ", "x.test"),
        ("//b\u00fccher.de", "xn--bcher-kva.de"),
        ("*", "example.org"),
        (".", "example.org"),
        ("a..test", "example.org"),
        ("..evil.test", "example.org"),
        ("ev%69l.test", "example.org"),
        ("evil*.test", "example.org"),
        ("127.1", "example.org"),
        ("2130706433", "example.org"),
        ("0x7f.1", "example.org"),
        ("0x7f000001", "example.org"),
        ("1.2.3.4.", "example.org"),
        ("fe80::1%eth0", "example.org"),
        ("http://[::1]:80/", "example.org"),
        ("mailto:x", "example.org"),
        ("a" * 64 + ".test", "example.org"),
        ("a." * 127 + "test", "example.org"),
    ],
)
@pytest.mark.parametrize("field", ["allowed_domains", "denied_domains"])
def test_what_is_no_name_is_refused_with_what_to_write(
    field: str, written: str, instead: str
) -> None:
    """A pattern that never matches would deny nothing; the error names field, value and remedy."""
    with pytest.raises(ProfileError) as caught:
        load_profile("demo", [f"media.{field}=[good.test, {written!r}]"])
    told = str(caught.value)
    assert f"media.{field}.1 must be a domain name" in told
    assert f"or *, as {instead}, is {repr(written)[:50]}" in told


@pytest.mark.parametrize("address", ["1.2.3.4", "::1", "2001:db8::1"])
def test_an_address_cannot_be_denied_as_a_domain(address: str) -> None:
    """Names that lead to it would still be fetched."""
    with pytest.raises(ProfileError, match=r"media\.denied_domains\.0 must be a domain name alone"):
        load_profile("demo", [f"media.denied_domains=[{address!r}]"])


label = st.one_of(
    st.text("abcXYZ019-_", min_size=1, max_size=8),
    st.text(
        "\u00fc\u00dfO\u0308\u2603\u5317\u05d0\u0627\uff41\u2460\u200d", min_size=1, max_size=6
    ),
    st.text(min_size=1, max_size=6),
)
name = st.lists(label, min_size=1, max_size=4).map(".".join)
written_name = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "", ".", "*.", "https://", " "]),
    name,
    st.sampled_from(["", "", "", ".", "\u3002", "/", ":80", ".."]),
)


@given(written_name)
@example("Evil.test")
@example("a_b.b\u00fccher.de")
def test_what_is_taken_denies_the_name_and_its_subdomains(written: str) -> None:
    """Whatever a profile takes is a name that no fetch goes to, above it or in another spelling."""
    try:
        (taken,) = MediaSection(denied_domains=(written,)).denied_domains
    except ValidationError:
        return
    section = MediaSection(denied_domains=(taken,))
    assert section.denied_domains == (taken,), "what is kept is taken again as it is"
    hosts = [written.strip("."), taken, taken.upper(), f"{taken}.", f"a.{taken}", f"A.b.{taken}"]
    assert asked_for(section, *hosts) == []
    if len(taken) < 60:
        assert asked_for(section, f"not{taken}", "other.example") == [
            f"not{taken}",
            "other.example",
        ]
