"""A client in a process of its own: writes with many requests in flight, and logs what it saw.

Every write stamps its number into each sector, so what is read later says who wrote it. A life
lasts from a connection to its end: told to stop, the client waits for its answers; when the server
dies, what was not answered stays so in the log. Times are nanoseconds of the system's monotonic
clock: taken before a request is handed to libnbd and after its answer came, they bracket the moment
at which it took effect, and they compare between processes. Started by `clients`.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from random import Random

import nbd

from tests.sim.oracle import SECTOR, stamp

BLOCK_SECTORS = 8
#: The largest write, in sectors: 128 KiB.
LARGEST = 256
POLL_MS = 1000


@dataclass(slots=True)
class Request:
    """A write, or with `zero` a trim or write of zeros, of sectors `first` to `end`."""

    id: int
    first: int
    end: int
    zero: bool
    fua: bool
    issued: int
    acked: int | None = None


@dataclass(slots=True)
class Log:
    """What one client did in one life."""

    requests: list[Request] = field(default_factory=list)
    #: Issue and answer of every flush that was answered.
    flushes: list[tuple[int, int]] = field(default_factory=list)
    #: What the server answered with an error while it lived; there should be none.
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Work:
    """What to do in a life: where, how much at once, and how often to flush (every n-th)."""

    socket: str
    export: str
    depth: int = 16
    flush_every: int = 200
    #: Zero whole blocks only: zeros over parts of blocks are several changes, which a power failure
    #: may part.
    whole_zeros: bool = False


def main(pipe: Connection, number: int, seed: int) -> None:
    """Live one life per `Work` that comes through the pipe; None ends the process."""
    writer = Writer(pipe, number, Random(f"{seed}/{number}"))
    while (work := pipe.recv()) is not None:
        pipe.send(writer.live(work))


class Writer:
    """One client. Its requests are numbered through all its lives."""

    def __init__(self, pipe: Connection, number: int, rng: Random) -> None:
        self._pipe = pipe
        self._rng = rng
        self._next = (number + 1) << 32
        self._log = Log()
        self._pending = 0
        self._told = False

    def live(self, work: Work) -> Log:
        """Write until the parent says stop or the server dies."""
        self._log, self._pending = Log(), 0
        self._told = False
        client = nbd.NBD()
        client.set_export_name(work.export)
        try:
            client.connect_unix(work.socket)
            sectors = client.get_size() // SECTOR
            while not self._pipe.poll():
                while self._pending < work.depth:
                    self._issue(client, work, sectors)
                client.poll(POLL_MS)
            self._hear()
            while self._pending:
                client.poll(POLL_MS)
            client.shutdown()
        except nbd.Error:
            self._bury(client)
        return self._log

    def _bury(self, client: nbd.NBD) -> None:
        """The connection is over. By the death of the server, or something is wrong."""
        if not (client.aio_is_dead() or client.aio_is_closed()):
            self._log.errors.append("libnbd refused a request")
        # The parent may have said stop just before.
        if not self._told:
            self._hear()

    def _hear(self) -> None:
        """Wait for the parent's word to stop."""
        self._pipe.recv()
        self._told = True

    def _issue(self, client: nbd.NBD, work: Work, sectors: int) -> None:
        if self._rng.randrange(work.flush_every) == 0:
            issued = time.monotonic_ns()
            client.aio_flush(lambda error: self._flushed(error, issued))
        else:
            self._change(client, work, sectors)
        self._pending += 1

    def _change(self, client: nbd.NBD, work: Work, sectors: int) -> None:
        """Write, now and then trim or zero, somewhere. Half of it goes to a sixteenth of the
        volume, so that clients meet."""
        rng = self._rng
        count = min(LARGEST, 1 << rng.randrange(9)) + rng.choice((0, 0, 0, rng.randrange(8)))
        count = min(count, LARGEST)
        room = sectors if rng.random() < 0.5 else max(sectors // 16, 2 * LARGEST)
        first = rng.randrange(room - count)
        kind = rng.random()
        if kind < 0.04 or (kind < 0.06 and work.whole_zeros) or rng.random() < 0.5:
            # A trim forgets whole blocks only; and guests write whole blocks most of the time.
            first -= first % BLOCK_SECTORS
            count = max(BLOCK_SECTORS, count - count % BLOCK_SECTORS)
        zero, fua = kind < 0.06, kind > 0.99
        request = Request(self._next, first, first + count, zero, fua, 0)
        self._next += 1
        self._log.requests.append(request)
        at, size = first * SECTOR, count * SECTOR
        flags = nbd.CMD_FLAG_FUA if fua else 0

        def done(error: nbd.MutableInt) -> int:
            return self._answered(error, request)

        data = b"" if zero else stamp(request.id, first, first + count)
        request.issued = time.monotonic_ns()
        if not zero:
            client.aio_pwrite(nbd.Buffer.from_bytearray(data), at, done, flags)
        elif kind < 0.04:
            client.aio_trim(size, at, done, flags)
        else:
            client.aio_zero(size, at, done, flags | rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))

    def _answered(self, error: nbd.MutableInt, request: Request) -> int:
        if self._over(error):
            request.acked = time.monotonic_ns()
        return 1

    def _flushed(self, error: nbd.MutableInt, issued: int) -> int:
        if self._over(error):
            self._log.flushes.append((issued, time.monotonic_ns()))
        return 1

    def _over(self, error: nbd.MutableInt) -> bool:
        """True for success. What the end of the connection leaves unanswered is no error."""
        self._pending -= 1
        if error.value not in (0, errno.ENOTCONN):
            self._log.errors.append(errno.errorcode.get(error.value, str(error.value)))
        return bool(error.value == 0)
