"""`pool check` names each fault exactly once, and a healthy pool has none.

A bench is a small healthy pool in use. Each test does one kind of harm to its disks or to what the
engine has in memory, and expects exactly the faults of that harm.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from backends.base import BLOCK_SIZE
from backends.fault_script import READS, Fail, Hang, Rule
from pool import Pool
from pool.blockmap import LEAF_SHIFT, Leaf
from pool.check import Fault, Severity
from pool.format import stripe as stripe_format
from pool.format import superblock
from pool.format.location import (
    BLOCK_MASK,
    JOURNAL,
    POSITION_MASK,
    SHARD_MASK,
    SHARD_SHIFT,
    TAG_JOURNAL,
    TAG_SHIFT,
    TAG_STRIPE,
    in_stripe,
    stripe_of,
)
from pool.format.stripe import Header
from pool.journal import Replica
from pool.pool import READ_ONLY
from pool.table import DATA, META, Stripe
from tests.fuzz.anatomy import Anatomy, Region
from tests.sim.loop import run
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, make_pool, open_pool, write

Scenario = Callable[["Bench"], Awaitable[None]]
BLOCKS = 200


class Bench:
    """A pool of 2+1 on four disks. Volume `v` is in stripes and in the journal, with zeros and
    holes; all superblocks are of this life."""

    pool: Pool
    disks: list[Disk]

    async def start(self) -> None:
        self.disks = make_disks(4)
        await make_pool(self.disks, 2, 1, journal=512 * KIB)
        self.pool = await open_pool(self.disks)
        await self.pool.create_volume("v", 8 * MIB)
        await write(self.pool, "v", 1600 * BLOCK_SIZE, b"cold" * 1024)
        for block in range(BLOCKS):
            await write(self.pool, "v", block * 3 * BLOCK_SIZE, block.to_bytes(4, "little") * 1024)
        volume = self.pool.volume("v")
        await volume.write_zeroes(700 * BLOCK_SIZE, 8 * BLOCK_SIZE, no_hole=True)
        await volume.trim(30 * BLOCK_SIZE, 12 * BLOCK_SIZE)
        await asyncio.sleep(1)
        await self.pool.checkpoint()
        maintenance = self.pool.engine.maintenance
        assert maintenance is not None
        await maintenance.stop()
        for block in (1, 4, 7, 600):
            await write(self.pool, "v", block * BLOCK_SIZE, b"late" * 1024)
        await volume.flush()
        assert self.state.counters["roots"] >= 2

    @property
    def state(self):  # type: ignore[no-untyped-def]
        return self.pool.engine.state

    async def faults(self) -> list[Fault]:
        """What the check finds; it must not have written."""
        before = [bytes(disk.data) for disk in self.disks]
        report = await self.pool.check_report()
        assert [bytes(disk.data) for disk in self.disks] == before
        assert report.lines() == [fault.text for fault in report.faults]
        assert all("\n" not in line for line in report.lines())
        return report.faults

    async def only(self, kind: str, severity: Severity, **fields: object) -> Fault:
        """The one fault that there is, with these fields."""
        faults = await self.faults()
        assert [fault.kind for fault in faults] == [kind], [fault.text for fault in faults]
        assert faults[0].severity is severity
        for name, value in fields.items():
            assert getattr(faults[0], name) == value, faults[0].text
        return faults[0]

    def leaf(self, block: int) -> Leaf:
        leaf: Leaf = self.state.maps[1].leaves[block >> LEAF_SHIFT]
        return leaf

    def row(self, kind: int = DATA) -> Stripe:
        """A stripe with live blocks, and room for more in its count."""
        live = self.state.table.live_of
        return next(
            row
            for row in self.state.table.stripes()
            if row.kind == kind and 1 < live(row.id) < row.shape.blocks
        )

    def mapped(self, tag: int) -> list[tuple[int, int, int]]:
        """(block, location, crc) of all entries with a tag."""
        return [
            (number << LEAF_SHIFT | block, location, crc)
            for number, leaf in self.state.maps[1].leaves.items()
            for block, location, crc in leaf.mapped()
            if location >> TAG_SHIFT == tag
        ]

    def remap(self, block: int, location: int, crc: int) -> None:
        """Change an entry behind the back of all accounts."""
        self.leaf(block).set(block & 511, location, crc)
        self.leaf(block).dirty = True

    def place(self, row: Stripe, shard: int) -> tuple[Disk, int]:
        """Disk and offset of a shard's header."""
        device, slot = row.places[shard]
        return self.disks[device], self.state.members[device].layout.slot_offset(slot)

    def header(self, row: Stripe) -> Header:
        disk, offset = self.place(row, 0)
        return stripe_format.decode(bytes(disk.data[offset : offset + row.shape.header_bytes]))

    def write_headers(
        self, row: Stripe, shards: range, **changes: np.ndarray | bytes | int
    ) -> None:
        """Encode the headers of a stripe anew with other contents, for some of its shards."""
        old = self.header(row)
        fields = {
            name: changes.get(name, getattr(old.contents, name))
            for name in ("layers", "blocks", "versions", "crcs")
        }
        headers = stripe_format.encode(
            pool=self.state.uuid, stripe=row.id, kind=int(changes.get("kind", row.kind)),
            shape=row.shape, used=int(changes.get("used", old.used)),
            contents=stripe_format.Contents(**fields),
        )  # fmt: skip
        for shard in shards:
            disk, offset = self.place(row, shard)
            disk.data[offset : offset + row.shape.header_bytes] = headers[shard]

    def regions(self, structure: str) -> list[Region]:
        images = {disk.name: disk.data for disk in self.disks}
        found = [r for r in Anatomy(images).regions() if r.structure == structure]
        assert found
        return found

    def disk(self, name: str) -> Disk:
        return next(disk for disk in self.disks if disk.name == name)


