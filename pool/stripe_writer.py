"""Writes stripes: gathers blocks, encodes, writes shards, syncs. What every mover asks for.

A `Job` says exactly what to write where; nothing is decided here. The same coroutine runs in the
worker process and, in the simulation, in the engine's own loop. A stripe counts only once `Outcome`
names it as written: all its stored shards are synced.

Every source block is verified against the checksum that the map has for it (R13); one that fails is
reported, and the engine supplies it from elsewhere.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from backends.base import BLOCK_SIZE, Buffer, Device, DeviceError, DeviceFull, ObjectStore
from pool.checksum import block_crcs
from pool.erasure import codec
from pool.failpoints import reached
from pool.format import stripe as stripe_format
from pool.format.geometry import Geometry
from pool.format.stripe import Contents
from pool.overdue import READ_SECONDS, WRITE_SECONDS, answer
from pool.shards import Shards
from pool.table import NOWHERE

#: Idle buffers of one size that are kept: fresh memory costs as much as copying into it.
SPARE_BUFFERS = 8


class JournalSource(NamedTuple):
    """`blocks` blocks at a byte offset of a member's device, for block `at` of the stripe."""

    member: int
    offset: int
    at: int
    blocks: int


class ShardSource(NamedTuple):
    """`blocks` blocks of a stored shard, from byte `offset` behind the start of its header."""

    member: int
    stripe: int
    shard: int
    slot: int
    offset: int
    at: int
    blocks: int


@dataclass(slots=True)
class StripeJob:
    """One stripe to write. Arrays have an entry per data block, unused ones layer 0."""

    stripe: int
    kind: int
    shape: Geometry
    places: tuple[tuple[int, int], ...]
    used: int
    layers: npt.NDArray[np.uint32]
    blocks: npt.NDArray[np.uint64]
    versions: npt.NDArray[np.uint64]
    crcs: npt.NDArray[np.uint32]
    sources: list[JournalSource | ShardSource] = field(default_factory=list)
    #: Bytes that come with the job: (block of the stripe, data).
    inline: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """Stripes to write and sync together."""

    pool: bytes
    stripes: list[StripeJob]


@dataclass(slots=True)
class Outcome:
    """What became of a job."""

    written: list[int] = field(default_factory=list)
    #: Source blocks that could not be read or verified: (stripe, block of the stripe).
    bad: list[tuple[int, int]] = field(default_factory=list)
    #: Members that failed: index → (message, is it only full).
    failed: dict[int, tuple[str, bool]] = field(default_factory=dict)
    #: Bytes handed to each member.
    bytes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """A member as a writer of stripes sees it."""

    backend: Device | ObjectStore
    shards: Shards


class _Spare:
    """Buffers between two uses, by size."""

    def __init__(self) -> None:
        self._idle: dict[int, list[memoryview]] = {}

    def take(self, size: int) -> memoryview:
        """A buffer with any content."""
        idle = self._idle.get(size)
        return idle.pop() if idle else memoryview(bytearray(size))

    def give(self, *buffers: memoryview) -> None:
        """Take back buffers that nobody uses any more."""
        for buffer in buffers:
            idle = self._idle.setdefault(len(buffer), [])
            if len(idle) < SPARE_BUFFERS:
                idle.append(buffer)


_spare = _Spare()


async def run(job: Job, members: Mapping[int, Target]) -> Outcome:
    """Write the stripes of a job. Raises nothing but bugs; device errors are in the outcome."""
    outcome = Outcome()
    touched: dict[int, set[int]] = {}
    for stripe in job.stripes:
        data = _spare.take(stripe.shape.blocks * BLOCK_SIZE)
        parity = [_spare.take(stripe.shape.shard_bytes) for _ in range(stripe.shape.parity)]
        if await _gather(stripe, data, members, outcome):
            await _write(job.pool, stripe, data, parity, members, outcome, touched)
        if not outcome.failed:
            # A write that was left behind may still read its buffer.
            _spare.give(data, *parity)
    reached("stripe_after_shards_before_sync")
    await asyncio.gather(*(_sync(member, members, outcome) for member in touched))
    reached("stripe_after_sync_before_outcome")
    for stripe in job.stripes:
        wrote = touched_by(stripe.stripe, touched)
        if wrote and not wrote & outcome.failed.keys():
            outcome.written.append(stripe.stripe)
    return outcome


def touched_by(stripe: int, touched: Mapping[int, set[int]]) -> set[int]:
    """Members to which shards of a stripe were written."""
    return {member for member, stripes in touched.items() if stripe in stripes}


