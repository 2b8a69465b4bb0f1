"""Making a pool and looking at devices: what is refused, and that nothing was written then."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from crc32c import crc32c

from backends.base import DeviceError
from backends.fault_script import READS, Fail, Rule
from backends.memory import MemoryStore
from pool import MemberSpec, Pool, PoolError, PoolSpec, create_pool, probe
from pool.format import superblock
from pool.mover import InlineMover
from tests.sim.loop import run
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, make_pool, open_pool, read, write

GOOD: dict[str, Any] = {
    "name": "tank", "data": 2, "parity": 1, "slot_size": 16 * KIB, "journal_size": 64 * KIB,
}  # fmt: skip


def create(disks: list[Disk], **change: Any) -> str:
    spec = PoolSpec(**(GOOD | change))
    members = [MemberSpec(disk.open()) for disk in disks]
    return run(create_pool(spec, members, rng=random.Random(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "is no pool name: use letters"),
        ({"name": "a/b"}, "is no pool name: use letters"),
        ({"name": "x" * 65}, "is no pool name: use letters"),
        ({"data": 0}, "--data must be between 1 and 32, not 0"),
        ({"data": 33}, "--data must be between 1 and 32, not 33"),
        ({"parity": 0}, "--parity must be between 1 and 8, not 0"),
        ({"parity": 9}, "--parity must be between 1 and 8, not 9"),
        ({"data": 4}, r"4\+1 needs at least 5 devices, 3 were given"),
        ({"slot_size": 0}, "the slot size must be a multiple of 4 KiB and at least 16 KiB"),
        ({"slot_size": 12 * KIB}, "slot size must be a multiple of 4 KiB and at least 16 KiB"),
        ({"slot_size": 16 * KIB + 512}, "slot size must be a multiple of 4 KiB"),
        ({"slot_size": 1 << 30}, "the slot size must be at most 64 MiB"),
        ({"journal_size": 32 * KIB}, "the journal size must be at least 64 KiB"),
        ({"journal_size": 64 * KIB + 1}, "the journal size must be a multiple of 4 KiB"),
        ({"journal_size": 4 * MIB}, "memory:a is too small: 2097152 bytes, at least .* are needed"),
        ({"slot_size": 256 * KIB}, "devices are too small: they hold .* stripes, 32 are needed"),
    ],
)
def test_what_cannot_be_a_pool_is_refused_and_nothing_written(
    change: dict[str, Any], message: str
) -> None:
    disks = make_disks(3)
    for disk in disks:
        disk.data[:] = b"\xaa" * len(disk.data)
    with pytest.raises(PoolError, match=message) as caught:
        create(disks, **change)
    assert "\n" not in str(caught.value)
    assert all(disk.data.count(0xAA) == len(disk.data) for disk in disks)


def test_more_members_than_the_root_has_room_for_are_refused_before_anything_is_written() -> None:
    disks = [Disk(f"{number}-{'x' * 900}", MIB) for number in range(80)]
    with pytest.raises(PoolError, match="root needs .* bytes, its slot has 65536"):
        create(disks)
    assert not any(any(disk.data) for disk in disks)


def test_one_backend_twice_is_refused() -> None:
    device = Disk("a", 2 * MIB).open()
    with pytest.raises(PoolError, match="a device was given twice"):
        run(create_pool(PoolSpec(**GOOD), [MemberSpec(device)] * 3, rng=random.Random(1)))


def test_a_journal_needs_devices_that_can_be_overwritten() -> None:
    stores = [MemberSpec(MemoryStore(4 * MIB)) for _ in range(2)]
    members = [MemberSpec(Disk("a", 2 * MIB).open()), *stores]
    with pytest.raises(PoolError, match=r"needs 2 devices that can be overwritten.*1 were given"):
        run(create_pool(PoolSpec(**GOOD), members, rng=random.Random(1)))


def test_a_member_of_another_pool_is_taken_only_by_force() -> None:
    disks = make_disks(3)
    first = create(disks, name="old")
    with pytest.raises(PoolError, match="memory:a is part of pool 'old' already.*--force"):
        create(disks)
    members = [MemberSpec(disk.open(), force=True) for disk in disks]
    second = run(create_pool(PoolSpec(**GOOD), members, rng=random.Random(2)))
    assert first != second
    found = run(probe(disks[0].open()))
    assert found is not None
    assert (found.pool_name, found.pool_uuid) == ("tank", second)


def test_progress_goes_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    members = [MemberSpec(disk.open()) for disk in make_disks(3)]
    run(
        create_pool(
            PoolSpec(**GOOD), members, rng=random.Random(1), progress=lambda *at: seen.append(at)
        )
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_defaults_suit_the_smallest_device() -> None:
    disks = [Disk(name, size) for name, size in (("a", 4 * MIB), ("b", 8 * MIB), ("c", 4 * MIB))]
    create(disks, slot_size=None, journal_size=None)
    pool = run(open_pool(disks, read_only=True))
    assert pool.status()["journal"]["size_bytes"] == 256 * KIB
    assert pool.status()["devices"][1]["size_bytes"] == 8 * MIB


def test_stores_and_devices_mix() -> None:
    async def scenario() -> None:
        stores = [MemoryStore(4 * MIB, url=f"memory:s{i}") for i in range(2)]
        devices = [disk.open() for disk in make_disks(3)]
        spec = PoolSpec(**(GOOD | {"data": 3}))
        members = [*map(MemberSpec, devices), *map(MemberSpec, stores)]
        await create_pool(spec, members, rng=random.Random(1))
        found = await probe(stores[0])
        assert found is not None
        assert (found.device_index, found.pool_name) == (3, "tank")
        pool = await Pool.open(
            [*devices, *stores], mover=InlineMover(), rng=random.Random(1), now=lambda: 0.0
        )
        await pool.create_volume("v", MIB)
        data = random.Random(3).randbytes(512 * KIB)
        for at in range(0, len(data), 64 * KIB):
            await write(pool, "v", at, data[at : at + 64 * KIB])
        await pool.checkpoint()
        assert await read(pool, "v", 0, len(data)) == data
        assert await pool.check() == []
        assert any(name.startswith("shard-") for name in await stores[0].list())
        await pool.close()

    run(scenario())


# -- probe -----------------------------------------------------------------------------------


def test_a_blank_device_and_a_foreign_one_are_none_of_ours() -> None:
    disk = Disk("a", 2 * MIB)
    assert run(probe(disk.open())) is None
    disk.data[0x438:0x43A] = b"\x53\xef"
    assert run(probe(disk.open())) is None
    assert run(probe(MemoryStore(MIB))) is None


def test_probe_tells_what_the_newest_superblock_says() -> None:
    disks = make_disks(3)
    uuid = create(disks)
    results = [run(probe(disk.open())) for disk in disks]
    for index, found in enumerate(results):
        assert found is not None
        assert (found.pool_name, found.pool_uuid, found.device_index) == ("tank", uuid, index)
        assert [row["url"] for row in found.members] == ["memory:a", "memory:b", "memory:c"]
        assert found.members[index]["uuid"] == found.device_uuid
        assert {row["state"] for row in found.members} == {"active"}


def copies(disk: Disk) -> list[int]:
    """Where the superblocks of a disk begin."""
    found, at = [], 0
    while (at := disk.data.find(superblock.MAGIC, at)) != -1:
        if at % 4096 == 0:
            found.append(at)
        at += 1
    return found


def test_any_one_copy_of_the_superblock_will_do_and_none_is_damage() -> None:
    disks = make_disks(3)
    run(make_pool(disks, 2, 1))
    run(_open_and_close(disks))
    places = copies(disks[0])
    assert len(places) == 4
    for kept in places:
        spoiled = Disk("a", len(disks[0].data))
        spoiled.data[:] = disks[0].data
        for place in places:
            if place != kept:
                spoiled.flip(place + 100)
        assert run(probe(spoiled.open())) is not None
        spoiled.flip(kept + 100)
        with pytest.raises(PoolError, match="memory:a: it belongs to a stripewell pool, but no"):
            run(probe(spoiled.open()))


async def _open_and_close(disks: list[Disk]) -> None:
    pool = await open_pool(disks)
    await pool.close()


def test_bad_sectors_hide_no_copy_that_can_be_read() -> None:
    disks = make_disks(3)
    create(disks)
    disks[0].script.add(Rule(READS, Fail(), times=None, within=(0, MIB)))
    assert run(probe(disks[0].open())) is not None
    disks[0].script.add(Rule(READS, Fail(), times=None))
    with pytest.raises(DeviceError):
        run(probe(disks[0].open()))


def test_a_damaged_root_object_does_not_hide_the_other() -> None:
    async def scenario() -> None:
        store = MemoryStore(4 * MIB)
        members = [MemberSpec(store), *(MemberSpec(disk.open()) for disk in make_disks(2))]
        await create_pool(PoolSpec(**GOOD), members, rng=random.Random(1))
        assert await store.list("root-") == ["root-a"]
        await store.put("root-b", [b"torn"])
        found = await probe(store)
        assert found is not None
        assert found.generation == 1

    run(scenario())


# -- opening what should not be opened -------------------------------------------------------


def test_opening_refuses_what_does_not_belong_together() -> None:
    disks, others = make_disks(3), make_disks(3)
    create(disks)
    members = [MemberSpec(disk.open()) for disk in others]
    run(create_pool(PoolSpec(**(GOOD | {"name": "other"})), members, rng=random.Random(9)))
    with pytest.raises(PoolError, match="none of the devices belongs to a pool"):
        run(open_pool([Disk("blank", MIB)]))
    several = r"different pools \(tank on memory:a, memory:b, memory:c; other on memory:a\)"
    with pytest.raises(PoolError, match=several):
        run(open_pool([*disks, others[0]]))
    with pytest.raises(PoolError, match="a device was given twice, or a copy of one"):
        run(open_pool([*disks, disks[0]]))
    with pytest.raises(PoolError, match="1 of 3 devices found, 2 are needed; missing: memory:b"):
        run(open_pool(disks[:1]))
    with pytest.raises(PoolError, match="belong to pool 'tank', not to 'bank'"):
        run(
            Pool.open(
                [disk.open() for disk in disks], mover=InlineMover(), rng=random.Random(1),
                expect_pool="bank",
            )
        )  # fmt: skip


def test_a_device_that_has_shrunk_is_as_good_as_missing() -> None:
    async def scenario() -> None:
        disks = make_disks(4)
        await make_pool(disks, 2, 1)
        pool = await open_pool(disks)
        await pool.create_volume("v", MIB)
        await write(pool, "v", 0, b"x" * 4096)
        await pool.close()
        rest = bytes(disks[1].data[MIB:])
        before = bytes(disks[1].data[:MIB])
        del disks[1].data[MIB:]
        pool = await open_pool(disks)
        assert await read(pool, "v", 0, 4096) == b"x" * 4096
        await write(pool, "v", 4096, b"y" * 4096)
        [reason] = [text for text in pool.status()["problems"] if "memory:b" in text]
        assert "memory:b has shrunk from 2097152 to 1048576 bytes, restore its size" in reason
        await pool.close()
        assert disks[1].data == before
        with pytest.raises(PoolError, match="1 of 3 devices found, .* memory:b has shrunk"):
            await open_pool(disks[1:3])
        disks[1].data += rest
        pool = await open_pool(disks)
        assert await read(pool, "v", 4096, 4096) == b"y" * 4096
        assert pool.status()["state"] == "healthy"
        await pool.close()

    run(scenario())


def test_a_newer_revision_is_refused() -> None:
    disks = make_disks(3)
    create(disks)
    for place in copies(disks[1]):
        disks[1].data[place + 8] += 1
        crc = crc32c(disks[1].data[place : place + 252])
        disks[1].data[place + 252 : place + 256] = crc.to_bytes(4, "little")
    for look in (probe(disks[1].open()), open_pool(disks)):
        with pytest.raises(PoolError, match="newer than this stripewell.*use a newer stripewell"):
            run(look)


# -- volumes ---------------------------------------------------------------------------------


def test_volumes_that_cannot_be_are_refused() -> None:
    async def scenario() -> None:
        disks = make_disks(3)
        await make_pool(disks, 2, 1)
        pool = await open_pool(disks)
        await pool.create_volume("v", MIB)
        with pytest.raises(PoolError, match="'v' exists already"):
            await pool.create_volume("v", MIB)
        with pytest.raises(PoolError, match="is no volume name"):
            await pool.create_volume("a/b", MIB)
        with pytest.raises(PoolError, match="is no volume size"):
            await pool.create_volume("w", 1)
        with pytest.raises(PoolError, match="there is no volume 'w' in pool 'tank'"):
            await pool.delete_volume("w")
        with pytest.raises(KeyError):
            pool.volume("w")
        await pool.close()
        pool = await open_pool(disks, read_only=True)
        with pytest.raises(PoolError, match="open for reading only"):
            await pool.create_volume("w", MIB)
        await pool.close()

    run(scenario())


def test_volumes_created_at_once_get_layers_of_their_own() -> None:
    """Also while the journal is full, when each of them has to wait."""

    async def scenario() -> None:
        disks = make_disks(3, 4 * MIB)
        await make_pool(disks, 2, 1, journal=64 * KIB)
        pool = await open_pool(disks)
        await pool.create_volume("big", MIB)
        filler = pool.volume("big")
        number = 0
        while filler.try_write(number * 4096, memoryview(b"x" * 4096)):
            number += 1
        filler.commit()
        while pool.engine.journal.room(pool.engine.last_room):
            # The last blocks are kept for deletes, which go on when the pool is full.
            await filler.write_zeroes(0, 4096, no_hole=True)
        names = [f"v{number}" for number in range(6)]
        await asyncio.gather(*(pool.create_volume(name, MIB) for name in names))
        for name in names:
            await write(pool, name, 0, name.encode() * 2048)
        for name in names:
            assert await read(pool, name, 0, 4096) == name.encode() * 2048
        results = await asyncio.gather(
            *(pool.create_volume("same", MIB) for _ in range(3)), return_exceptions=True
        )
        assert sum(result is None for result in results) == 1
        await pool.close()

    run(scenario())