def bench_run(scenario: Scenario) -> None:
    async def whole() -> None:
        bench = Bench()
        await bench.start()
        assert await bench.faults() == []
        await scenario(bench)

    run(whole())


# -- a byte flipped in every structure on every device ---------------------------------------

EXPECTED = {
    "superblock head": "superblock",
    "root": "superblock",
    "stripe header": "header",
    "shard": "block",
    "leaf page": "block",
    "directory page": "block",
    "table page": "block",
    "top page": "block",
    "journal header": "journal",
    "journal payload": "journal",
}


@pytest.mark.parametrize("structure", sorted(EXPECTED))
def test_a_flipped_byte_is_named_with_its_device(structure: str) -> None:
    async def scenario(bench: Bench) -> None:
        rng = random.Random(structure)
        regions = bench.regions(structure)
        # A page lies in one shard; everything else is on several devices.
        assert "page" in structure or len({region.device for region in regions}) > 1
        for region in rng.sample(regions, min(10, len(regions))):
            # Of a journal header only what is used has a checksum.
            length = 64 if structure == "journal header" else region.length
            offset, mask = region.offset + rng.randrange(length), 1 << rng.randrange(8)
            disk = bench.disk(region.device)
            member = bench.disks.index(disk)
            disk.flip(offset, mask)
            fault = await bench.only(EXPECTED[structure], Severity.DEGRADED, member=member)
            assert f"device {member} (memory:{region.device})" in fault.text
            if fault.kind == "block":
                assert fault.stripe is not None
                assert fault.shard is not None
            disk.flip(offset, mask)
        assert await bench.faults() == []

    bench_run(scenario)


def test_both_ends_and_both_slots_of_superblocks_are_looked_at() -> None:
    async def scenario(bench: Bench) -> None:
        member = bench.state.members[2]
        for slot in (0, 1):
            for offset in member.layout.root_offsets(slot):
                bench.disks[2].flip(offset + 300)
        faults = await bench.faults()
        assert {fault.kind for fault in faults} == {"superblock"}
        # With nothing whole left on it, the device as a whole is named.
        assert "carries root none" in faults[0].text

    bench_run(scenario)


# -- superblocks -----------------------------------------------------------------------------


