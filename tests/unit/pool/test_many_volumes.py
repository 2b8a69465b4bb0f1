"""A catalog of many volumes in small slots: the top page has as many parts as it needs."""

from __future__ import annotations

import pytest

from backends.base import BLOCK_SIZE
from pool import state
from pool.catalog import VOLUMES_MAX
from pool.errors import PoolError
from tests.sim.loop import run
from tests.unit.pool.support import MIB, make_disks, make_pool, open_pool, read, write

COUNT = 1200


def test_more_than_a_thousand_volumes_in_slots_of_16_kib() -> None:
    """They are there after a clean end, and after a crash with one device less (P8)."""

    async def scenario() -> None:
        disks = make_disks(3, 16 * MIB)
        await make_pool(disks, 2, 1, journal=MIB)
        pool = await open_pool(disks)
        names = [f"volume-{number:04}".ljust(64, "x") for number in range(COUNT)]
        for name in names:
            await pool.create_volume(name, MIB)
        await write(pool, names[-1], 0, b"last" * 1024)
        await pool.close()
        parts = pool.engine.state.committed.top
        assert len(parts) > 8
        assert [pointer.length <= 6 * BLOCK_SIZE for pointer in parts] == [True] * len(parts)
        pool = await open_pool(disks)
        assert await pool.check() == []
        await pool.delete_volume(names[0])
        await pool.checkpoint()
        await pool.create_volume("new", MIB)
        # A crash: nothing is closed.
        pool = await open_pool(disks[1:])
        assert [info.name for info in pool.volumes()] == ["new", *names[1:]]
        assert await read(pool, names[-1], 0, BLOCK_SIZE) == b"last" * 1024
        await pool.close()

    run(scenario())


@pytest.mark.parametrize(
    ("size", "each", "reason"),
    [
        (2 * MIB, 400_000, "the pool is too small for 2 volumes: delete volumes"),
        (32 * MIB, 5_200_000, "slots of 16 KiB are too small for 2 volumes, the root cannot name"),
    ],
)
def test_volumes_that_no_checkpoint_could_hold_are_refused(
    size: int, each: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of them is journaled."""

    async def scenario() -> None:
        disks = make_disks(6, size)
        await make_pool(disks, 2, 1)
        pool = await open_pool(disks)
        monkeypatch.setattr(state, "VOLUME_BYTES", each)
        await pool.create_volume("one", MIB)
        with pytest.raises(PoolError, match=reason):
            await pool.create_volume("two", MIB)
        monkeypatch.undo()
        await pool.create_volume("two", MIB)
        await pool.close()

    run(scenario())


def test_the_limit_holds_for_the_smallest_slots_of_a_usual_code() -> None:
    """All the volumes that the catalog allows fit a root of 64 KiB."""

    async def scenario() -> None:
        disks = make_disks(6, 64 * MIB)
        await make_pool(disks, 2, 1)
        pool = await open_pool(disks)
        catalog = pool.engine.state.catalog
        await pool.create_volume("v", MIB)
        layers = dict(catalog.layers)
        catalog.layers = dict.fromkeys(range(VOLUMES_MAX - 1), layers[1])
        pool.engine.state.check_new_volume()
        catalog.layers = layers
        await pool.close()

    run(scenario())
