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
import threading
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
    asyncio.run(_serve(socket.socket(fileno=fd)))


async def _serve(connection: socket.socket) -> None:
    """Answer requests as they come; a thread receives them, so that descriptors can come along."""
    loop = asyncio.get_running_loop()
    mover = InlineMover()
    gone = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def take(number: int, request: tuple[Any, ...], fds: list[int]) -> None:
        task = loop.create_task(_handle(connection, mover, number, request, fds))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def receive() -> None:
        with contextlib.suppress(ConnectionError, EOFError):
            while True:
                loop.call_soon_threadsafe(take, *_receive_request(connection))
        loop.call_soon_threadsafe(gone.set)

    threading.Thread(target=receive, daemon=True).start()
    await gone.wait()
    # The parent waits for its jobs before it closes; what is left has nobody who wants it.
    os._exit(0)


def _receive_request(connection: socket.socket) -> tuple[int, tuple[Any, ...], list[int]]:
    head, fds, _, _ = socket.recv_fds(connection, LENGTH.size, MAX_FDS, socket.MSG_WAITALL)
    if len(head) < LENGTH.size:
        raise EOFError
    size, _ = LENGTH.unpack(head)
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    number, request = pickle.loads(data)
    return number, request, list(fds)


async def _handle(
    connection: socket.socket,
    mover: InlineMover,
    number: int,
    request: tuple[Any, ...],
    fds: list[int],
) -> None:
    answer: object
    try:
        answer = await _answer(mover, request, fds)
    except Exception as error:
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    message = pickle.dumps((number, answer), protocol=5)
    with contextlib.suppress(ConnectionError):
        # Answers are small; the parent always reads them.
        connection.sendall(LENGTH.pack(len(message), 0) + message)


async def _answer(mover: InlineMover, request: tuple[Any, ...], fds: list[int]) -> object:
    match request:
        case ("add", index, spec, layout):
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
