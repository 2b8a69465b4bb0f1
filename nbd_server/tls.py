"""TLS for NBD: what a server asks for, and a socket that encrypts.

`TlsSocket` has the calls of a non-blocking socket that `session` and `outbox` use; whatever TLS has
to wait for is a `BlockingIOError`. Bytes that it has decrypted and not given out are `pending`: no
event announces them.

Keys are X.509 certificates. Pre-shared keys need a Python newer than the oldest we run on: `ssl`
has them from 3.13 on.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbd_server.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server uses TLS. Without one STARTTLS is unknown to it."""

    context: ssl.SSLContext
    #: Nothing but STARTTLS is answered before there is TLS.
    required: bool
    #: Whether the subject of a client's certificate (None without one) may see an export.
    permits: Callable[[str | None, str], bool] = lambda subject, export: True


class TlsSocket:
    """The server's side of a TLS connection over a non-blocking socket."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """Takes over `sock`, which must not be used any more. `handshake` comes first."""
        self.family = sock.family
        #: Whether the handshake is over.
        self.established = False
        self._tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def handshake(self) -> bool:
        """Go on with the TLS handshake; whether it is the client's turn (True) or the socket must
        become writable (False). Done when it raises nothing and `established` says so.

        Raises ProtocolError."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError) as error:
            raise ProtocolError(f"no TLS: {_reason(error)}") from None
        self.established = True
        return True

    @property
    def subject(self) -> str | None:
        """The common name of the client's verified certificate."""
        certificate: dict[str, Any] = self._tls.getpeercert() or {}
        for part in certificate.get("subject", ()):
            for name, value in part:
                if name == "commonName":
                    return str(value)
        return None

    @property
    def pending(self) -> bool:
        """Whether bytes wait that no event will announce."""
        return self._tls.pending() > 0

    def fileno(self) -> int:
        return self._tls.fileno()

    def recv_into(self, into: memoryview) -> int:
        """As of a socket; 0 when the client has ended the connection."""
        size = 0
        while size < len(into):
            try:
                received = self._tls.recv_into(into[size:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if size:
                    break
                raise BlockingIOError from None
            if not received:
                # What came before it is handled first; then this is found again.
                break
            size += received
        return size

    def send(self, data: memoryview) -> int:
        """As of a socket. What blocks must be sent again from the same byte on."""
        size = 0
        while size < len(data):
            try:
                size += self._tls.send(data[size:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if size:
                    break
                raise BlockingIOError from None
        return size

    def sendmsg(self, parts: list[memoryview]) -> int:
        """As of a socket, which may take less than all of it."""
        return self.send(parts[0])

    def close(self) -> None:
        """Say that this was the end, without waiting for the client's word."""
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        self._tls.close()


#: What a session talks over.
Stream = socket.socket | TlsSocket


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error).replace("_", " ").lower()
