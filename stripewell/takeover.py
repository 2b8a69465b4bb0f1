"""A planned restart or upgrade: the next daemon takes the live connections of the one that serves.

The successor listens on a socket of its own and tells its path to the predecessor, which finishes
the requests in flight, closes the pool, sends its connections there (`nbd_server.handover`) and
ends. Until the successor has opened the pool, what clients send waits in their sockets.

If the successor dies, or cannot open the pool, the connections end with it, and clients that can
reconnect. Called by `daemon` on both sides.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nbd_server.handover import Handed, receive, send
from stripewell.control import ControlClient
from stripewell.controller import HAND_OVER
from stripewell.errors import UserError, one_line
from stripewell.state import PoolRecord, State

#: How long a predecessor may take: requests in flight, a checkpoint, closing the devices.
TAKEOVER_SECONDS = 120.0


async def take(state: State, record: PoolRecord) -> list[Handed]:
    """The connections of the daemon that serves the pool, which has ended then; none if nobody
    serves it. Raises `UserError`."""
    client = await ControlClient.connect(state.control_socket(record.name))
    if client is None:
        return []
    with _listener(state) as (listener, path):
        try:
            await client.call(HAND_OVER, {"path": str(path)})
        finally:
            await client.close()
        try:
            return await asyncio.to_thread(_receive, listener)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the daemon that serves {record.name} did not hand over: {one_line(error)}; start"
                " again without --take-over once it has ended"
            ) from None


def give(path: str, connections: Sequence[Handed]) -> None:
    """Send connections to a successor. Blocks. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        to.settimeout(TAKEOVER_SECONDS)
        to.connect(path)
        send(to, connections)


@contextmanager
def _listener(state: State) -> Iterator[tuple[socket.socket, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="next-", dir=state.control_socket("x").parent))
    path = directory / "s"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(os.fspath(path))
            listener.listen(1)
            yield listener, path
    finally:
        path.unlink(missing_ok=True)
        directory.rmdir()


def _receive(listener: socket.socket) -> list[Handed]:
    listener.settimeout(TAKEOVER_SECONDS)
    source, _ = listener.accept()
    with source:
        source.settimeout(TAKEOVER_SECONDS)
        return list(receive(source))
