"""Names and addresses of hosts, as a server's certificate lists them. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from stripewell.errors import UserError

Host = str | ipaddress.IPv4Address | ipaddress.IPv6Address

#: What a certificate's common name can hold.
MAX_NAME = 64

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
#: A last label with a letter in it: 10.0.0.256 is no name, but a mistyped address.
_DNS = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*(?![0-9]+$){_LABEL}", re.ASCII)


def parse_hosts(texts: Iterable[str]) -> list[Host]:
    """Each host once, in the order given. Raises `UserError`."""
    hosts = list(dict.fromkeys(map(parse_host, texts)))
    if hosts and len(str(hosts[0])) > MAX_NAME:
        raise UserError(
            f"the first host names the certificate and has at most {MAX_NAME} characters,"
            f" {str(hosts[0])!r} has more: put a shorter one first"
        )
    return hosts


def parse_host(text: str) -> Host:
    """Of a DNS name, an IPv4 or an IPv6 address. Raises `UserError`."""
    try:
        if "%" not in text:  # a zone means something on one host only
            return ipaddress.ip_address(text)
    except ValueError:
        pass
    name = text.lower()
    if _DNS.fullmatch(name) is None:
        raise UserError(
            f"{text[:80]!r} is no host: write a DNS name or an IP address, without port,"
            " brackets or wildcard"
        )
    return name