def test_superblocks_that_say_something_else() -> None:
    async def scenario(bench: Bench) -> None:
        state, member = bench.state, bench.state.members[1]
        front = member.layout.root_offsets(member.committed_slot)[0]
        right = bytes(bench.disks[1].data[front : front + member.layout.root_bytes])
        root = superblock.decode(right).root
        old = {"pool": state.uuid, "device": member.uuid, "index": 1, "where": member.layout}
        wide = type(member.layout)(*[getattr(member.layout, name) for name in (
            "size", "root_bytes", "journal_offset", "journal_bytes", "slots_offset", "slot_blocks",
        )], member.layout.slots - 1)  # fmt: skip
        changes = [
            ({"pool": bytes(16)}, root, "of another pool"),
            ({"device": bytes(16)}, root, "is of device 1"),
            ({"index": 3}, root, "head disagree about the device"),
            ({"where": wide}, root, "head disagree about the device"),
            ({}, root | {"writer": "0" * 32}, "not the committed one"),
            ({}, root | {"generation": root["generation"] - 1}, "not the committed one"),
        ]
        for change, body, text in changes:
            image = superblock.encode(body, **(old | change))
            bench.disks[1].data[front : front + len(image)] = image
            fault = await bench.only("superblock", Severity.DEGRADED, member=1)
            assert text in fault.text
            bench.disks[1].data[front : front + len(right)] = right
        assert await bench.faults() == []

    bench_run(scenario)


def test_a_device_whose_superblocks_are_old() -> None:
    async def scenario(bench: Bench) -> None:
        disk, layout = bench.disks[3], bench.state.members[3].layout
        ends = [o for slot in (0, 1) for o in layout.root_offsets(slot)]
        old = [bytes(disk.data[offset : offset + layout.root_bytes]) for offset in ends]
        for _ in range(2):
            await bench.pool.engine.membership.commit(bench.state.committed)
        for offset, image in zip(ends, old, strict=True):
            disk.data[offset : offset + len(image)] = image
        fault = await bench.only("superblock", Severity.DEGRADED, member=3)
        assert f"the pool's is {bench.state.generation}" in fault.text

    bench_run(scenario)


# -- shards ----------------------------------------------------------------------------------


def test_two_slots_swapped() -> None:
    async def scenario(bench: Bench) -> None:
        rows = [row for row in bench.state.table.stripes() if row.kind == DATA]
        one, other = next(
            (bench.place(a, i), bench.place(b, j))
            for a in rows for b in rows for i in range(3) for j in range(3)
            if a.id < b.id and a.places[i][0] == b.places[j][0]
        )  # fmt: skip
        size = bench.state.slot_blocks * BLOCK_SIZE
        data = one[0].data
        first = bytes(data[one[1] : one[1] + size])
        data[one[1] : one[1] + size] = data[other[1] : other[1] + size]
        data[other[1] : other[1] + size] = first
        faults = await bench.faults()
        assert [fault.kind for fault in faults] == ["foreign", "foreign"]
        assert len({fault.stripe for fault in faults}) == 2
        assert all("holds stripe" in fault.text for fault in faults)
        assert all("still readable" in f.text or "less parity" in f.text for f in faults)

    bench_run(scenario)


def test_an_old_shard_in_its_place() -> None:
    async def scenario(bench: Bench) -> None:
        row = bench.row()
        disk, offset = bench.place(row, 1)
        header = bytearray(disk.data[offset : offset + row.shape.header_bytes])
        header[32:40] = (1).to_bytes(8, "little")
        image = bytes(header[:8]) + bytes(4) + bytes(header[12:])
        header[8:12] = stripe_format.crc32c(image).to_bytes(4, "little")
        disk.data[offset : offset + len(header)] = header
        disk.data[offset + len(header) : offset + len(header) + BLOCK_SIZE] = bytes(BLOCK_SIZE)
        fault = await bench.only("foreign", Severity.DEGRADED, stripe=row.id, shard=1)
        assert "holds stripe 1, shard 1" in fault.text

    bench_run(scenario)


def test_a_shard_of_another_attempt_at_the_stripe() -> None:
    """R15: right checksums of its own, but another digest."""

    async def scenario(bench: Bench) -> None:
        row = bench.row()
        versions = bench.header(row).contents.versions.copy()
        versions[0] += 1
        bench.write_headers(row, range(2, 3), versions=versions)
        await bench.only("attempt", Severity.DEGRADED, stripe=row.id, shard=2)

    bench_run(scenario)


