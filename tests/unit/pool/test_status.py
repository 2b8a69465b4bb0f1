"""What status says of a pool that lacks devices or space: the worst that is true, and all of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool import Pool
from pool.errors import PoolFull
from pool.member import MemberState
from tests.unit.pool.support import MIB, make_disks, make_pool, open_pool, write


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
