"""Shards on one member: where a shard's bytes are, whatever kind of backend it is.

A byte-addressed device keeps a shard in a slot, an object store under a name made of stripe id and
shard number. Callers give both and never know which is used. The same code runs in the engine and
in the worker process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from backends.base import BLOCK_SIZE, Buffer, Device, ObjectStore
from pool.format.geometry import Layout

#: (reads into a buffer at a byte offset, or says False; byte offset of the shard)
FastRead = tuple[Callable[[int, memoryview], bool], int]

#: Names of shards in an object store (`object_name`).
OBJECT = re.compile("shard-([0-9a-f]{10})-([0-9a-f]{2})")


class Shards(Protocol):
    """Reads and writes shards. `offset` counts from the start of the stripe header."""

    async def write(
        self, stripe: int, shard: int, slot: int, buffers: Sequence[Buffer]
    ) -> None: ...

    async def read(self, stripe: int, shard: int, slot: int, offset: int, length: int) -> bytes: ...

    def try_read(
        self, stripe: int, shard: int, slot: int, offset: int, into: memoryview
    ) -> bool: ...

    @property
    def must_delete(self) -> bool:
        """Whether a shard that is not needed takes space until `delete`; a slot is just reused."""

    async def delete(self, stripe: int, shard: int) -> None:
        """Remove a shard that nothing refers to."""

    async def stored(self) -> list[tuple[int, int]]:
        """(stripe, shard) of all shards there are, where they must be deleted."""

    def fast(self, slot: int) -> FastRead | None:
        """How to read the shard in a slot without waiting, and where its header begins."""

    async def repair(
        self, stripe: int, shard: int, slot: int, offset: int, data: Buffer
    ) -> None: ...

    async def sync(self) -> None: ...


class SlotShards:
    """Shards in the slots of a device."""

    must_delete = False

    def __init__(self, device: Device, layout: Layout) -> None:
        self.device = device
        self._slot_offset = layout.slot_offset

    async def write(self, stripe: int, shard: int, slot: int, buffers: Sequence[Buffer]) -> None:
        """Write a whole shard with its header."""
        await self.device.write(self._slot_offset(slot), buffers)

    async def read(self, stripe: int, shard: int, slot: int, offset: int, length: int) -> bytes:
        return await self.device.read(self._slot_offset(slot) + offset, length)

    def try_read(self, stripe: int, shard: int, slot: int, offset: int, into: memoryview) -> bool:
        return self.device.try_read(self._slot_offset(slot) + offset, into)

    def fast(self, slot: int) -> FastRead | None:
        return self.device.try_read, self._slot_offset(slot)

    async def repair(self, stripe: int, shard: int, slot: int, offset: int, data: Buffer) -> None:
        """Put right bytes in the place of wrong ones."""
        await self.device.write(self._slot_offset(slot) + offset, [data])

    async def sync(self) -> None:
        await self.device.sync()

    async def delete(self, stripe: int, shard: int) -> None:
        return

    async def stored(self) -> list[tuple[int, int]]:
        return []


def object_name(stripe: int, shard: int) -> str:
    """The name of a shard in an object store (`docs/format.md`, "Object stores")."""
    return f"shard-{stripe:010x}-{shard:02x}"


class ObjectShards:
    """Shards as objects of a store. Every put is durable, so `sync` has nothing to do."""

    must_delete = True

    def __init__(self, store: ObjectStore, slot_blocks: int) -> None:
        self.store = store
        self._slot_bytes = slot_blocks * BLOCK_SIZE

    async def write(self, stripe: int, shard: int, slot: int, buffers: Sequence[Buffer]) -> None:
        """Write a whole shard with its header."""
        await self.store.put(object_name(stripe, shard), buffers)

    async def read(self, stripe: int, shard: int, slot: int, offset: int, length: int) -> bytes:
        return await self.store.get(object_name(stripe, shard), offset, length)

    def try_read(self, stripe: int, shard: int, slot: int, offset: int, into: memoryview) -> bool:
        return False

    def fast(self, slot: int) -> FastRead | None:
        return None

    async def repair(self, stripe: int, shard: int, slot: int, offset: int, data: Buffer) -> None:
        """An object cannot be changed in place: its size is found by reading, then it is put
        anew."""
        name = object_name(stripe, shard)
        head = await self.store.get(name, 0, offset) if offset else b""
        tail_at = offset + len(data)
        size = self._slot_bytes
        tail = await self.store.get(name, tail_at, size - tail_at) if tail_at < size else b""
        await self.store.put(name, [head, data, tail])

    async def sync(self) -> None:
        return

    async def delete(self, stripe: int, shard: int) -> None:
        await self.store.delete(object_name(stripe, shard))

    async def stored(self) -> list[tuple[int, int]]:
        names = await self.store.list("shard-")
        found = (OBJECT.fullmatch(name) for name in names)
        return [(int(match[1], 16), int(match[2], 16)) for match in found if match]


def shards_of(backend: Device | ObjectStore, layout: Layout) -> Shards:
    """The shards of a member."""
    if isinstance(backend, Device):
        return SlotShards(backend, layout)
    return ObjectShards(backend, layout.slot_blocks)