def test_parity_that_is_not_the_code_of_the_data() -> None:
    """All checksums fit, but what is lost could not be reconstructed."""

    async def scenario(bench: Bench) -> None:
        row = bench.row()
        disk, offset = bench.place(row, 2)
        first = offset + row.shape.header_bytes
        disk.data[first : first + BLOCK_SIZE] = b"\7" * BLOCK_SIZE
        crcs = bench.header(row).contents.crcs.copy()
        crcs[row.shape.blocks] = stripe_format.crc32c(b"\7" * BLOCK_SIZE)
        bench.write_headers(row, range(3), crcs=crcs)
        await bench.only("code", Severity.DEGRADED, stripe=row.id, shard=2)

    bench_run(scenario)


def test_a_header_that_its_stripe_cannot_have() -> None:
    async def scenario(bench: Bench) -> None:
        row, old = bench.row(), bench.header(bench.row())
        versions = old.contents.versions.copy()
        versions[0] = 1 << 62
        for changes, text in (
            ({"versions": versions}, "version"),
            ({"kind": META}, "says kind 2"),
            ({"used": old.used - 1}, "names blocks behind"),
        ):
            bench.write_headers(row, range(3), **changes)
            faults = await bench.faults()
            assert faults[0].kind == "header"
            assert text in faults[0].text
            # What it no longer describes is named as well.
            assert {fault.stripe for fault in faults} == {row.id}
            restore = {n: getattr(old.contents, n) for n in ("layers", "blocks", "versions")}
            bench.write_headers(row, range(3), kind=DATA, used=old.used, **restore)
        assert await bench.faults() == []

    bench_run(scenario)


def test_more_bad_shards_than_parity_are_data_loss_where_it_is_mapped() -> None:
    async def scenario(bench: Bench) -> None:
        row = bench.row()
        for shard in (0, 2):
            disk, offset = bench.place(row, shard)
            disk.flip(offset + row.shape.header_bytes)
        faults = await bench.faults()
        assert [(f.kind, f.severity, f.shard) for f in faults] == [
            ("block", Severity.LOST, 0),
            ("block", Severity.DEGRADED, 2),
        ]
        assert "1 block of data lost" in faults[0].text

    bench_run(scenario)


def test_a_stripe_without_any_header() -> None:
    async def scenario(bench: Bench) -> None:
        row = bench.row()
        for shard in range(3):
            disk, offset = bench.place(row, shard)
            disk.data[offset : offset + 128] = bytes(128)
        faults = await bench.faults()
        assert [fault.kind for fault in faults] == ["header"] * 4
        assert "nothing of it can be reconstructed" in faults[0].text

    bench_run(scenario)


def test_a_device_that_cannot_be_read_hangs_or_is_missing() -> None:
    async def scenario(bench: Bench) -> None:
        layout = bench.state.members[1].layout
        slots = (layout.slots_offset, layout.slot_offset(layout.slots))
        bench.disks[1].script.add(Rule(READS, Fail(), times=None, within=slots))
        faults = await bench.faults()
        assert {(fault.kind, fault.member) for fault in faults} == {("unreadable", 1)}
        shards = sum(1 in [d for d, _ in row.places] for row in bench.state.table.stripes())
        shards += sum(
            1 in [d for d, _ in row.places] for row in bench.state.committed.anchors.values()
        )
        assert len(faults) == shards

        bench.disks[1].script.clear()
        bench.disks[1].script.add(Rule(frozenset({"read"}), Hang(), times=None, within=slots))
        fault = await bench.only("device", Severity.UNCHECKED, member=1)
        assert fault.text == (
            f"device 1 does not answer: {shards} shards on it could not be checked"
        )
        bench.disks[1].script.release()

    bench_run(scenario)


