"""Which addresses are the public internet's: at any other, a request of ours may reach what no other can."""

import ipaddress
import socket

_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that has been given out of IPv6; what lies outside is translation, multicast, or for local use."""
_DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")


def is_public(address: str) -> bool:
    """Whether anyone on the internet may be meant by an IP address. One that carries an IPv4 address, for
    translation or a tunnel, is as public as that.

    Raises:
        ValueError: it is no IP address.
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and ip not in _RELAYS
    carried = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        carried = ipaddress.IPv4Address(ip.packed[-4:])
    if carried is not None:
        return is_public(str(carried))
    return ip.scope_id is None and ip.is_global and ip in _UNICAST and ip not in _DOCUMENTATION


def literal(host: str) -> str | None:
    """The IP address that a host is without asking anyone, in whatever form resolvers take one (`127.1`,
    `0x7f000001`); None: it is a name."""
    if host == "localhost" or host.endswith(".localhost"):
        return "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return None
    return str(found[0][4][0])
