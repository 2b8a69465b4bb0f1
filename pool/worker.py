"""The worker process: runs stripe jobs for a daemon, `python -m pool.worker FD PARENT`.

It preads, encodes, writes and syncs on its own and hands back an `Outcome`. It decides nothing,
keeps nothing, and leaves when its socket closes or its parent dies; its descriptors share the
parent's locks, so that a successor waits until it has gone (R22).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pickle
import signal
import socket
import sys
from typing import Any

from backends.open import attach
from pool.mover import LENGTH, MAX_FDS, InlineMover

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve one parent until it goes."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent ends the worker by closing the socket, after the last job.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    with contextlib.suppress(ConnectionError):
        asyncio.run(_serve(connection))


async def _serve(connection: socket.socket) -> None:
    mover = InlineMover()
    while True:
        head, fds, _, _ = socket.recv_fds(connection, LENGTH.size, MAX_FDS)
        if len(head) < LENGTH.size:
            return
        size, _ = LENGTH.unpack(head)
        request = pickle.loads(_receive(connection, size))
        answer: object
        try:
            answer = await _answer(mover, request, list(fds))
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        message = pickle.dumps(answer, protocol=5)
        connection.sendall(LENGTH.pack(len(message), 0) + message)


def _receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise SystemExit(0)
        view = view[count:]
    return data


async def _answer(mover: InlineMover, request: tuple[Any, ...], fds: list[int]) -> object:
    match request:
        case ("add", index, spec, _, layout):
            await mover.add_member(index, attach(spec, fds), layout)
            return None
        case ("remove", index):
            await mover.release_member(index)
            return None
        case ("run", job):
            return await mover.run(job)
    raise ValueError(f"unknown request {request[0]!r}")


if __name__ == "__main__":
    main()