def test_missing_devices_are_named_and_what_is_lost_with_them() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.pool.close()
        pool = await open_pool(bench.disks[1:], read_only=True)
        lines = await pool.check()
        assert len(lines) == 1
        assert lines[0].startswith("device 0 is missing: ")
        await pool.close()
        bench.pool = await open_pool(bench.disks, read_only=True)
        for index in (0, 1):
            bench.state.members[index].shards = bench.state.members[index].backend = None
        faults = await bench.faults()
        assert {fault.kind for fault in faults} - {"page"} == {"stripe", "device"}
        lost = [row for row in bench.state.table.stripes() if {0, 1} <= {d for d, _ in row.places}]
        named = {fault.stripe for fault in faults if fault.kind == "stripe"}
        assert named <= {row.id for row in lost} | bench.state.committed.anchors.keys()
        assert faults[0].severity is Severity.LOST

    bench_run(scenario)


# -- pages -----------------------------------------------------------------------------------


def test_a_leaf_that_is_lost_says_which_blocks_are() -> None:
    async def scenario(bench: Bench) -> None:
        layer_map = bench.state.maps[1]
        number, pointer = next(iter(layer_map.pointers.items()))
        row = bench.state.row(pointer.stripe)
        block = pointer.offset // BLOCK_SIZE % row.shape.shard_blocks
        for shard in range(row.shape.shards):
            disk, offset = bench.place(row, shard)
            disk.flip(offset + row.shape.header_bytes + block * BLOCK_SIZE)
        faults = await bench.faults()
        pages = [fault for fault in faults if fault.kind == "page"]
        first = number << LEAF_SHIFT
        assert any(f"blocks {first} to {first + 511} of volume v" in f.text for f in pages)
        assert {fault.stripe for fault in faults} == {row.id}

    bench_run(scenario)


def test_what_is_in_use_differs_from_what_is_stored() -> None:
    async def scenario(bench: Bench) -> None:
        state = bench.state
        number, leaf = next((n, x) for n, x in state.maps[1].leaves.items() if not x.dirty)
        saved = leaf.crcs[0]
        leaf.crcs[0] ^= 1
        kinds = [fault.kind for fault in await bench.faults()]
        assert kinds[0] == "leaf"
        leaf.crcs[0] = saved

        key, pointer = next(iter(state.directories.items()))
        leaf_pointer = state.maps[1].pointers[number]
        state.maps[1].pointers[number] = leaf_pointer._replace(offset=pointer.offset)
        kinds = [fault.kind for fault in await bench.faults()]
        assert "directory" in kinds
        state.maps[1].pointers[number] = leaf_pointer

        state.directories[key] = leaf_pointer
        kinds = [fault.kind for fault in await bench.faults()]
        assert {"top", "page"} <= set(kinds) or {"top", "directory"} <= set(kinds)
        state.directories[key] = pointer

        table = dict(state.table_pages)
        state.table_pages = {}
        await bench.only("top", Severity.WRONG)
        state.table_pages = table

        row = state.table.raw(state.table.rows[bench.row().id])
        row["placement"], old = 7, row["placement"]
        assert await bench.faults() == []
        row["placement"], row["class"] = old, 0
        assert await bench.faults() == []

    bench_run(scenario)


# -- the journal -----------------------------------------------------------------------------


def _ring(bench: Bench, replica: Replica, position: int) -> tuple[Disk, int]:
    return bench.disks[replica.member], bench.pool.engine.journal.offset(replica, position)


def test_a_journal_block_dropped_on_one_replica_and_on_all() -> None:
    async def scenario(bench: Bench) -> None:
        block, location, _ = bench.mapped(TAG_JOURNAL)[-1]
        position = location & POSITION_MASK
        replicas = bench.pool.engine.journal.replicas
        for number, replica in enumerate(replicas):
            disk, offset = _ring(bench, replica, position)
            disk.data[offset : offset + BLOCK_SIZE] = bytes(BLOCK_SIZE)
            if not number:
                await bench.only(
                    "journal", Severity.DEGRADED, member=replica.member, position=position
                )
        faults = await bench.faults()
        assert len(faults) == 1 + len(replicas)
        assert (faults[0].severity, faults[0].layer, faults[0].block) == (Severity.LOST, 1, block)

    bench_run(scenario)


