"""What maintenance does next: the table of cases, and that it never stands in the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import DataLost
from pool.maintenance import STEP_STRIPES, Situation, Step, decide
from pool.state import RESERVE_STRIPES
from tests.sim.loop import run
from tests.unit.pool.support import MIB, make_disks, make_pool, open_pool

CALM = Situation(
    journal_size=1024, journal_used=300, journal_unpacked=300, stripe_blocks=12, free=900,
    total=1000, dead=0, collectable=True, dropped_layer=False, dirty_seconds=1.0,
    waiting_writers=False, starved=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, Step.DESTAGE),
        ({"journal_unpacked": 256}, Step.WAIT),
        ({"quiet": False}, Step.WAIT),
        ({"quiet": False, "journal_used": 400, "journal_unpacked": 400}, Step.DESTAGE),
        ({"starved": True}, Step.WAIT),
        ({"starved": True, "journal_used": 600, "journal_unpacked": 600}, Step.DRAIN),
        ({"journal_unpacked": 10, "waiting_writers": True, "journal_used": 10}, Step.DRAIN),
        ({"journal_unpacked": 0, "waiting_writers": True}, Step.CHECKPOINT),
        ({"journal_used": 900}, Step.CHECKPOINT),
        ({"journal_used": 500}, Step.DESTAGE),
        ({"journal_unpacked": 0, "dirty_seconds": 31.0}, Step.CHECKPOINT),
        ({"dropped_layer": True}, Step.DROP),
        ({"free": 40}, Step.COLLECT),
        ({"free": 40, "collectable": False}, Step.DESTAGE),
        ({"free": 40, "dead": 60}, Step.CHECKPOINT),
        ({"free": 4, "dead": 1}, Step.CHECKPOINT),
        ({"free": 4, "collectable": False}, Step.WAIT),
        ({"free": 4, "collectable": False, "dirty_seconds": 31.0}, Step.CHECKPOINT),
        ({"free": 4, "dropped_layer": True, "collectable": False}, Step.DROP),
    ],
)
def test_cases(change: dict[str, Any], wanted: Step) -> None:
    assert decide(replace(CALM, **change)) is wanted


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    size = draw(st.sampled_from([16, 32, 256, 65536]))
    used = draw(st.integers(0, size))
    total = draw(st.integers(4 * RESERVE_STRIPES, 2000))
    free = draw(st.one_of(st.integers(0, 20), st.integers(0, total)).filter(lambda n: n <= total))
    dead = draw(st.integers(0, total - free))
    flags = [draw(st.booleans()) for _ in range(5)]
    return Situation(
        size, used, draw(st.integers(0, used)), draw(st.integers(1, 2000)), free, total, dead,
        flags[0], flags[1], draw(st.floats(0, 60)), *flags[2:],
    )  # fmt: skip


@given(situations())
def test_it_never_waits_while_writers_wait_and_something_can_be_done(now: Situation) -> None:
    now = replace(now, waiting_writers=True)
    can_release = now.journal_used > now.journal_unpacked
    can_pack = now.journal_unpacked > 0 and now.free > RESERVE_STRIPES
    can_free = now.journal_unpacked > 0 and now.free <= RESERVE_STRIPES and now.dead > 0
    if can_release or can_pack or can_free or now.dropped_layer:
        assert decide(now) is not Step.WAIT


@given(situations())
def test_it_never_packs_into_the_reserve(now: Situation) -> None:
    if decide(now) in (Step.DESTAGE, Step.DRAIN):
        assert now.free > RESERVE_STRIPES
        assert now.journal_unpacked


@given(situations())
def test_a_checkpoint_always_has_a_reason(now: Situation) -> None:
    """Or the loop would write one after the other without end."""
    if decide(now) is Step.CHECKPOINT:
        releases = now.journal_used > now.journal_unpacked
        assert releases or now.dead or now.dirty_seconds > 30.0


@given(situations())
def test_waiting_writers_get_room_in_a_bounded_number_of_steps(now: Situation) -> None:
    """Every step as it is when all goes well, until the journal is empty or nothing can be done."""
    now = replace(now, waiting_writers=True, dirty_seconds=0.0, dropped_layer=False)
    for _ in range(10_000):
        step = decide(now)
        if step is Step.WAIT or now.journal_used == 0:
            break
        now = perform(now, step)
    else:
        pytest.fail(f"no end: {now}")
    stuck = now.free <= RESERVE_STRIPES and not now.dead and not now.collectable
    assert now.journal_used == 0 or stuck


def perform(now: Situation, step: Step) -> Situation:
    """What a step does to the situation."""
    if step is Step.CHECKPOINT:
        return replace(
            now, journal_used=now.journal_unpacked, free=now.free + now.dead, dead=0,
            collectable=False,
        )  # fmt: skip
    if step is Step.COLLECT:
        return replace(now, collectable=False)
    room = min(STEP_STRIPES * now.stripe_blocks, now.journal_unpacked)
    packed = room if step is Step.DRAIN else room - room % now.stripe_blocks
    stripes = -(-packed // now.stripe_blocks)
    if not packed:
        return replace(now, starved=True)
    return replace(
        now, journal_unpacked=now.journal_unpacked - packed, free=max(0, now.free - stripes)
    )


def test_a_large_batch_with_a_little_left_over_does_not_spin() -> None:
    """A record is released as a whole: one with a live block at its end holds all of it."""

    async def scenario() -> dict[str, int]:
        disks = make_disks(5, 8 * MIB)
        await make_pool(disks, 2, 2, journal=MIB)
        pool = await open_pool(disks)
        await pool.create_volume("v", 4 * MIB)
        volume = pool.volume("v")
        for number in range(140):
            assert volume.try_write(number * 8192, memoryview(bytes([number]) * 4096))
        volume.commit()
        await asyncio.sleep(20)
        counters: dict[str, int] = pool.status()["counters"]
        await pool.close()
        return counters

    counters = run(scenario())
    assert counters["destaged_extents"] >= 140
    assert counters["checkpoints"] <= 3


def test_writers_do_not_wait_for_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be packed because a leaf cannot be read: a full journal is an error, no hang."""

    async def lost(*_: object, **__: object) -> int:
        raise DataLost("a page fails its checksum")

    async def scenario() -> None:
        disks = make_disks(4)
        await make_pool(disks, 2, 1)
        pool = await open_pool(disks)
        await pool.create_volume("v", MIB)
        monkeypatch.setattr("pool.maintenance.destage", lost)

        async def fill() -> None:
            for block in range(200):
                data = memoryview(block.to_bytes(4, "little") * 1024)
                await pool.volume("v").write(block * 4096, data)

        with pytest.raises(OSError, match="full"):
            await fill()
        assert "fails its checksum" in pool.status()["problems"][0]
        await pool.close()

    run(scenario())
