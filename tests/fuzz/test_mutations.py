"""The spoilers themselves: they reach every structure, and what they forge still validates."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.anatomy import Anatomy
from tests.fuzz.images import Sample, build, copied, disks
from tests.fuzz.mutations import FORGERIES, Mutation, damage, mutate
from tests.sim.loop import run
from tests.unit.pool.support import open_pool

STRUCTURES = {
    "superblock head",
    "root",
    "stripe header",
    "shard",
    "top page",
    "table page",
    "directory page",
    "leaf page",
    "journal header",
    "journal payload",
}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return run(build(random.Random(1)))


def test_every_structure_is_found(sample: Sample) -> None:
    regions = Anatomy(sample.images).regions()
    assert {region.structure for region in regions} == STRUCTURES
    for region in regions:
        end = region.offset + region.length
        assert 0 <= region.offset < end <= len(sample.images[region.device])


def test_the_images_are_a_sound_pool(sample: Sample) -> None:
    async def scenario() -> None:
        pool = await open_pool(disks(copied(sample.images)), read_only=True)
        assert await pool.check() == []
        assert {info.name for info in pool.volumes()} == {"alpha", "beta", "late"}
        await pool.close()

    run(scenario())


def test_rewriting_a_structure_as_it_is_changes_nothing(sample: Sample) -> None:
    """What `write_*` mends is what the engine writes, so a forged value is all that differs."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    for copy in anatomy.newest:
        anatomy.write_head(copy, bytes(images[copy.device][copy.offset : copy.offset + 256]))
    anatomy.write_root(anatomy.root)
    for at in anatomy.pages:
        anatomy.write_page(at, bytes(at.page.body))
        anatomy = Anatomy(images)
    anatomy.write_records([at.block for at in anatomy.records])
    assert images == sample.images


@pytest.mark.parametrize("forgery", sorted(set(FORGERIES), key=lambda one: one.__name__))
def test_a_forgery_changes_the_images_and_keeps_their_checksums(
    forgery: Mutation, sample: Sample
) -> None:
    changed = 0
    for seed in range(12):
        images = copied(sample.images)
        try:
            assert forgery(images, random.Random(seed))
        except ValueError:
            continue
        changed += images != sample.images
    assert changed >= 6


def test_same_seed_same_mutation(sample: Sample) -> None:
    for seed in range(20):
        one, other = copied(sample.images), copied(sample.images)
        said = mutate(one, random.Random(seed), sample.older)
        assert said == mutate(other, random.Random(seed), sample.older)
        assert one == other


def test_damage_reaches_every_structure(sample: Sample) -> None:
    said = " ".join(
        damage(copied(sample.images), random.Random(seed), sample.older) for seed in range(120)
    )
    assert all(structure in said for structure in (*STRUCTURES, "device"))
