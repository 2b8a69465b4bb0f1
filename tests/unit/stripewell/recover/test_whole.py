"""P2, P8: what the engine served, recover gives back, from any set of devices that suffices."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest

from backends.base import BLOCK_SIZE
from backends.memory import MemoryStore
from stripewell.errors import UserError
from stripewell.recover.remains import Remains
from tests.fuzz.images import Images, Sample, build, copied
from tests.sim.loop import run
from tests.unit.pool.support import MIB
from tests.unit.stripewell.recover.support import (
    everything,
    examine,
    examine_backends,
    restored,
)
from tests.vectors.reader import Reader
from tests.vectors.test_vectors import DEGRADED, backends, images, manifest

#: Devices, data and parity shards, bytes of a device.
CODES = [(4, 2, 1, 3 * MIB // 2), (5, 2, 2, 3 * MIB // 2), (3, 1, 2, 3 * MIB), (6, 4, 2, 2 * MIB)]


@pytest.fixture(
    scope="module", params=range(len(CODES)), ids=lambda i: "{}: {}+{}".format(*CODES[i])
)
def pool(request: pytest.FixtureRequest) -> tuple[Sample, int]:
    """A pool after a random life and a crash, and how many devices it may lack."""
    devices, data, parity, size = CODES[request.param]
    rng = random.Random(f"whole {request.param}")
    return run(build(rng, devices=devices, data=data, parity=parity, device_bytes=size)), parity


def without(whole: Images, missing: tuple[str, ...]) -> Images:
    return {name: image for name, image in copied(whole).items() if name not in missing}


def test_any_devices_may_be_missing_up_to_m(pool: tuple[Sample, int]) -> None:
    sample, parity = pool

    async def scenario(missing: tuple[str, ...]) -> None:
        remains = await examine(without(sample.images, missing))
        assert await everything(remains) == sample.volumes
        assert remains.gaps() == []
        assert remains.problems.lines == []
        assert {member.url for member in remains.missing()} == {f"memory:{n}" for n in missing}

    for count in range(parity + 1):
        for missing in itertools.combinations(sample.images, count):
            run(scenario(missing))


def test_with_more_missing_what_is_there_is_right_and_the_rest_is_named(
    pool: tuple[Sample, int],
) -> None:
    sample, parity = pool
    lost = 0

    async def scenario(missing: tuple[str, ...]) -> int:
        try:
            remains = await examine(without(sample.images, missing))
        except UserError:
            return 1  # the checkpoint itself is lost
        assert any("missing" in gap for gap in remains.gaps())
        return sum([await compare(remains, name) for name in remains.catalog.volumes])

    async def compare(remains: Remains, name: str) -> int:
        data, finding = await restored(remains, name)
        examined = await remains.examine(finding.volume)
        assert (examined.lost.blocks, examined.data) == (finding.lost.blocks, finding.data)
        gone = {n for first, end in finding.lost.kept for n in range(first, end)}
        for block in range(len(data) // BLOCK_SIZE):
            here = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            assert block in gone or data[here] in {
                state[name][here] for state in sample.history if name in state
            }
        return finding.lost.blocks

    for missing in itertools.combinations(sample.images, parity + 1):
        lost += run(scenario(missing))
    assert lost


def test_records_behind_the_last_flush_are_taken_and_counted() -> None:
    """P3: they were acknowledged, and they are there."""
    sample = run(build(random.Random(5), flushed=False))

    async def scenario() -> None:
        remains = await examine(copied(sample.images))
        assert await everything(remains) == sample.volumes
        assert remains.gaps() == []
        assert len(remains.chain.loose) >= 3
        assert remains.chain.durable < remains.chain.end

    run(scenario())


@pytest.mark.parametrize(("name", "missing"), DEGRADED)
def test_golden_pools(name: str, missing: int | None) -> None:
    """Object stores, narrow stripes, members that returned, a top page in parts."""
    found = images(name, missing)
    reader = Reader(list(found.values()))

    async def scenario() -> None:
        remains = await examine_backends(await backends(found))
        read = await everything(remains)
        assert remains.gaps() == []
        assert remains.damaged() == []
        assert read == {volume: reader.volume(volume) for volume in reader.volumes}
        digests = {
            volume: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for volume, data in read.items()
        }
        assert digests == manifest(name)["volumes"]

    run(scenario())


def test_nothing_is_written_to_a_store_either() -> None:
    async def scenario() -> None:
        opened = await backends(images("store"))
        [store] = [one for one in opened if isinstance(one, MemoryStore)]
        before = dict(store._objects)
        await everything(await examine_backends(opened))
        assert before
        assert store._objects == before

    run(scenario())