def test_records_a_replica_lacks_are_one_range() -> None:
    async def scenario(bench: Bench) -> None:
        journal = bench.pool.engine.journal
        replica = journal.replicas[1]
        start = journal.starts[-3]
        for position in range(start, journal.head):
            disk, offset = _ring(bench, replica, position)
            disk.data[offset : offset + BLOCK_SIZE] = bytes(BLOCK_SIZE)
        fault = await bench.only(
            "journal", Severity.DEGRADED, member=replica.member, position=start
        )
        assert f"{journal.head - start} blocks from position {start} on" in fault.text

    bench_run(scenario)


def test_a_record_that_is_nowhere() -> None:
    async def scenario(bench: Bench) -> None:
        journal = bench.pool.engine.journal
        for replica in journal.replicas:
            disk, offset = _ring(bench, replica, journal.starts[-2])
            disk.flip(offset + 30)
        faults = await bench.faults()
        assert [fault.kind for fault in faults] == ["record", "journal", "journal"]
        assert faults[0].severity is Severity.LOST

    bench_run(scenario)


# -- the map ---------------------------------------------------------------------------------


def test_an_entry_that_cannot_be() -> None:
    async def scenario(bench: Bench) -> None:
        block, location, crc = bench.mapped(TAG_STRIPE)[0]
        stripe, row = stripe_of(location), bench.state.row(stripe_of(location))
        journal = bench.pool.engine.journal
        places = [
            (in_stripe(stripe, row.shape.data, 0), "where it has no block"),
            (in_stripe(stripe, 0, row.shape.shard_blocks), "where it has no block"),
            (in_stripe(1 << 30, 0, 0), "does not exist"),
            (in_stripe(bench.row(META).id, 0, 0), "which has pages"),
            (5, "mapped to a place that there cannot be"),
            ((3 << TAG_SHIFT) + 1, "mapped to a place that there cannot be"),
            (JOURNAL | journal.head, "outside of"),
            (JOURNAL | (journal.tail - 1), "outside of"),
        ]
        # The stripe that loses the block counts one less, as if the entry had moved.
        bench.state.table.add_live(stripe, -1)
        for place, text in places:
            bench.remap(block, place, crc)
            fault = await bench.only("entry", Severity.WRONG, layer=1, block=block)
            assert text in fault.text
        bench.remap(block, location, crc)
        bench.state.table.add_live(stripe, 1)
        assert await bench.faults() == []

    bench_run(scenario)


def test_blocks_behind_the_end_of_their_volume() -> None:
    async def scenario(bench: Bench) -> None:
        bench.state.catalog.volumes["v"].size = 1600 * BLOCK_SIZE
        fault = await bench.only("entry", Severity.WRONG, block=1600)
        assert "behind the end of the volume" in fault.text

    bench_run(scenario)


def test_two_entries_with_one_location_in_a_stripe() -> None:
    """R17."""

    async def scenario(bench: Bench) -> None:
        (block, location, crc), (other, its, _) = bench.mapped(TAG_STRIPE)[:2]
        bench.remap(other, location, crc)
        bench.state.table.add_live(stripe_of(its), -1)
        fault = await bench.only("owner", Severity.WRONG, block=other, stripe=stripe_of(location))
        assert f"which is block {block} of volume v" in fault.text

    bench_run(scenario)


def test_two_entries_with_one_location_in_the_journal() -> None:
    async def scenario(bench: Bench) -> None:
        (_, location, crc), (other, _, _) = bench.mapped(TAG_JOURNAL)[-2:]
        bench.remap(other, location, crc)
        await bench.only("owner", Severity.WRONG, position=location & POSITION_MASK)

    bench_run(scenario)


def test_a_checksum_in_the_map_that_is_not_the_stripe_s_or_the_journal_s() -> None:
    async def scenario(bench: Bench) -> None:
        block, location, crc = bench.mapped(TAG_STRIPE)[3]
        bench.remap(block, location, crc ^ 1)
        fault = await bench.only("owner", Severity.WRONG, block=block)
        shard, within = location >> SHARD_SHIFT & SHARD_MASK, location & BLOCK_MASK
        assert f"stripe {stripe_of(location)}, shard {shard}, block {within}" in fault.text
        assert "with another checksum" in fault.text
        bench.remap(block, location, crc)
        block, location, crc = bench.mapped(TAG_JOURNAL)[-1]
        bench.remap(block, location, crc ^ 1)
        await bench.only("entry", Severity.WRONG, position=location & POSITION_MASK, block=block)

    bench_run(scenario)


