"""What is measured: one table. `compare` runs it, bench/README.md explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timed", "burst", "sustained"]


@dataclass(frozen=True)
class Job:
    """One fio job and the goals against qemu-nbd.

    `kind`: "timed" runs for the round's seconds. "burst" writes less than the journal holds.
    "sustained" writes several times the journal and counts until the last byte is in its final
    place; the peers then write for as long, and their closing flush counts too.
    """

    name: str
    unit: Literal["IOPS", "MiB/s"]
    options: dict[str, str]
    kind: Kind = "timed"
    #: The ratio to qemu-nbd that is aimed at, if one is.
    goal: float | None = None


def _fio(rw: str, block: str, depth: int, **more: str) -> dict[str, str]:
    return {"rw": rw, "bs": block, "iodepth": str(depth), **more}


JOBS = (
    Job("randread 4k QD32", "IOPS", _fio("randread", "4k", 32), goal=2.0),
    Job("randread 4k QD1", "IOPS", _fio("randread", "4k", 1)),
    Job("read 1M QD8", "MiB/s", _fio("read", "1M", 8), goal=0.6),
    Job("randwrite 4k QD32, burst", "IOPS", _fio("randwrite", "4k", 32), "burst", goal=2.0),
    Job("randwrite 4k QD32, sustained", "IOPS", _fio("randwrite", "4k", 32), "sustained", goal=1.0),
    Job("randrw 70/30 4k QD32", "IOPS", _fio("randrw", "4k", 32, rwmixread="70")),
    Job("write 1M QD8", "MiB/s", _fio("write", "1M", 8), goal=0.4),
    Job("write 4k + flush QD1", "IOPS", _fio("randwrite", "4k", 1, fsync="1"), goal=0.4),
    Job(
        "write 4k + flush, 16 connections",
        "IOPS",
        _fio("randwrite", "4k", 1, fsync="1", numjobs="16", group_reporting="1"),
    ),
)
