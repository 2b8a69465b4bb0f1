"""Engines that are broken on purpose: the simulation must catch each, or the oracle is too weak.

Each entry removes one rule (R4, R5, R9, R11, R13, R21) from the engine; crashes and seeds are tried
until one is judged a violation, or raises, and no more than `TRIES` may be needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from pool import destage, moving, reader, stripe_writer, volume
from pool.blockmap import Leaf
from pool.checkpoint import Checkpoint
from pool.gate import Gate
from pool.journal import Journal
from pool.state import State

from .scenarios import crash_at
from .seeds import run_seed

TRIES = 60
Patch = pytest.MonkeyPatch


def cases() -> Iterator[Callable[[], object]]:
    """Crashes and seeds in turn, always the same ones."""
    for i in range(TRIES // 3):
        yield lambda i=i: crash_at("brief", 150 + 31 * i)  # type: ignore[misc]
        yield lambda i=i: crash_at("eventful", 900 + 193 * i)  # type: ignore[misc]
        yield lambda i=i: run_seed(i)  # type: ignore[misc]


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
    """R21: slots are given back before a committed root has let go of them."""
    attempt = Checkpoint._attempt

    async def eager(self: Checkpoint) -> bool:
        state = self._moving.state
        state.settle()
        for stripe in state.table.dead():
            state.unplace(state.table.get(stripe).places)
        return await attempt(self)

    patch.setattr(Checkpoint, "_attempt", eager)
    patch.setattr("pool.slots.FreeSlots.give", _give_again)


def _give_again(self: object, slot: int) -> None:
    used, returned = self._used, self._returned  # type: ignore[attr-defined]
    if slot in used:
        used.remove(slot)
        returned.append(slot)
        returned.sort()


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
    """R1: a recovery goes on with the versions of the life before."""
    patch.setattr("pool.pool.TERM_SHIFT", 0)


#: Engines, by what is wrong with them.
BROKEN = [
    flush_answers_early,
    one_replica_is_durable,
    slots_are_free_at_once,
    the_journal_is_free_at_once,
    stripes_are_not_synced,
    the_term_stays,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_simulation_catches(broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    broken(monkeypatch)
    for tries, case in enumerate(cases(), start=1):
        try:
            case()
        except Exception as error:
            print(f"{broken.__name__}: caught after {tries} cases: {error!r}"[:300])
            return
    pytest.fail(f"{broken.__name__}: {broken.__doc__} Nobody noticed in {TRIES} cases")
