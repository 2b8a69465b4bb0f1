"""Four clients in processes of their own, and the judgement of what they left behind.

with Clients(4, seed) as clients:
    clients.start(Work(socket, "vm1"))
    ...                                  # kill the daemon, or not
    life = clients.finish()              # merged logs
    life.tell(oracle, "vm1")             # for tests.sim.oracle
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from random import Random
from types import TracebackType

import nbd

from tests.crash.writer import BLOCK_SECTORS, Log, Request, Work, main
from tests.sim.oracle import SECTOR, Op, Oracle, identify, stamp

SECONDS = 60
CHUNK = 8 << 20
#: The oracle's times are microseconds since this: small enough to be told apart as floats.
EPOCH = time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class Life:
    """What all clients did between two moments at which none was active."""

    logs: Sequence[Log]

    def then(self, other: Life) -> Life:
        """This and another one as one life."""
        return Life([*self.logs, *other.logs])

    @property
    def requests(self) -> list[Request]:
        return [request for log in self.logs for request in log.requests]

    @property
    def errors(self) -> list[str]:
        return [error for log in self.logs for error in log.errors]

    @property
    def acknowledged(self) -> list[Request]:
        return [request for request in self.requests if request.acked is not None]

    @property
    def acknowledged_sectors(self) -> int:
        return sum(r.end - r.first for r in self.acknowledged if not r.zero)

    def unflushed(self) -> int:
        """Acknowledged requests that no flush of any client covers."""
        covered = max((issued for log in self.logs for issued, _ in log.flushes), default=0)
        return sum(r.acked > covered and not r.fua for r in self.acknowledged if r.acked)

    def tell(self, oracle: Oracle, volume: str) -> None:
        """Add these requests to what the oracle knows of a volume."""
        covered = max((issued for log in self.logs for issued, _ in log.flushes), default=0)
        for request in self.requests:
            issued = _moment(request.issued)
            op = Op(request.id, request.first, request.end, request.zero, issued)
            if request.acked is not None:
                op.acked = _moment(request.acked)
                op.flushed = request.fua or request.acked < covered
            oracle.volumes[volume].ops.append(op)


def _moment(nanoseconds: int) -> float:
    return (nanoseconds - EPOCH) / 1000


def judge(oracle: Oracle, volume: str, data: bytes) -> None:
    """Compare a volume at rest with all that was acknowledged (P1), exactly, and pin what is there.

    A sector may show a write, answered or not, unless another write to it was acknowledged that had
    begun after this one's answer. Raises `Violation`.
    """
    oracle.check_read(volume, 0, data, begun=sys.maxsize)
    pin(oracle, volume, data)


def pin(oracle: Oracle, volume: str, data: bytes) -> None:
    """From now on the volume holds this, whatever was in doubt."""
    history = oracle.volumes[volume]
    history.base = identify(data, 0)
    history.ops.clear()


def read_volume(socket: str, export: str) -> bytes:
    """All of a volume, over a connection of its own."""
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(socket)
    size = client.get_size()
    parts = [client.pread(min(CHUNK, size - at), at) for at in range(0, size, CHUNK)]
    client.shutdown()
    return b"".join(parts)


def write_and_flush(socket: str, export: str, rng: Random) -> Life:
    """Some writes and a flush, from this process; the caller ends the server at once."""
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(socket)
    sectors = client.get_size() // SECTOR
    log = Log()
    for _ in range(8):
        first = rng.randrange(sectors - BLOCK_SECTORS)
        issued = time.monotonic_ns()
        request = Request(issued, first, first + BLOCK_SECTORS, False, False, issued)
        log.requests.append(request)
        client.pwrite(stamp(request.id, first, request.end), first * SECTOR)
        request.acked = time.monotonic_ns()
    issued = time.monotonic_ns()
    client.flush()
    log.flushes.append((issued, time.monotonic_ns()))
    return Life([log])


class Clients:
    """Processes that wait for work; see the module."""

    def __init__(self, count: int, seed: int) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        context = multiprocessing.get_context("spawn")
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=main, args=(theirs, number, seed), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.terminate()
        for pipe in self._pipes:
            if kind is None:
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(SECONDS)

    def start(self, work: Work) -> None:
        """Begin a life in every client."""
        for pipe in self._pipes:
            pipe.send(work)

    def finish(self) -> Life:
        """End the life, which is over already if the server died."""
        for pipe in self._pipes:
            pipe.send("stop")
        logs = []
        for pipe in self._pipes:
            assert pipe.poll(SECONDS), "a client got no answer"
            logs.append(pipe.recv())
        return Life(logs)
