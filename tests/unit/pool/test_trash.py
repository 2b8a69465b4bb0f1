"""Objects that nothing refers to: deleted as checkpoints let go of them, or at the next opening."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.base import BLOCK_SIZE, DeviceError, ObjectStore
from backends.directory import open_directory
from backends.memory import MemoryStore
from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.mover import InlineMover
from pool.shards import ObjectShards, object_name
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, read, write

#: Small enough to be full after a few rounds if nothing were deleted.
STORE = 4 * MIB
ROUNDS = 25
OpenStore = Callable[[], ObjectStore]


class _KeptStore(MemoryStore):
    """A store that outlives the pool that uses it."""

    async def close(self) -> None:
        return


@pytest.fixture(params=["memory", "directory"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens the same store again and again."""
    if request.param == "directory":
        return lambda: open_directory(str(tmp_path), url=f"dir://{tmp_path}", size=STORE)
    kept = _KeptStore(STORE)
    return lambda: kept


async def make(disks: list[Disk], open_store: OpenStore) -> None:
    """A pool of 2+1 on two disks and a store: every stripe has a shard there."""
    members = [*(disk.open() for disk in disks), open_store()]
    spec = PoolSpec("tank", 2, 1, 64 * KIB, MIB)
    await create_pool(spec, [MemberSpec(member) for member in members], rng=random.Random(1))
    for member in members:
        await member.close()


async def open_pool(disks: list[Disk], open_store: OpenStore) -> Pool:
    members = [*(disk.open() for disk in disks), open_store()]
    return await Pool.open(members, mover=InlineMover(), rng=random.Random(2))


def needed(pool: Pool) -> set[str]:
    """Names of the objects that the pool refers to."""
    state = pool.engine.state
    return {
        object_name(row.id, shard)
        for row in (*state.table.stripes(), *state.committed.anchors.values())
        for shard, (member, _) in enumerate(row.places)
        if member == 2
    }


async def stored(pool: Pool) -> set[str]:
    shards = pool.engine.state.members[2].shards
    assert shards is not None
    return {object_name(*item) for item in await shards.stored()}


async def until_clean(pool: Pool, others: frozenset[str] = frozenset()) -> None:
    """Wait until the store holds what is needed and nothing else but `others`."""
    for _ in range(1000):
        if await stored(pool) == needed(pool) | others:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"still there: {sorted(await stored(pool) - needed(pool))[:5]}")


def test_overwriting_does_not_fill_a_store(open_store: OpenStore) -> None:
    """Far more is written than it has room for."""

    async def scenario() -> None:
        disks = make_disks(2, 8 * MIB)
        await make(disks, open_store)
        pool = await open_pool(disks, open_store)
        await pool.create_volume("v", MIB)
        for number in range(ROUNDS):
            await write(pool, "v", 0, bytes([number]) * MIB)
            await pool.volume("v").flush()
        await pool.checkpoint()
        await until_clean(pool)
        state = pool.engine.state
        assert not state.members[2].full
        assert state.counters["member_2_bytes"] > 2 * STORE
        assert state.counters["objects_left"] == 0
        assert await read(pool, "v", 0, MIB) == bytes([ROUNDS - 1]) * MIB
        await pool.close()

    asyncio.run(scenario())


def test_orphans_vanish_at_the_next_opening(open_store: OpenStore) -> None:
    """Objects of stripes that no root names, of earlier lives. What is needed stays, and so does
    what is not ours."""

    async def scenario() -> None:
        disks = make_disks(2, 8 * MIB)
        await make(disks, open_store)
        pool = await open_pool(disks, open_store)
        await pool.create_volume("v", MIB)
        await write(pool, "v", 0, b"kept" * (MIB // 4))
        await pool.checkpoint()
        await pool.close()
        store = open_store()
        for stripe in range(9000, 9040):
            await store.put(object_name(stripe, stripe % 3), [b"orphan" * 1000])
        later = object_name(1 << 39, 0)
        for name in ("shard-of-somebody", later):
            await store.put(name, [b"not ours"])
        await store.close()
        pool = await open_pool(disks, open_store)
        await until_clean(pool, frozenset({later}))
        assert pool.engine.state.counters["orphans"] >= 40
        assert await read(pool, "v", 0, MIB) == b"kept" * (MIB // 4)
        assert await pool.check() == []
        await pool.close()
        store = open_store()
        assert "shard-of-somebody" in await store.list()
        await store.close()

    asyncio.run(scenario())


def test_stripes_of_this_life_are_no_orphans(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written while the list is on its way; one that was released meanwhile is not needed twice."""
    gate = asyncio.Event()
    listed = ObjectShards.stored

    async def slowly(self: ObjectShards) -> list[tuple[int, int]]:
        await gate.wait()
        return await listed(self)

    async def scenario() -> None:
        disks = make_disks(2, 8 * MIB)
        await make(disks, open_store)
        pool = await open_pool(disks, open_store)
        await pool.create_volume("v", MIB)
        await write(pool, "v", 0, b"old." * (MIB // 4))
        await pool.close()
        monkeypatch.setattr(ObjectShards, "stored", slowly)
        pool = await open_pool(disks, open_store)
        for number in range(4):
            await write(pool, "v", 0, bytes([number]) * (MIB - BLOCK_SIZE))
        await pool.checkpoint()
        gate.set()
        await until_clean(pool)
        monkeypatch.undo()
        assert await read(pool, "v", 0, BLOCK_SIZE) == bytes([3]) * BLOCK_SIZE
        assert await pool.check() == []
        await pool.close()

    asyncio.run(scenario())


def test_a_store_that_cannot_be_listed_is_no_hindrance(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: ObjectShards) -> list[tuple[int, int]]:
        raise DeviceError(5, "the store does not answer")

    async def scenario() -> None:
        disks = make_disks(2, 8 * MIB)
        await make(disks, open_store)
        monkeypatch.setattr(ObjectShards, "stored", fails)
        pool = await open_pool(disks, open_store)
        await pool.create_volume("v", MIB)
        await asyncio.sleep(0)
        assert pool.status()["counters"]["stores_not_listed"] == 1
        await pool.close()

    asyncio.run(scenario())
