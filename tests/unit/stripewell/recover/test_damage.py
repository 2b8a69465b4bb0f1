"""Which root, how far the journal goes, and what is said when that is not all."""

from __future__ import annotations

import contextlib
import json
import random
import struct

import pytest

from backends.base import BLOCK_SIZE
from stripewell.errors import UserError
from stripewell.recover.restore import restore
from tests.fuzz.anatomy import Anatomy
from tests.fuzz.images import Images, Sample, build, copied
from tests.sim.loop import run
from tests.unit.stripewell.recover.support import Memory, everything, examine, quiet, restored

#: Zeroed at once: some blocks of a slot.
WINDOW = 32 << 10


@pytest.fixture(scope="module")
def sample() -> Sample:
    return run(build(random.Random(3)))


def refusal(images: Images, generation: int | None = None, digest: str | None = None) -> str:
    """The line that the operator gets."""

    async def scenario() -> str:
        with pytest.raises(UserError) as refused:
            await examine(images, generation, digest)
        return str(refused.value)

    return run(scenario())


def spoil(images: Images, anatomy: Anatomy, position: int, count: int = 1) -> None:
    """Make journal blocks unreadable on all replicas."""
    for at in range(position, position + count):
        for device, offset in anatomy.ring(at):
            images[device][offset : offset + BLOCK_SIZE] = bytes(BLOCK_SIZE)


def test_an_old_copy_of_a_device_harms_nothing(sample: Sample) -> None:
    """P7: its shards are verified, its journal is asked last, its root does not count."""

    async def scenario(name: str) -> None:
        images = copied(sample.images)
        images[name][:] = sample.older[name]
        remains = await examine(images)
        assert await everything(remains) == sample.volumes
        assert remains.gaps() == []

    for name in sample.images:
        run(scenario(name))


def test_a_torn_tail_ends_the_journal_and_is_complete(sample: Sample) -> None:
    """The last record was never known to be synced: without it the state before is whole (P3)."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    spoil(images, anatomy, anatomy.records[-1].record.position + 1)

    async def scenario() -> None:
        remains = await examine(images)
        assert remains.gaps() == []
        assert await everything(remains) == sample.history[-2]

    run(scenario())


def test_synced_records_that_are_gone_are_damage(sample: Sample) -> None:
    """R2: a record below a known `durable` is missing. What is before it is a whole prefix."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    first, second, third = (at.record for at in anatomy.records[:3])
    assert third.durable >= second.end > second.position >= first.end
    spoil(images, anatomy, second.position)

    async def scenario() -> None:
        remains = await examine(images)
        [gap] = remains.gaps()
        last = max(at.record.durable for at in anatomy.records)
        what = f"records from {first.end} to {last} were synced and cannot be read"
        assert what in gap
        assert await everything(remains) == sample.history[1]

    run(scenario())


def test_a_synced_block_that_is_gone_is_one_lost_block(sample: Sample) -> None:
    """Below `durable` a record is believed by its header: the rest of the journal still counts."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    written = anatomy.records[1].record
    assert written.extents[0].kind == 1
    spoil(images, anatomy, written.end - 1)
    anatomy.root["streams"][0]["durable"] = written.end
    anatomy.write_root(anatomy.root)

    async def scenario() -> None:
        remains = await examine(images)
        assert remains.gaps() == []
        assert remains.chain.end == anatomy.records[-1].record.end
        # `late` block 8 was zeroed later, so nothing of it is lost in the end.
        assert await everything(remains) == sample.volumes

    run(scenario())


def test_one_good_replica_is_enough(sample: Sample) -> None:
    async def scenario(device: str) -> None:
        images = copied(sample.images)
        anatomy = Anatomy(images)
        for at in anatomy.records:
            for position in range(at.record.position, at.record.end):
                for name, offset in anatomy.ring(position):
                    if name == device:
                        images[name][offset] ^= 1
        remains = await examine(images)
        assert await everything(remains) == sample.volumes
        assert remains.gaps() == []

    for device, _ in Anatomy(copied(sample.images)).ring(0):
        run(scenario(device))


def test_a_fork_is_refused_and_the_operator_chooses(sample: Sample) -> None:
    """R19: two roots of one generation, none on a quorum."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    anatomy.root["writer"] = "f" * 32
    for name in ("a", "b"):
        anatomy.write_root(anatomy.root, only=name)
    said = refusal(images)
    assert "two histories" in said
    assert "--digest" in said
    digests = {copy.block.digest for copy in Anatomy(images).newest}
    assert all(digest[:8] in said for digest in digests)
    assert said.count("memory:a") == 1

    async def scenario(digest: str) -> None:
        remains = await examine(copied(images), digest=digest[:8])
        assert any("chosen by hand" in gap for gap in remains.gaps())
        assert await everything(remains) == sample.volumes

    for digest in digests:
        run(scenario(digest))
    assert "no device has that root" in refusal(images, digest="0000")


