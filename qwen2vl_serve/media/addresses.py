"""Which network addresses the server may be sent to by a stranger's URL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address

# IANA, "Internet Protocol Version 6 Address Space": what is given out as global unicast. All else
# is local, multicast, reserved, or a wrapping (IPv4-translated and -compatible, local NAT64).
_GLOBAL_UNICAST = ip_network("2000::/3")
# RFC 6052: a translator turns these into the IPv4 address in their last 32 bits.
_NAT64 = ip_network("64:ff9b::/96")
# IANA, "IPv4 and IPv6 Special-Purpose Address Registry", where ``is_global`` lags behind or says
# yes: protocols' anycast (2001::/23 and 192.0.0.0/24) leads to the nearest router, as does that of
# 6to4 relays (192.88.99.0/24, RFC 7526), and 3fff::/20 (RFC 9637) is documentation.
_NOT_PUBLIC = tuple(
    ip_network(block) for block in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")
)


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
    if address.version == 6 and address not in _GLOBAL_UNICAST and address not in _NAT64:
        return False
    if any(address in block for block in _NOT_PUBLIC):
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
    if address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFF_FFFF)
