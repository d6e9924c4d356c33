"""Which network addresses the server may be sent to by a stranger's URL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address

# RFC 6052 and RFC 8215: a translator turns these into the IPv4 address in their last 32 bits.
_NAT64 = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
# RFC 4291: deprecated ways to write an IPv4 address, still routed by some stacks.
_COMPATIBLE = ip_network("::/96")


class AddressRules:
    """Admits global unicast addresses, and networks that the operator names."""

    def __init__(self, allowed_networks: Iterable[str] = ()) -> None:
        """Take networks in CIDR notation; raises ``ValueError`` for any other text."""
        self._allowed = tuple(ip_network(network) for network in allowed_networks)

    def admit(self, address: str) -> bool:
        """Tell whether a connection to ``address`` (numeric) may be opened.

        An IPv6 address that carries an IPv4 address is judged by both.
        """
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if any(parsed in network for network in self._allowed):
            return True
        return all(_is_public(one) for one in _unwrapped(parsed))


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not address.is_multicast


def _unwrapped(address: Address) -> Iterator[Address]:
    if isinstance(address, IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if any(_contains(network, address) for network in (*_NAT64, _COMPATIBLE)):
        yield IPv4Address(int(address) & 0xFFFF_FFFF)


def _contains(network: object, address: IPv6Address) -> bool:
    return isinstance(network, IPv6Network) and address in network
