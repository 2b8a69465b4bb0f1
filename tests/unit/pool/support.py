"""What the pool's tests share: disks in memory that outlive their handles, and small pools."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from backends.base import BLOCK_SIZE, Buffer
from backends.failures import check_buffers, check_range, gone
from backends.fault_script import Script
from backends.faults import FaultyDevice
from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.format.geometry import Layout
from pool.mover import InlineMover

KIB = 1024
MIB = 1024 * KIB
SLOT = 16 * KIB


class Disk:
    """A medium of `size` bytes. Every write is durable at once; faults come from `script`."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.data = bytearray(size)
        self.script = Script(random.Random(0))
        self.syncs = 0

    def open(self) -> FaultyDevice:
        """A new handle, as a process has it."""
        return FaultyDevice(_Handle(self), self.script)

    def flip(self, offset: int, mask: int = 1) -> None:
        """Change bits of one byte, for good."""
        self.data[offset] ^= mask


class _Handle:
    """A `Device` over a disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._closed = False

    @property
    def url(self) -> str:
        return f"memory:{self._disk.name}"

    @property
    def size(self) -> int:
        return len(self._disk.data)

    async def read(self, offset: int, length: int) -> bytes:
        self._check_open()
        check_range(self.url, self.size, offset, length)
        return bytes(self._disk.data[offset : offset + length])

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        self.append(offset, buffers)

    async def sync(self) -> None:
        self._check_open()
        self._disk.syncs += 1

    def try_read(self, offset: int, into: memoryview) -> bool:
        self._check_open()
        check_range(self.url, self.size, offset, len(into))
        into[:] = self._disk.data[offset : offset + len(into)]
        return True

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        check_buffers(self.url, self.size, offset, buffers)
        for buffer in buffers:
            self._disk.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        raise NotImplementedError("these disks live in one process")

    async def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise gone(self.url, "it was closed here")


def make_disks(count: int, size: int = 2 * MIB) -> list[Disk]:
    """Blank disks named a, b, c, ..."""
    return [Disk(chr(ord("a") + number), size) for number in range(count)]


async def make_pool(
    disks: Sequence[Disk], data: int, parity: int, *, journal: int = 128 * KIB, slot: int = SLOT
) -> str:
    """Create a pool named `tank` on blank disks; returns its uuid."""
    return await create_pool(
        PoolSpec("tank", data, parity, slot_size=slot, journal_size=journal),
        [MemberSpec(disk.open()) for disk in disks],
        rng=random.Random(1),
    )


async def open_pool(
    disks: Sequence[Disk],
    *,
    seed: int = 2,
    read_only: bool = False,
    leaf_budget: int = 1 << 20,
    now: Callable[[], float] = lambda: 0.0,
) -> Pool:
    """Open the pool that the disks hold, with its movers in this loop."""
    return await Pool.open(
        [disk.open() for disk in disks],
        mover=InlineMover(),
        rng=random.Random(seed),
        read_only=read_only,
        leaf_budget=leaf_budget,
        now=now,
    )


def sound_root(where: Layout, members: int = 3, generation: int = 7) -> dict[str, Any]:
    """A root as one of 2+1 on devices of this layout has it before its first checkpoint."""
    keys = ("size", "root_bytes", "journal_offset", "journal_bytes", "slots_offset", "slots")
    rows = [
        {
            "index": index, "uuid": bytes([index]).hex() * 16, "url": f"memory:{index}",
            "state": "active", "reason": "", "class": "data", "labels": {},
            "slot_blocks": where.slot_blocks, **{key: getattr(where, key) for key in keys},
        }
        for index in range(members)
    ]  # fmt: skip
    blocks = where.journal_bytes // BLOCK_SIZE
    replicas = [{"member": index, "offset": where.journal_offset} for index in (0, 1)]
    stream = {
        "id": 1, "owner": "70" * 16, "blocks": blocks, "replicas": replicas, "replay": blocks,
        "tail": blocks, "durable": blocks, "version": 0, "previous": 0,
    }  # fmt: skip
    return {
        "name": "tank", "generation": generation, "parent": "", "writer": "0" * 32, "term": 3,
        "code": {"data": 2, "parity": 1, "slot_blocks": where.slot_blocks}, "members": rows,
        "streams": [stream], "checkpoint": {"width": 3, "top": [], "anchors": []},
        "next": {"stripe": 1},
    }  # fmt: skip


async def read(pool: Pool, volume: str, offset: int, length: int) -> bytes:
    """Bytes of a volume, by the waiting path."""
    into = bytearray(length)
    await pool.volume(volume).read(offset, memoryview(into))
    return bytes(into)


async def write(pool: Pool, volume: str, offset: int, data: bytes) -> None:
    """Write and flush nothing."""
    await pool.volume(volume).write(offset, memoryview(data))
