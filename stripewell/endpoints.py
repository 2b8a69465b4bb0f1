"""Where a daemon listens, and how NBD URIs name it. Pure; called by `daemon`, `attach` and the CLI.

URIs follow NBD's doc/uri.md: nbd://HOST:PORT/EXPORT and nbd+unix:///EXPORT?socket=PATH; nbds and
nbds+unix with TLS.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from stripewell.errors import UserError

NBD_PORT = 10809
#: What the kernel allows for the path of a unix socket.
_PATH_MAX = 107

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]/\s]+)(?::(\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address; `host` without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What NBD clients can connect to."""

    unix: str
    tcp: Address | None = None
    #: Whether clients must use TLS.
    tls: bool = False

    def uris(self, export: str = "") -> list[str]:
        scheme = "nbds" if self.tls else "nbd"
        uris = [f"{scheme}+unix:///{quote(export)}?socket={quote(self.unix, safe='/')}"]
        if self.tcp:
            uris.append(f"{scheme}://{self.tcp}/{quote(export)}")
        return uris


def parse_socket(text: str) -> Path:
    """The absolute path of a unix socket. Raises `UserError` for one that the kernel won't take."""
    path = Path(text).absolute()
    size = len(os.fsencode(path))
    if size > _PATH_MAX:
        raise UserError(
            f"the path of a unix socket has at most {_PATH_MAX} bytes, {path} has {size}:"
            " choose a shorter one with --unix or --state"
        )
    return path


def parse_address(text: str, default_port: int | None = None) -> Address:
    """Of "HOST:PORT" or "[IPV6]:PORT". Raises `UserError`."""
    match = _ADDRESS.fullmatch(text)
    port = int(match[2]) if match and match[2] else default_port
    if match is None or port is None or port > 65535:
        raise UserError(f"{text[:80]!r} is no address: write HOST:PORT, as in 127.0.0.1:10809")
    return Address(match[1].strip("[]"), port)