def test_a_root_on_its_quorum_beats_a_fork(sample: Sample) -> None:
    images = copied(sample.images)
    anatomy = Anatomy(images)
    anatomy.root["writer"] = "f" * 32
    anatomy.write_root(anatomy.root, only="d")

    async def scenario() -> None:
        remains = await examine(images)
        assert len(remains.chosen.on) == 3
        assert remains.gaps() == []
        assert await everything(remains) == sample.volumes

    run(scenario())


def test_an_unusable_root_is_named_and_an_older_one_can_be_chosen(sample: Sample) -> None:
    images = copied(sample.images)
    anatomy = Anatomy(images)
    newest = anatomy.root["generation"]
    anatomy.root["code"]["parity"] = 0
    anatomy.write_root(anatomy.root)
    said = refusal(images)
    assert f"generation {newest}" in said
    assert "code.parity" in said
    assert "--generation" in said

    async def scenario() -> None:
        remains = await examine(copied(images), generation=newest - 1)
        assert remains.root.generation == newest - 1
        assert any("chosen by hand" in gap for gap in remains.gaps())

    run(scenario())
    assert "there are: generation" in refusal(images, generation=newest + 1)


def test_a_lost_checkpoint_is_named(sample: Sample) -> None:
    images = copied(sample.images)
    for region in Anatomy(images).regions():
        if region.structure == "stripe header":
            images[region.device][region.offset] ^= 1
        if region.structure == "top page":
            images[region.device][region.offset] ^= 1
    assert "its checkpoint is lost: part 0 of the top page" in refusal(images)


def test_a_lost_leaf_and_a_lost_directory_are_lost_blocks(sample: Sample) -> None:
    async def scenario(structure: str) -> tuple[int, int]:
        images = copied(sample.images)
        for region in Anatomy(images).regions():
            if region.structure in ("stripe header", structure):
                images[region.device][region.offset] ^= 1
        remains = await examine(images)
        _, finding = await restored(remains, "beta")
        examined = await remains.examine(finding.volume)
        assert examined.lost.blocks == finding.lost.blocks
        return finding.lost.blocks, finding.volume.size // BLOCK_SIZE

    lost, _ = run(scenario("leaf page"))
    everything_lost, size = run(scenario("directory page"))
    assert 0 < lost <= everything_lost <= size


def test_what_cannot_be_taken_back_ends_before_the_first_loss(sample: Sample) -> None:
    """Two devices lose the same window of slots: what is written is right, up to the loss."""

    async def ends(images: Images) -> set[int]:
        remains, found = await examine(images), set()
        for name, content in sample.volumes.items():
            sink = Memory()
            finding = await restore(remains, remains.volume(name), sink, quiet, stop=True)
            end = len(content)
            if finding.lost.blocks:
                end = finding.lost.kept[0][0] * BLOCK_SIZE
                found.add(end)
            assert sink.content(end) == content[:end]
        return found

    found = set()
    slots = range(512 << 10, len(sample.images["c"]) - WINDOW, WINDOW)
    for start in slots:
        images = copied(sample.images)
        for name in "cd":
            images[name][start : start + WINDOW] = bytes(WINDOW)
        with contextlib.suppress(UserError):
            found |= run(ends(images))
    assert any(found)


def test_headers_of_another_attempt_are_not_mixed(sample: Sample) -> None:
    """R15: one shard's header has other checksums, and its own is right; the others decode."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    for stripe in list(anatomy.stripes.values()):
        header = anatomy.stripe_header(stripe, 0)
        if header is not None:
            block = bytearray(header)
            block[128] ^= 1
            anatomy.write_stripe_header(stripe, 0, bytes(block))

    async def scenario(missing: str) -> None:
        left = {name: image for name, image in copied(images).items() if name != missing}
        remains = await examine(left)
        found = {name: await restored(remains, name) for name in remains.catalog.volumes}
        for name, (data, finding) in found.items():
            if not finding.lost.blocks:
                assert data == sample.volumes[name]

    for missing in images:
        run(scenario(missing))


def test_devices_of_two_pools_are_refused(sample: Sample) -> None:
    images = copied(sample.images)
    anatomy = Anatomy(images)
    for copy in anatomy.copies:
        if copy.device == "d":
            head = bytearray(images["d"][copy.offset : copy.offset + 256])
            head[32:48] = bytes(16)
            anatomy.write_head(copy, bytes(head))
    said = refusal(images)
    assert "different pools" in said
    assert "00000000 on memory:d" in said


def test_no_pool_at_all() -> None:
    said = refusal({"x": bytearray(1 << 20), "y": bytearray(b"\xff" * (1 << 20))})
    assert "none of these holds a pool" in said
    assert "memory:x: no superblock" in said


def test_a_newer_root_may_have_been_where_no_root_can_be_read(sample: Sample) -> None:
    """A root that was committed is on more than m devices: with as many slots gone, who knows."""

    async def gaps(devices: str) -> list[str]:
        images = copied(sample.images)
        anatomy = Anatomy(images)
        for copy in anatomy.copies:
            if copy.device in devices and copy.block.generation < anatomy.root["generation"]:
                images[copy.device][copy.offset] ^= 1
        remains = await examine(images)
        assert await everything(remains) == sample.volumes
        assert len(remains.damaged()) == len(devices)
        return remains.gaps()

    assert run(gaps("b")) == []
    [gap] = run(gaps("bd"))
    assert "root slots of 2 devices cannot be read (members 1, 3): a newer root may" in gap


def test_a_newer_format_is_refused(sample: Sample) -> None:
    """A feature that this version does not know is never guessed at."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    for copy in anatomy.copies:
        head = bytearray(images[copy.device][copy.offset : copy.offset + 256])
        if copy.device == "b":
            struct.pack_into("<H", head, 8, 2)
            anatomy.write_head(copy, bytes(head))
    assert "memory:b: it is of revision 2" in refusal(images)


