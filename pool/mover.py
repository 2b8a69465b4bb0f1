"""Where stripe jobs run: in the engine's own loop, or in a worker process that has the other core.

The engine knows only `Mover`. The worker inherits the members' locked file descriptors: as long as
it lives, no other daemon can take the devices, so a daemon that was killed cannot be overtaken by a
stripe that its worker still writes (R22).
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
import subprocess
import sys
from typing import Protocol

from backends.base import Device, ObjectStore
from pool.errors import PoolStopped
from pool.format.geometry import Layout
from pool.shards import shards_of
from pool.stripe_writer import Job, Outcome, Target, run

LENGTH = struct.Struct("<QI")  # message bytes, file descriptors that come with it
MAX_FDS = 16


class Mover(Protocol):
    """Runs stripe jobs."""

    async def add_member(self, index: int, backend: Device | ObjectStore, layout: Layout) -> None:
        """Make a member known, before a job names it."""

    async def remove_member(self, index: int) -> None:
        """Forget a member."""

    async def run(self, job: Job) -> Outcome:
        """Write the stripes of a job. Raises PoolStopped if the mover itself died."""

    async def close(self) -> None:
        """End it."""


class InlineMover:
    """Runs jobs in the caller's loop: for the simulation, and for commands without a daemon."""

    def __init__(self) -> None:
        self._members: dict[int, Target] = {}

    async def add_member(self, index: int, backend: Device | ObjectStore, layout: Layout) -> None:
        self._members[index] = Target(backend, shards_of(backend, layout))

    async def remove_member(self, index: int) -> None:
        self._members.pop(index, None)

    async def release_member(self, index: int) -> None:
        """Forget a member whose backend belongs to this process alone, and with it the lock."""
        target = self._members.pop(index, None)
        if target is not None:
            await target.backend.close()

    async def run(self, job: Job) -> Outcome:
        return await run(job, self._members)

    async def close(self) -> None:
        self._members.clear()


class ProcessMover:
    """Runs jobs in `python -m pool.worker`, over a socket pair, one at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pool.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def add_member(self, index: int, backend: Device | ObjectStore, layout: Layout) -> None:
        spec, fds = backend.worker_spec()  # type: ignore[union-attr]
        await self._call(("add", index, spec, len(fds), layout), fds)

    async def remove_member(self, index: int) -> None:
        await self._call(("remove", index), [])

    async def run(self, job: Job) -> Outcome:
        outcome = await self._call(("run", job), [])
        assert isinstance(outcome, Outcome)
        return outcome

    async def _call(self, request: tuple[object, ...], fds: list[int]) -> object:
        async with self._lock:
            try:
                return await self._exchange(request, fds)
            except (OSError, EOFError) as error:
                raise PoolStopped(
                    f"the worker process died ({error}): restart the daemon"
                ) from None

    async def _exchange(self, request: tuple[object, ...], fds: list[int]) -> object:
        loop = asyncio.get_running_loop()
        message = pickle.dumps(request, protocol=5)
        head = LENGTH.pack(len(message), len(fds))
        if fds:
            # A head is far smaller than a socket buffer that is empty between calls: it never
            # splits.
            socket.send_fds(self._socket, [head], fds)
        else:
            await loop.sock_sendall(self._socket, head)
        await loop.sock_sendall(self._socket, message)
        size, _ = LENGTH.unpack(await self._receive(LENGTH.size))
        answer = pickle.loads(await self._receive(size))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _receive(self, size: int) -> bytearray:
        loop = asyncio.get_running_loop()
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = await loop.sock_recv_into(self._socket, view)
            if not count:
                raise EOFError("connection closed")
            view = view[count:]
        return data

    async def close(self) -> None:
        """End the worker: it leaves when its socket closes."""
        self._socket.close()
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.run_in_executor(None, self._process.wait), 10)
        except TimeoutError:
            self._process.kill()
            self._process.wait()
