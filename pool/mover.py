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
from collections.abc import Sequence
from typing import ClassVar, Protocol

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
    """Runs jobs in `python -m pool.worker`, over a socket pair. Jobs may overlap: while one waits
    for its syncs, the next is read and encoded."""

    #: What the worker is, before its arguments.
    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "pool.worker")

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [*self.command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._calls = 0
        self._answers: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def add_member(self, index: int, backend: Device | ObjectStore, layout: Layout) -> None:
        spec, fds = backend.worker_spec()
        await self._call(("add", index, spec, layout), fds)

    async def remove_member(self, index: int) -> None:
        await self._call(("remove", index), [])

    async def run(self, job: Job) -> Outcome:
        outcome = await self._call(("run", job), [])
        assert isinstance(outcome, Outcome)
        return outcome

    async def _call(self, request: tuple[object, ...], fds: list[int]) -> object:
        if self._answers is None:
            self._answers = asyncio.get_running_loop().create_task(self._take_answers())
        self._calls += 1
        number = self._calls
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with self._sending:
                await self._send(pickle.dumps((number, request), protocol=5), fds)
            return await answer
        except (OSError, EOFError) as error:
            if isinstance(error, PoolStopped):
                raise
            raise _died(error) from None
        finally:
            self._waiting.pop(number, None)

    async def _send(self, message: bytes, fds: list[int]) -> None:
        loop = asyncio.get_running_loop()
        head = LENGTH.pack(len(message), len(fds))
        while fds:
            try:
                # Far smaller than a socket buffer: it goes whole or not at all.
                socket.send_fds(self._socket, [head], fds)
                break
            except BlockingIOError:
                await asyncio.sleep(0.01)
        else:
            await loop.sock_sendall(self._socket, head)
        await loop.sock_sendall(self._socket, message)

    async def _take_answers(self) -> None:
        """Hand each answer to its caller, until the worker is gone."""
        try:
            while True:
                size, _ = LENGTH.unpack(await self._receive(LENGTH.size))
                number, answer = pickle.loads(await self._receive(size))
                waiter = self._waiting.get(number)
                if waiter is None or waiter.done():
                    continue
                if isinstance(answer, BaseException):
                    waiter.set_exception(answer)
                else:
                    waiter.set_result(answer)
        except (OSError, EOFError) as error:
            for waiter in self._waiting.values():
                if not waiter.done():
                    waiter.set_exception(_died(error))

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
        if self._answers is not None:
            self._answers.cancel()
            await asyncio.gather(self._answers, return_exceptions=True)
        self._socket.close()
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.run_in_executor(None, self._process.wait), 10)
        except TimeoutError:
            self._process.kill()
            self._process.wait()


def _died(error: BaseException) -> PoolStopped:
    return PoolStopped(f"the worker process died ({error}): restart the daemon")