def test_an_entry_at_a_record_s_header() -> None:
    async def scenario(bench: Bench) -> None:
        block, location, crc = bench.mapped(TAG_JOURNAL)[-1]
        start = bench.pool.engine.journal.start_of(location & POSITION_MASK)
        bench.remap(block, JOURNAL | start, crc)
        await bench.only("entry", Severity.WRONG, position=start, block=block)

    bench_run(scenario)


# -- accounts --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DATA, META])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_live_count_that_is_wrong(kind: int, change: int) -> None:
    async def scenario(bench: Bench) -> None:
        row = bench.row(kind)
        bench.state.table.add_live(row.id, change)
        fault = await bench.only("live", Severity.WRONG, stripe=row.id)
        assert f"stripe {row.id} counts {bench.state.table.live_of(row.id)}" in fault.text

    bench_run(scenario)


def test_a_count_of_mapped_blocks_that_is_wrong() -> None:
    async def scenario(bench: Bench) -> None:
        bench.state.used += 1
        await bench.only("used", Severity.WRONG)

    bench_run(scenario)


def test_a_slot_that_leaked_and_one_that_is_free_although_claimed() -> None:
    async def scenario(bench: Bench) -> None:
        slot = bench.state.members[2].slots.take()
        fault = await bench.only("slot", Severity.WRONG, member=2)
        assert fault.text == f"device 2: slot {slot}: in use, and no stripe claims it"
        bench.state.members[2].slots.give(slot)
        device, slot = bench.row().places[0]
        bench.state.members[device].slots.give(slot)
        fault = await bench.only("slot", Severity.WRONG, member=device)
        assert "claimed by a stripe and counted as free" in fault.text

    bench_run(scenario)


def test_a_slot_that_two_stripes_claim() -> None:
    async def scenario(bench: Bench) -> None:
        rows = [row for row in bench.state.table.stripes() if row.kind == DATA]
        one, other = next(
            (a, b) for a in rows for b in rows
            if a.id < b.id and a.places[0][0] == b.places[0][0]
        )  # fmt: skip
        device, slot = other.places[0]
        bench.state.table.raw(bench.state.table.rows[other.id])["slot"][0] = one.places[0][1]
        bench.state.members[device].slots.give(slot)
        faults = await bench.faults()
        kinds = {fault.kind: fault for fault in faults}
        # The table in use is not the one stored, and the shard is not there.
        assert set(kinds) == {"row", "table", "foreign"}
        assert kinds["row"].text == (
            f"stripe {other.id} claims slot {one.places[0][1]} of device {device}, which is stripe "
            f"{one.id}'s"
        )

    bench_run(scenario)


# -- reading only ----------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "crashed"])
def test_a_pool_that_is_not_served_is_checked_without_a_write(closed: bool) -> None:
    async def scenario(bench: Bench) -> None:
        if closed:
            await bench.pool.close()
        bench.pool = await open_pool(bench.disks, read_only=True)
        assert bench.state.stopped == READ_ONLY
        assert await bench.faults() == []
        region = bench.regions("shard")[0]
        bench.disk(region.device).flip(region.offset)
        await bench.only("block", Severity.DEGRADED)

    bench_run(scenario)


def test_what_was_looked_at_is_counted() -> None:
    async def scenario(bench: Bench) -> None:
        seen: list[tuple[int, int]] = []
        report = await bench.pool.check_report(lambda done, total: seen.append((done, total)))
        checked, state = report.checked, bench.state
        assert (checked.members, checked.superblocks) == (4, 16)
        assert checked.stripes == len(state.table) + len(state.committed.anchors)
        assert checked.shards == 3 * checked.stripes
        assert checked.entries == state.used
        assert checked.records == len(bench.pool.engine.journal.starts)
        pages = len(state.maps[1].pointers) + len(state.directories) + len(state.table_pages)
        assert checked.pages == pages + len(state.committed.top)
        assert seen
        assert all(done <= total for done, total in seen)

    bench_run(scenario)
