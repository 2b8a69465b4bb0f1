"""Live connections on their way from a server to its successor, with SCM_RIGHTS.

A connection is handed over between two requests: what was taken from the socket has been answered,
and what has not is in `kept` and goes along. So each request is carried out exactly once, and a
client notices a pause and nothing else. Called by whoever starts and stops servers.

On the wire, for each connection: the length of a JSON object (4 bytes, big-endian, with the
connection's descriptor attached), the object, and the kept bytes; a length of zero is the end.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import Struct

_LENGTH = Struct(">I")
_HEADER_MAX = 64 << 10


@dataclass(frozen=True, slots=True)
class Handed:
    """A connection in its transmission phase, and what was negotiated on it."""

    sock: socket.socket
    peer: str
    export: str
    structured: bool
    extended: bool
    #: Metadata contexts by number.
    contexts: dict[int, str]
    alignment: int
    #: Received and not yet taken for requests.
    kept: bytes


def send(to: socket.socket, connections: Iterable[Handed]) -> None:
    """Hand all of them over and close them here. Blocks. Raises OSError."""
    for one in connections:
        body = {
            "peer": one.peer, "export": one.export, "structured": one.structured,
            "extended": one.extended, "contexts": list(one.contexts.items()),
            "alignment": one.alignment, "kept": len(one.kept),
        }  # fmt: skip
        header = json.dumps(body).encode()
        socket.send_fds(to, [_LENGTH.pack(len(header))], [one.sock.fileno()])
        to.sendall(header + one.kept)
        one.sock.close()
    to.sendall(_LENGTH.pack(0))


def receive(source: socket.socket) -> Iterator[Handed]:
    """All that `send` sends. Blocks. Raises OSError, ValueError for anything else."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(source, _LENGTH.size, 1)
        size = _LENGTH.unpack(data + _exactly(source, _LENGTH.size - len(data)))[0]
        if not size:
            return
        if not descriptors or size > _HEADER_MAX:
            raise ValueError("the predecessor sends no connections")
        sock = socket.socket(fileno=descriptors[0])
        body = json.loads(_exactly(source, size))
        kept = _exactly(source, body.pop("kept"))
        contexts = {int(number): str(name) for number, name in body.pop("contexts")}
        yield Handed(sock, contexts=contexts, kept=kept, **body)


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(size - len(parts))
        if not part:
            raise ConnectionResetError("the predecessor ended before it had handed all over")
        parts += part
    return bytes(parts)
