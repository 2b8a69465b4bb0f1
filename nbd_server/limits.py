"""Bounds on everything that a client can make the server hold or do at a time.

Read by every module of the package. What a turn may do is bounded too: that is what keeps one
connection from starving the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbd_server.constants import MAX_PAYLOAD, MIN_BLOCK


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, counts and seconds."""

    #: Connections open at a time; one more is closed at once.
    connections: int = 1024
    #: From accept to the transmission phase.
    handshake_seconds: float = 10.0
    #: How long a client may sit on memory that others wait for without moving a byte.
    stall_seconds: float = 10.0
    #: Option data that is looked at; longer data is skipped and refused.
    option_bytes: int = 64 << 10
    #: Option data that is skipped at most; longer data ends the connection.
    skipped_option_bytes: int = 64 << 20
    #: Smallest unit that is advertised; who asks for it has promised to keep to it.
    minimum_block: int = MIN_BLOCK
    #: Longest READ and WRITE; a longer WRITE ends the connection.
    payload_bytes: int = MAX_PAYLOAD
    #: Payloads and replies of one connection in memory; above it the socket is not read.
    connection_bytes: int = 64 << 20
    #: The same for all connections together.
    server_bytes: int = 512 << 20
    #: Requests of one connection that wait for the export.
    connection_requests: int = 256
    #: Requests answered in one turn.
    batch_requests: int = 64
    #: Bytes read in one turn, and the longest request answered without leaving the loop.
    batch_bytes: int = 1 << 20
    #: Extents in one BLOCK_STATUS reply; enough for 128 MiB of alternating blocks.
    extents: int = 32768
