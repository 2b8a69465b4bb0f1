"""stripewell beside qemu-nbd and nbdkit: the same jobs, interleaved, in one run.

Absolute figures of a shared machine move by a factor of two between runs, so only ratios count.
In each round every job runs on every server, one after the other; a round gives one ratio per job
and peer, and the median over the rounds is reported. Before each job the backlog of the servers
and the page cache's dirty data are written back, so that nobody pays for another's writes.

Called by `bench.__main__`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import fio
from bench.jobs import JOBS, Job
from bench.processes import disk_written_bytes
from bench.report import Row
from bench.servers import VOLUME_BYTES, Nbdkit, QemuNbd, Server, Stripewell

#: A burst stays below this and below half the journal.
BURST_BYTES = 128 << 20
DRAIN_TIMEOUT = 300.0


@dataclass
class Samples:
    """Figures of one job on one server, one per round."""

    values: list[float] = field(default_factory=list)
    device_bytes_per_user_byte: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)


Table = dict[str, dict[str, Samples]]


def compare(
    folder: Path, rounds: int, seconds: float, say: Callable[[str], None], only: str = ""
) -> list[Row]:
    """Run the jobs whose name contains `only`; one row per job.

    Raises `FioFailed`, `CommandFailed`, `TimeoutError`.
    """
    jobs = [job for job in JOBS if only in job.name]
    servers: list[Server] = [
        Stripewell(folder / "stripewell"),
        QemuNbd(folder / "qemu-nbd"),
        Nbdkit(folder / "nbdkit"),
    ]
    samples: Table = {job.name: {server.name: Samples() for server in servers} for job in jobs}
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
            say(f"filling the volume of {server.name}")
            fio.run(server.uri, {"rw": "write", "bs": "1M", "iodepth": "8"})
        session = Session(folder, servers, seconds, samples)
        for number in range(1, rounds + 1):
            for job in jobs:
                say(f"round {number} of {rounds}: {job.name}")
                session.measure(job, number)
    return [_row(job, samples[job.name]) for job in jobs]


class Session:
    """The servers during a comparison."""

    def __init__(
        self, folder: Path, servers: Sequence[Server], seconds: float, samples: Table
    ) -> None:
        self._folder = folder
        self._servers = servers
        self._seconds = seconds
        self._samples = samples
        self._journal = next(
            server.journal_bytes() for server in servers if isinstance(server, Stripewell)
        )

    def measure(self, job: Job, number: int) -> None:
        """One job on every server.

        A sustained job starts with stripewell, whose duration the others take over; otherwise
        the order rotates from round to round.
        """
        shift = 0 if job.kind == "sustained" else number % len(self._servers)
        length = self._length(job)
        for server in (*self._servers[shift:], *self._servers[:shift]):
            settle(server)
            before = disk_written_bytes(self._folder)
            result = fio.run(server.uri, {"size": str(VOLUME_BYTES), **job.options, **length})
            extra = self._finish(job, server)
            self._record(job, server, result, extra)
            self._record_cost(job, server, result, before)
            if job.kind == "sustained" and isinstance(server, Stripewell):
                length = _timed(result.seconds + extra)

    def _length(self, job: Job) -> dict[str, str]:
        if job.kind == "burst":
            return {"io_size": str(min(BURST_BYTES, self._journal // 2))}
        if job.kind == "sustained":
            return {"io_size": str(4 * self._journal)}
        return _timed(self._seconds)

    def _finish(self, job: Job, server: Server) -> float:
        """Seconds from fio's end until everything is where it belongs, where that counts."""
        if job.kind != "sustained":
            return 0.0
        return fio.flush(server.uri) + drain(server)

    def _record(self, job: Job, server: Server, result: fio.Result, extra: float) -> None:
        seconds = result.seconds + extra
        amount = result.operations if job.unit == "IOPS" else result.bytes / (1 << 20)
        sample = self._samples[job.name][server.name]
        sample.values.append(amount / seconds)
        if 99.0 in result.write_latency:
            sample.p99_ms.append(result.write_latency[99.0] * 1000)

    def _record_cost(
        self, job: Job, server: Server, result: fio.Result, before: int | None
    ) -> None:
        """What the disk wrote for a sustained job, once the kernel has nothing left to write."""
        if job.kind != "sustained" or before is None:
            return
        os.sync()
        written = (disk_written_bytes(self._folder) or before) - before
        sample = self._samples[job.name][server.name]
        sample.device_bytes_per_user_byte.append(written / result.bytes)


def _timed(seconds: float) -> dict[str, str]:
    return {"time_based": "1", "runtime": f"{max(1, round(seconds))}s"}


def settle(server: Server) -> None:
    """Let a server finish what it owes, and the kernel too."""
    drain(server)
    os.sync()


def drain(server: Server) -> float:
    """Wait until the backlog stops falling; seconds until it last fell. Raises `TimeoutError`."""
    started = fell = time.monotonic()
    lowest = server.backlog()
    while lowest:
        now = time.monotonic()
        if now - fell > 1.0:
            break
        if now - started > DRAIN_TIMEOUT:
            raise TimeoutError(f"{server.name} still drains after {DRAIN_TIMEOUT:.0f} s")
        time.sleep(0.1)
        left = server.backlog() or 0
        if left < lowest:
            lowest, fell = left, time.monotonic()
    return fell - started


def _row(job: Job, samples: dict[str, Samples]) -> Row:
    ours = samples[Stripewell.name]
    return Row(
        job=job.name,
        unit=job.unit,
        values={name: median(sample.values) for name, sample in samples.items()},
        rounds={name: sample.values for name, sample in samples.items()},
        ratios={
            name: median(a / b for a, b in zip(ours.values, sample.values, strict=True))
            for name, sample in samples.items()
            if name != Stripewell.name
        },
        goal=job.goal,
        device_bytes_per_user_byte={
            name: median(sample.device_bytes_per_user_byte)
            for name, sample in samples.items()
            if sample.device_bytes_per_user_byte
        },
        write_p99_ms={
            name: median(sample.p99_ms) for name, sample in samples.items() if sample.p99_ms
        },
    )
