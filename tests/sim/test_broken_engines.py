"""Engines that are broken on purpose: the simulation must catch each, or the oracle is too weak.

Each entry removes one rule (R1, R5, R11, R13, R21) from the engine; crashes and seeds are tried
until one is judged a violation, or raises, and no more than `TRIES` may be needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pool import columns, moving, reader, stripe_writer, volume
from pool.blockmap import LEAF_MASK, Leaf
from pool.checkpoint import Checkpoint
from pool.columns import U32, U64
from pool.errors import PoolError
from pool.journal import Journal
from pool.state import State
from pool.table import Stripe

from .loop import Deadlock, run
from .oracle import SECTOR, Violation
from .scenarios import crash_at
from .seeds import run_seed
from .test_engine_faults import rotting_life
from .world import BLOCK_SECTORS, SMALL, Rig

TRIES = 320
Patch = pytest.MonkeyPatch


async def flushed_life(seed: int) -> None:
    """Small writes are flushed, the power fails at once, and the device that took them first is
    lost with it (P2): what a flush was answered for is on the others."""
    rig = Rig(seed, SMALL)
    await rig.create()
    client = await rig.open()
    await client.create("a", 64 * BLOCK_SECTORS * SECTOR)
    for block in range(seed % 7 + 1):
        await client.write("a", block * BLOCK_SECTORS, BLOCK_SECTORS)
    await client.flush("a")
    primary = client.pool.engine.journal.replicas[0].member
    rig.end_life(power=True, fate="lost")
    rig.missing = rig.unlucky = {f"d{primary}"}
    await rig.verify(await rig.open())


def cases() -> Iterator[Callable[[], object]]:
    """Crashes and seeds in turn, always the same ones."""
    for i in range(TRIES // 5):
        yield lambda i=i: run(flushed_life(i))  # type: ignore[misc]
        yield lambda i=i: run(rotting_life(SMALL, i))  # type: ignore[misc]
        yield lambda i=i: crash_at("brief", 1 + (700 - 24 * i) % 701)  # type: ignore[misc]
        yield lambda i=i: crash_at("eventful", 900 + 193 * i)  # type: ignore[misc]
        yield lambda i=i: run_seed(9 + i)  # type: ignore[misc]


def flush_answers_early(patch: Patch) -> None:
    """R5: a flush does not wait for the replicas."""

    def flush(self: Journal, position: int | None = None) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        waiter.set_result(None)
        return waiter

    patch.setattr(Journal, "flush", flush)


def one_replica_is_durable(patch: Patch) -> None:
    """R5: a flush waits for one replica only."""
    durable = property(lambda self: max(replica.synced for replica in self.replicas))
    patch.setattr(Journal, "durable", durable)


def slots_are_free_at_once(patch: Patch) -> None:
    """R21: the slots of dead stripes are used again by the very checkpoint that lets go of them."""

    def next_rows(self: Checkpoint, frozen: Any, directories: Any) -> tuple[list[int], Any]:
        dead, rows = found(self, frozen, directories)
        for stripe in dead:
            released(self._moving.state, self._moving.state.table.get(stripe))
            early.add(stripe)
        return dead, rows

    def release(self: State, row: Stripe) -> None:
        if row.id in early:
            early.remove(row.id)
        else:
            released(self, row)

    early: set[int] = set()
    found, released = Checkpoint._next_rows, State.release
    patch.setattr(Checkpoint, "_next_rows", next_rows)
    patch.setattr(State, "release", release)


def the_journal_is_free_at_once(patch: Patch) -> None:
    """R21: journal space is released when a checkpoint is begun, not when it is committed."""
    attempt = Checkpoint._attempt

    async def eager(self: Checkpoint) -> bool:
        state = self._moving.state
        journal = state.journal
        journal.release(journal.start_of(state.fifo[0][0]) if state.fifo else journal.head)
        return await attempt(self)

    patch.setattr(Checkpoint, "_attempt", eager)


def stripes_are_not_synced(patch: Patch) -> None:
    """A stripe counts as written before its shards are durable."""

    async def sync(*_: object) -> None:
        return

    patch.setattr(stripe_writer, "_sync", sync)


def the_term_stays(patch: Patch) -> None:
    """R1: a recovery uses the versions of the life before again."""
    patch.setattr("pool.pool.TERM_SHIFT", 0)


def the_map_is_switched_blindly(patch: Patch) -> None:
    """R11: a mover switches blocks that were overwritten meanwhile."""

    def blind(leaf: Leaf, blocks: U64, old: U64, new: U64, crcs: U32) -> npt.NDArray[np.bool_]:
        found = [leaf.get(int(block) & LEAF_MASK)[0] for block in blocks]
        return switch(leaf, blocks, np.array(found, np.uint64), new, crcs)

    switch = columns.switch
    patch.setattr(moving, "switch", blind)


def checksums_are_not_compared(patch: Patch) -> None:
    """R13: what a device returns is believed."""
    for module in (volume, reader):
        patch.setattr(module, "verify", lambda *_: -1)


#: What catching one looks like; anything else says that the patch does not fit.
CAUGHT = (Violation, PoolError, OSError, Deadlock, AssertionError)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


#: Engines, by what is wrong with them.
BROKEN = [
    flush_answers_early,
    one_replica_is_durable,
    slots_are_free_at_once,
    the_journal_is_free_at_once,
    stripes_are_not_synced,
    the_term_stays,
    the_map_is_switched_blindly,
    checksums_are_not_compared,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_simulation_catches(broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    broken(monkeypatch)
    caught = ""
    for tries, case in enumerate(cases(), start=1):
        try:
            case()
        except* CAUGHT as group:
            error = next(leaves(group))
            assert "internal error" not in str(error), f"the patch does not fit: {error}"
            caught = f"{broken.__name__}: caught after {tries} cases: {error!r}"
        if caught:
            print(caught[:300])
            return
    pytest.fail(f"{broken.__name__}: {broken.__doc__} Nobody noticed in {TRIES} cases")
