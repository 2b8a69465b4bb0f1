"""Runs fio's nbd engine against a URI and reads its report; single requests through qemu-io.

fio 3.33's engine sends FLUSH for `fsync=1`; with `fdatasync=1` it sends nothing and ends early,
so that option is refused here. Called by every measurement.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class FioFailed(Exception):
    """fio could not run the job or met an error."""


@dataclass(frozen=True)
class Result:
    """Sums over reads and writes of all connections of one run."""

    operations: int
    bytes: int
    seconds: float
    #: Completion latency of writes in seconds by percentile, e.g. 99.99; empty without writes.
    write_latency: dict[float, float]
    write_latency_max: float

    @property
    def iops(self) -> float:
        return self.operations / self.seconds

    @property
    def mib_per_second(self) -> float:
        return self.bytes / self.seconds / (1 << 20)


def run(uri: str, options: Mapping[str, str], timeout: float = 600) -> Result:
    """Run one job. Raises `FioFailed`."""
    if "fdatasync" in options:
        raise FioFailed("fio's nbd engine ignores fdatasync: use fsync")
    fixed = {"name": "job", "ioengine": "nbd", "uri": uri, "randrepeat": "0", "norandommap": "1"}
    fixed |= {"output-format": "json", "percentile_list": "50:99:99.9:99.99"}
    command = ["fio", *(f"--{key}={value}" for key, value in {**fixed, **options}.items())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise FioFailed(f"fio did not end in {timeout:.0f} s: {' '.join(command)}") from None
    start = done.stdout.find("\n{") + 1  # the engine greets on standard output first
    try:
        report = json.loads(done.stdout[start:])
    except ValueError:
        raise FioFailed(f"fio: {(done.stderr or done.stdout).strip()[-500:]}") from None
    jobs = report["jobs"]
    if done.returncode != 0 or any(job["error"] for job in jobs):
        raise FioFailed(f"fio met an error: {done.stderr.strip()[-500:]}")
    return _result(jobs)


def _result(jobs: list[dict[str, Any]]) -> Result:
    sides = [job[side] for job in jobs for side in ("read", "write")]
    writes = [job["write"]["clat_ns"] for job in jobs if job["write"]["total_ios"]]
    percentiles: dict[float, float] = {}
    for latency in writes:
        for key, value in latency.get("percentile", {}).items():
            percentiles[float(key)] = max(percentiles.get(float(key), 0.0), value / 1e9)
    return Result(
        operations=sum(side["total_ios"] for side in sides),
        bytes=sum(side["io_bytes"] for side in sides),
        seconds=max(side["runtime"] for side in sides) / 1000 or 0.001,
        write_latency=percentiles,
        write_latency_max=max((latency["max"] / 1e9 for latency in writes), default=0.0),
    )


def flush(uri: str, timeout: float = 600) -> float:
    """Send one FLUSH; seconds until it was answered. Raises `FioFailed`."""
    started = time.monotonic()
    _qemu_io(uri, "flush", timeout)
    return time.monotonic() - started


def first_read(uri: str, timeout: float = 60) -> None:
    """Read the first block. Raises `FioFailed`."""
    _qemu_io(uri, "read 0 4096", timeout)


def _qemu_io(uri: str, command: str, timeout: float) -> None:
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", command, uri],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise FioFailed(f"qemu-io: {(done.stderr or done.stdout).strip()[-500:]}")