def _target(member: int, members: Mapping[int, Target]) -> Target:
    """A member to write to. Raises DeviceError if it was expelled after the job was planned."""
    target = members.get(member)
    if target is None:
        raise DeviceError(errno.ENODEV, f"device {member} has left the pool")
    return target


async def _sync(member: int, members: Mapping[int, Target], outcome: Outcome) -> None:
    try:
        shards = _target(member, members).shards
        await answer(shards.sync(), WRITE_SECONDS, f"device {member}")
    except DeviceError as error:
        outcome.failed[member] = (str(error), False)


async def _gather(
    job: StripeJob, data: memoryview, members: Mapping[int, Target], outcome: Outcome
) -> bool:
    """Fill `data` with the stripe's blocks, verified. False if some could not be had."""
    data[job.used * BLOCK_SIZE :] = bytes(len(data) - job.used * BLOCK_SIZE)
    for at, content in job.inline:
        data[at * BLOCK_SIZE : at * BLOCK_SIZE + len(content)] = content
    bad: set[int] = set()
    for source in job.sources:
        start = source.at * BLOCK_SIZE
        view = data[start : start + source.blocks * BLOCK_SIZE]
        if not (_try_read(source, view, members) or await _read(source, view, members)):
            bad.update(range(source.at, source.at + source.blocks))
    found = block_crcs(data[: job.used * BLOCK_SIZE])
    expected = job.crcs[: job.used].tolist()
    if found != expected:
        bad.update(i for i, crc in enumerate(found) if crc != expected[i])
    outcome.bad.extend((job.stripe, at) for at in sorted(bad))
    return not bad


def _try_read(
    source: JournalSource | ShardSource, view: memoryview, members: Mapping[int, Target]
) -> bool:
    target = members.get(source.member)
    if target is None:
        return False
    try:
        if isinstance(source, JournalSource):
            return target.backend.try_read(source.offset, view)  # type: ignore[union-attr]
        return target.shards.try_read(source.stripe, source.shard, source.slot, source.offset, view)
    except DeviceError:
        return False


async def _read(
    source: JournalSource | ShardSource, view: memoryview, members: Mapping[int, Target]
) -> bool:
    target = members.get(source.member)
    if target is None:
        return False
    try:
        if isinstance(source, JournalSource):
            assert isinstance(target.backend, Device)
            read = target.backend.read(source.offset, len(view))
        else:
            read = target.shards.read(
                source.stripe, source.shard, source.slot, source.offset, len(view)
            )
        view[:] = await answer(read, READ_SECONDS, f"device {source.member}")
    except DeviceError:
        return False
    return True


async def _write(
    pool: bytes,
    job: StripeJob,
    data: memoryview,
    parity: list[memoryview],
    members: Mapping[int, Target],
    outcome: Outcome,
    touched: dict[int, set[int]],
) -> None:
    """Encode one stripe and write its shards, each behind its header."""
    reached("stripe_after_gather_before_encode")
    shape = job.shape
    size = shape.shard_bytes
    shards: list[Buffer] = [data[i * size : (i + 1) * size] for i in range(shape.data)]
    if parity:
        codec(shape.data, shape.parity).encode(shards, parity)
    job.crcs[job.used :] = _ZERO_CRC
    crcs = np.concatenate([job.crcs, *(np.array(block_crcs(view), np.uint32) for view in parity)])
    headers = stripe_format.encode(
        pool=pool, stripe=job.stripe, kind=job.kind, shape=shape, used=job.used,
        contents=Contents(job.layers, job.blocks, job.versions, crcs),
    )  # fmt: skip
    shards += parity
    writes = []
    for number, (member, slot) in enumerate(job.places):
        if member != NOWHERE:
            touched.setdefault(member, set()).add(job.stripe)
            buffers = [headers[number], shards[number]]
            writes.append(_write_shard(job.stripe, number, member, slot, buffers, members, outcome))
    await asyncio.gather(*writes)


async def _write_shard(
    stripe: int,
    shard: int,
    member: int,
    slot: int,
    buffers: list[Buffer],
    members: Mapping[int, Target],
    outcome: Outcome,
) -> None:
    try:
        write = _target(member, members).shards.write(stripe, shard, slot, buffers)
        await answer(write, WRITE_SECONDS, f"device {member}")
    except DeviceError as error:
        outcome.failed[member] = (str(error), isinstance(error, DeviceFull))
        return
    outcome.bytes[member] = outcome.bytes.get(member, 0) + sum(len(b) for b in buffers)
    reached("stripe_after_shard_before_next")


_ZERO_CRC = crc32c(bytes(BLOCK_SIZE))
