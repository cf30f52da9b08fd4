"""Where a webhook may go: which addresses are public, and what a name stands for.

Names are asked for by dnspython, never by the system's blocking resolver: a silent DNS server then costs one lookup its
time, and no thread that others wait for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver

from perllm.broker.api.settings import address_and_port

#: Seconds a name's lookup may take in all.
LOOKUP_TIMEOUT = 5.0
#: Addresses of one name that are looked at.
MAX_ADDRESSES = 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: IPv4 that is not public: multicast, and every block of IANA's IPv4 special-purpose address registry (RFC 6890).
_SPECIAL_4 = [
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip
#: IPv6 that is public: global unicast (RFC 4291), less the blocks of IANA's IPv6 special-purpose address registry that
#: lie in it (Teredo is part of 2001::/23, 6to4 is 2002::/16). Nothing outside is, whatever IPv4 address it embeds.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = [
    ipaddress.IPv6Network(block)
    for block in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]
#: What a NAT64 gateway turns into IPv4 (RFC 6052): in a network without IPv4, all of the IPv4 internet is here.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: The middle of an ISATAP interface identifier (RFC 5214), less its universal bit; an IPv4 address follows.
_ISATAP = 0x00005EFE
#: Metadata services, by which clouds give credentials to their machines. Not even an allowed network opens these.
_METADATA = {
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192",
        "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
    )
}  # fmt: skip


class Forbidden(Exception):
    """The address is not one to post to."""


def check_url(url: str) -> None:
    """Raises Forbidden for what is no plain HTTP(S) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Forbidden(str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Forbidden("an http:// or https:// address is required")
    if parts.username or parts.password or parts.fragment:
        raise Forbidden("no user, password or fragment may be in it")
    if port == 0 or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise Forbidden("it holds what no address holds")


def permitted(address: str, allowed: Sequence[str]) -> bool:
    """Whether an IP address is a public one, or in a network of `allowed` and not a cloud's metadata service."""
    ip = _as_connected(ipaddress.ip_address(address.partition("%")[0]))
    if ip in _METADATA:
        return False
    return any(ip in ipaddress.ip_network(network) for network in allowed) or _public(ip)


def _as_connected(ip: Address) -> Address:
    """A mapped address (::ffff:a.b.c.d) is the IPv4 one: connecting to it is connecting over IPv4."""
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _public(ip: Address) -> bool:
    if isinstance(ip, ipaddress.IPv4Address):
        return ip not in _METADATA and not any(ip in block for block in _SPECIAL_4)
    embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip in _NAT64:
        return _public(embedded)
    isatap = int(ip) >> 32 & 0xFDFFFFFF == _ISATAP
    return ip in _GLOBAL_6 and not any(ip in block for block in _SPECIAL_6) and (not isatap or _public(embedded))


async def resolve(host: str, port: int, allowed: Sequence[str], servers: Sequence[str] = ()) -> list[str]:
    """The addresses of a host that may be posted to, IPv4 first. `servers` are asked instead of the system's DNS.
    Raises Forbidden when there is none."""
    addresses = _literal(host, port) or _hosts_file(host) or await _look_up(host, servers)
    if not addresses:
        raise Forbidden(f"{host} does not resolve")
    good = [address for address in addresses[:MAX_ADDRESSES] if permitted(address, allowed)]
    if not good:  # which they are is not said: that would tell strangers of the names inside
        raise Forbidden(f"{host} is no public address: private, loopback and other special ones are not allowed")
    return good


def _literal(host: str, port: int) -> list[str]:
    """The address a host is in any spelling the system knows (127.1, 0x7f000001), without asking anybody."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError, ValueError):
        return []
    return [str(entry[4][0]) for entry in found]


def _hosts_file(host: str, path: Path = Path("/etc/hosts")) -> list[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = [line.partition("#")[0].lower().split() for line in lines]
    return [row[0] for row in rows if host.lower().removesuffix(".") in row[1:] and _is_address(row[0])]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


async def _look_up(host: str, servers: Sequence[str]) -> list[str]:
    """Both kinds of address, asked for at once: many servers answer one kind only."""
    try:
        resolver = dns.asyncresolver.Resolver(configure=not servers)
        if servers:
            resolver.nameservers = [dns.nameserver.Do53Nameserver(*address_and_port(server)) for server in servers]
        found = await asyncio.gather(
            *(
                resolver.resolve(host, kind, search=True, lifetime=LOOKUP_TIMEOUT, raise_on_no_answer=False)
                for kind in ("A", "AAAA")
            ),
            return_exceptions=True,
        )
    except (dns.exception.DNSException, OSError):
        return []
    answers = [answer for answer in found if isinstance(answer, dns.resolver.Answer)]
    return [str(entry.address) for answer in answers for entry in answer.rrset or ()]
