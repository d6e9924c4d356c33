"""Which addresses a stranger's URL may lead to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.media.addresses import AddressRules

rules = AddressRules()
private = st.sampled_from(
    [
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "0.0.0.0/8",
        "224.0.0.0/4",
        "240.0.0.0/4",
    ]
).flatmap(lambda text: st.ip_addresses(network=ip_network(text)))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "169.254.169.254",
        "10.0.0.1",
        "100.64.0.1",
        "fd00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "2002:7f00:1::",
        "64:ff9b:1::a00:1",
        "::7f00:1",
        "::ffff:0:7f00:1",
        "224.0.0.1",
        "255.255.255.255",
        "nonsense",
    ],
)
def test_no_inner_address_is_admitted(address: str) -> None:
    """Loopback, private, link-local, shared, multicast and their disguises are not public."""
    assert not rules.admit(address)


SPECIAL = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
    "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
    "::1/128", "::/128", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64",
    "2001::/23", "2001:2::/48", "2001:10::/28", "2001:db8::/32", "3fff::/20", "5f00::/16",
    "fc00::/7", "fe80::/10",
]  # fmt: skip
"""What IANA's special-purpose registries do not call globally reachable, and protocols' anycast.

Left out are the wrappings of an IPv4 address (mapped, 6to4), which are judged by it.
"""


@pytest.mark.parametrize("block", SPECIAL)
@given(data=st.data())
def test_no_block_of_the_special_registries_is_admitted(block: str, data: st.DataObject) -> None:
    """Neither its ends nor what lies between, whatever Python's own tables know of it."""
    network = ip_network(block)
    for one in (network[0], network[-1], data.draw(st.ip_addresses(network=network))):
        assert not rules.admit(str(one)), one


@given(st.ip_addresses(v=6))
def test_ipv6_is_admitted_from_what_is_given_out_only(address: IPv6Address) -> None:
    """2000::/3, the space of global unicast, beside the wrappings of a public IPv4 address."""
    wrapping = ("::ffff:0:0/96", "64:ff9b::/96", "2000::/3")
    if not any(address in ip_network(network) for network in wrapping):
        assert not rules.admit(str(address))


@given(private)
def test_a_translated_private_address_is_private(address: IPv4Address) -> None:
    """RFC 2765's form, ``::ffff:0:a.b.c.d``, and RFC 8215's local prefix, whatever lies inside."""
    number = int(address)
    assert not rules.admit(str(IPv6Address((0xFFFF << 48) | number)))
    assert not rules.admit(str(IPv6Address((0x64FF9B0001 << 80) | number)))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses_are_admitted(address: str) -> None:
    """What anybody can reach, a stranger may name."""
    assert rules.admit(address)


@given(private)
def test_a_private_address_is_private_in_every_wrapping(address: IPv4Address) -> None:
    """Mapped, compatible, NAT64, 6to4: the IPv4 address inside decides."""
    number = int(address)
    wrapped = [
        IPv6Address((0xFFFF << 32) | number),
        IPv6Address(number),
        IPv6Address((0x64FF9B << 96) | number),
        IPv6Address((0x2002 << 112) | (number << 80)),
    ]
    for one in (address, *wrapped):
        assert not rules.admit(str(one)), one


def test_a_named_network_is_admitted_and_nothing_beside_it() -> None:
    """An operator may open an intranet for its own clients."""
    opened = AddressRules(["10.1.0.0/16", "::1/128"])
    assert opened.admit("10.1.2.3")
    assert opened.admit("::1")
    assert not opened.admit("10.2.0.1")
    assert not opened.admit("127.0.0.1")
