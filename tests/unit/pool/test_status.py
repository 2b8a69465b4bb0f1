"""What status says of a pool that lacks devices or space: the worst that is true, and all of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from backends.fault_script import OPERATIONS, READS, Fail, Rule, Vanish
from backends.faults import FaultyDevice
from pool import Pool
from pool.absent import NOT_LOOKED_FOR
from pool.errors import PoolFull
from pool.member import MemberState
from pool.mover import InlineMover
from tests.unit.pool.support import MIB, Disk, make_disks, make_pool, open_pool, write


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    """2+1 on four disks, with stripes."""
    disks = make_disks(4)
    await make_pool(disks, 2, 1)
    pool = await open_pool(disks)
    await pool.create_volume("v", MIB)
    await write(pool, "v", 0, b"x" * (MIB // 8))
    await pool.checkpoint()
    yield pool
    for member in pool.engine.state.members.values():
        member.state = MemberState.ACTIVE
    await pool.close()


def lose(pool: Pool, *indices: int) -> dict[str, Any]:
    """The status once these members are gone."""
    for index in indices:
        pool.engine.state.members[index].state = MemberState.GONE
    return pool.status()


def test_as_many_missing_as_may_be(pool: Pool) -> None:
    assert pool.status()["state"] == "healthy"
    status = lose(pool, 0)
    assert status["state"] == "degraded"
    assert status["stripes"]["lost"] == 0
    assert any(line.endswith("is missing: it was not found") for line in status["problems"])


def test_more_missing_than_may_be(pool: Pool) -> None:
    status = lose(pool, 0, 1, 2)
    lost = status["stripes"]["lost"]
    assert status["state"] == "failed"
    assert lost == status["stripes"]["total"] > 0
    assert status["problems"][0].startswith(f"3 devices are missing, 1 can be: {lost} stripe")


def test_full_before_the_last_block_is_taken(pool: Pool) -> None:
    state = pool.engine.state
    state.limit = state.used + 1000
    assert pool.status()["state"] == "healthy"
    with pytest.raises(PoolFull):
        state.reserve(1001)
    assert pool.status()["state"] == "full"
    assert any(line.startswith("the pool is full") for line in pool.status()["problems"])
    state.limit += 1
    assert pool.status()["state"] == "healthy"
    state.limit = state.used
    assert pool.status()["state"] == "full"


def test_full_and_failed_at_once(pool: Pool) -> None:
    pool.engine.state.limit = 0
    status = lose(pool, 0, 1)
    assert status["state"] == "failed"
    assert any("the pool is full" in line for line in status["problems"])


async def opened(disks: list[Disk], absent: dict[str, str]) -> AsyncIterator[Pool]:
    """The pool of these disks, opened to be written and again to be looked at."""
    for read_only in (False, True):
        pool = await Pool.open(
            [disk.open() for disk in disks], mover=InlineMover(), rng=random.Random(1),
            read_only=read_only, absent=absent,
        )  # fmt: skip
        yield pool
        await pool.close()


def why(pool: Pool, index: int) -> str:
    """Why a member is missing, in both places where status says it."""
    status = pool.status()
    [line] = [text for text in status["problems"] if text.startswith(f"device {index} (")]
    reason: str = status["devices"][index]["reason"]
    assert line.endswith(f" is missing: {reason}")
    return line


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ({"memory:b": "memory:b does not exist"}, "memory:b does not exist"),
        ({"/moved/b": "/moved/b does not exist"}, "/moved/b does not exist"),
        ({"memory:b": "one", "/moved/x": "two"}, "one"),
        ({"/moved/b": "one", "/moved/x": "two"}, "one; two"),
        ({}, NOT_LOOKED_FOR),
    ],
)
async def test_a_missing_device_is_explained_by_what_was_found(
    absent: dict[str, str], said: str
) -> None:
    disks = make_disks(4)
    await make_pool(disks, 2, 1)
    async for pool in opened([disks[0], *disks[2:]], absent):
        assert why(pool, 1) == f"device 1 (last seen at memory:b) is missing: {said}"


async def test_a_wrong_medium_in_the_place_of_a_device_is_named() -> None:
    disks = make_disks(4)
    await make_pool(disks, 2, 1)
    kept = bytes(disks[1].data)
    disks[1].data[:] = bytes(len(kept))
    async for pool in opened(disks, {}):
        assert "memory:b holds nothing of a pool: put the right device there" in why(pool, 1)
    disks[1].data[:] = kept
    disks[1].script.add(Rule(READS, Fail(), times=None))
    async for pool in opened(disks, {}):
        assert "memory:b" in why(pool, 1).partition("missing: ")[2]
        assert "Errno" not in why(pool, 1)


async def test_a_device_that_was_expelled_is_told_in_words(pool: Pool) -> None:
    disk = pool.engine.state.members[1].backend
    assert isinstance(disk, FaultyDevice)
    disk.script.add(Rule(OPERATIONS, Vanish()))
    await pool.checkpoint()
    await pool.engine.membership.settled()
    line = why(pool, 1)
    assert line.startswith("device 1 (memory:b) is missing: memory:b has vanished")
    assert "bring it back" in line
    assert "Errno" not in line
