"""How much fits is what `docs/operations.md` says, by its formula, its example, and a real pool."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest

from pool import MemberSpec, PoolSpec
from pool.create import _blank_state, _layout
from pool.format.geometry import default_journal_bytes, default_slot_bytes, geometry
from pool.member import MemberState
from pool.state import State
from stripewell.sizes import format_size
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, make_pool, open_pool

GIB = 1024 * MIB
DOCUMENT = " ".join((Path(__file__).parents[3] / "docs/operations.md").read_text().split())


def pool_of(sizes: list[int], data: int, parity: int) -> State:
    """A pool of devices that are never read or written."""
    disks = []
    for size in sizes:
        disks.append(Disk(f"{len(disks)}", 0))
        disks[-1].data = range(size)  # type: ignore[assignment]
    members = [MemberSpec(disk.open()) for disk in disks]
    spec = PoolSpec("tank", data, parity)
    slot, journal = default_slot_bytes(min(sizes)), default_journal_bytes(min(sizes))
    layouts = [_layout(spec, member, slot, journal) for member in members]
    return _blank_state(spec, bytes(16), members, layouts, random.Random(1), journal)


def usable(state: State) -> str:
    return format_size(state.limit * 4 * KIB)


def by_formula(sizes: list[int], data: int, parity: int, slot: int, journal: int) -> int:
    """Usable bytes of devices of one size, as the document has it."""
    superblocks = 4 * (256 * KIB if sizes[0] >= GIB else 64 * KIB)
    slots = (sizes[0] - journal - superblocks) // slot
    stripes = len(sizes) * slots // (data + parity)
    blocks = geometry(data, parity, slot // (4 * KIB)).blocks
    return int(Fraction(88, 100) * (stripes - 16) * blocks) * 4 * KIB


@pytest.mark.parametrize(
    ("sizes", "data", "parity"),
    [([100 * GIB] * 6, 4, 2), ([100 * GIB] * 7, 4, 2), ([64 * MIB] * 3, 2, 1), ([GIB] * 5, 2, 2)],
)
def test_the_formula(sizes: list[int], data: int, parity: int) -> None:
    slot, journal = default_slot_bytes(sizes[0]), default_journal_bytes(sizes[0])
    state = pool_of(sizes, data, parity)
    assert state.limit * 4 * KIB == by_formula(sizes, data, parity, slot, journal)


def test_the_example() -> None:
    state = pool_of([100 * GIB] * 6, 4, 2)
    assert usable(state) == "340.1 GiB"
    assert state.members[0].layout.slots == state.total_stripes() == 408572
    assert state.shape().blocks * 4 == 992
    assert "408572 slots on each and as many stripes, of 992 KiB" in DOCUMENT
    assert "0 B used, 340.1 GiB free, 340.1 GiB in all" in DOCUMENT
    seventh = usable(pool_of([100 * GIB] * 7, 4, 2))
    assert f"A seventh such disk makes it {seventh}." in DOCUMENT
    larger = usable(pool_of([100 * GIB] * 5 + [200 * GIB], 4, 2))
    assert f"If one of the six were of 200 GiB, it would still be {larger}" in DOCUMENT
    state.members[2].state = MemberState.GONE
    state.update_limit()
    assert state.width() == (3, 2)
    assert f"*in all* becomes {usable(state)}" in DOCUMENT


def test_the_sizes_of_headers() -> None:
    """As in: 4 KiB to 8 KiB of 256 KiB, 4 KiB of 64 KiB, 4 KiB of 16 KiB, for codes up to 4+2."""
    codes = [(data, parity) for data in range(1, 5) for parity in (1, 2)]
    for slot, headers in ((256, {1, 2}), (64, {1}), (16, {1})):
        assert {geometry(*code, slot // 4).header_blocks for code in codes} == headers


async def test_a_real_pool() -> None:
    disks = make_disks(3)
    await make_pool(disks, 2, 1)
    pool = await open_pool(disks)
    expected = by_formula([2 * MIB] * 3, 2, 1, slot=16 * KIB, journal=128 * KIB)
    assert pool.status()["capacity_bytes"] == expected
    await pool.close()