def test_a_volume_with_a_parent_is_refused_and_the_others_are_not(sample: Sample) -> None:
    images = copied(sample.images)
    anatomy = Anatomy(images)
    top = next(at for at in anatomy.pages if at.page.kind == 4)
    found = json.loads(bytes(top.page.body))
    layer = next(v["layer"] for v in found["catalog"]["volumes"] if v["name"] == "alpha")
    next(row for row in found["catalog"]["layers"] if row["id"] == layer)["parent"] = 1
    anatomy.write_page(top, json.dumps(found, separators=(",", ":")).encode())

    async def scenario() -> None:
        remains = await examine(images)
        with pytest.raises(UserError, match="parent layer, made by something newer"):
            remains.volume("alpha")
        assert (await restored(remains, "beta"))[0] == sample.volumes["beta"]

    run(scenario())


def test_a_device_that_was_copied_to_a_larger_one_is_known(sample: Sample) -> None:
    """Its second end lies in the middle; the first may be gone."""
    images = copied(sample.images)
    images["a"][: 128 << 10] = bytes(128 << 10)
    images["b"] += bytes(1 << 20)

    async def scenario() -> None:
        remains = await examine(images)
        assert sorted(remains.members) == [0, 1, 2, 3]
        assert await everything(remains) == sample.volumes

    run(scenario())


def test_a_device_without_a_superblock_is_known_by_its_stripes(sample: Sample) -> None:
    """What a partitioning tool leaves: both ends overwritten. Its shards still count, and its
    journal as far as the chain proves it."""
    ends = 128 << 10

    def beheaded(names: str) -> Images:
        images = copied(sample.images)
        for name in names:
            images[name][:ends] = bytes(ends)
            images[name][-ends:] = bytes(ends)
        return images

    async def one(name: str) -> None:
        remains = await examine(beheaded(name))
        assert remains.headless == {"abcd".index(name)}
        assert remains.gaps() == []
        assert await everything(remains) == sample.volumes

    async def two(names: str) -> None:
        remains = await examine(beheaded(names))
        assert len(remains.headless) == 2
        assert "2 devices are missing, or have no superblock" in remains.gaps()[0]
        assert await everything(remains) == sample.volumes

    for name in sample.images:
        run(one(name))
    for names in ("ab", "cd", "ad"):
        run(two(names))


def test_a_device_that_was_cut_is_used_as_far_as_it_goes(sample: Sample) -> None:
    images = copied(sample.images)
    del images["c"][len(images["c"]) // 2 :]

    async def scenario() -> None:
        remains = await examine(images)
        assert 2 in remains.members
        assert await everything(remains) == sample.volumes

    run(scenario())


def test_a_copy_beside_its_original_is_not_used(sample: Sample) -> None:
    images = copied(sample.images) | {"again": bytearray(sample.images["a"])}

    async def scenario() -> None:
        remains = await examine(images)
        [source] = [one for one in remains.sources if one.trouble]
        assert "named twice" in source.trouble
        assert await everything(remains) == sample.volumes

    run(scenario())


def test_a_pool_that_is_written_to_meanwhile_is_noticed(sample: Sample) -> None:
    images = copied(sample.images)

    async def scenario() -> None:
        remains = await examine(images)
        assert not await remains.changed()
        anatomy = Anatomy(images)
        anatomy.root["generation"] += 1
        anatomy.write_root(anatomy.root)
        assert await remains.changed()

    run(scenario())
