"""Engines that are broken on purpose, each by one rule less: what the simulation must catch.

Every entry patches the engine as somebody would who forgot the rule, and says in which lives it is
looked for: seeds from 0 on, with some options fixed where the mistake needs a special misfortune.
`python -m tests.sim.broken` prints the table of `docs/testing.md`: how many seeds each one took.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from backends.base import DeviceError
from nbd_server.outbox import Outbox
from nbd_server.session import Session
from nbd_server.transmission import Transmission
from pool import apply, collector, columns, membership, moving, reader, recovery, volume
from pool import pool as opening
from pool import stripe_writer as writer
from pool.blockmap import LEAF_MASK, Leaf
from pool.catch_up import CatchUp
from pool.checkpoint import Checkpoint
from pool.checksum import block_crcs
from pool.columns import U32, U64, Columns
from pool.engine import Engine
from pool.errors import DataLost, PoolError
from pool.format.record import KIND_TRIM
from pool.gate import Gate
from pool.journal import Committed, Journal
from pool.loader import Loader
from pool.replicas import Copy
from pool.state import State
from pool.table import Stripe

from .loop import Deadlock, run
from .oracle import Violation
from .scenarios import delete_under_reads, flush_and_lose, fork, overfill
from .seeds import run_seed
from .test_old_copies import LATER_LOST, Lives, check, forget

Patch = pytest.MonkeyPatch
#: Seeds in which an engine must have been caught.
LIMIT = 150
#: What catching one looks like; anything else says that the patch does not fit.
CAUGHT = (Violation, PoolError, OSError, Deadlock, AssertionError)


@dataclass(frozen=True, slots=True)
class Broken:
    """A mistake, the rules that forbid it, and where to look for it."""

    rules: str
    what: str
    make: Callable[[Patch], None]
    options: dict[str, Any] = field(default_factory=dict)
    #: A fixed misfortune that each seed tries first, for what random lives seldom meet.
    first: Callable[[int], None] | None = None


ENGINES: dict[str, Broken] = {}


def broken(
    rules: str, what: str, first: Callable[[int], None] | None = None, **options: Any
) -> Callable[[Any], Any]:
    """Enter a mistake in the table."""

    def enter(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
        ENGINES[make.__name__] = Broken(rules, what, make, options, first)
        return make

    return enter


# -- journal ---------------------------------------------------------------------------------


@broken("R5, P2", "a flush is answered at once")
def flush_early(patch: Patch) -> None:
    def flush(self: Journal, position: int | None = None) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        waiter.set_result(None)
        return waiter

    patch.setattr(Journal, "flush", flush)


@broken("R5, P2", "a flush does not wait for one of the replicas", first=flush_and_lose)
def one_replica_less(patch: Patch) -> None:
    def durable(self: Journal) -> int:
        reached = sorted(replica.synced for replica in self.replicas)
        return reached[1] if len(reached) > 1 else reached[0]

    patch.setattr(Journal, "durable", property(durable))


@broken("R4", "a failed sync is tried again and believed", faults=("syncs fail",))
def sync_again(patch: Patch) -> None:
    async def sync_some(self: Journal, replica: Any) -> bool:
        try:
            return await once(self, replica)
        except DeviceError:
            await asyncio.sleep(0.001)
            return await once(self, replica)

    once = Journal._sync_some
    patch.setattr(Journal, "_sync_some", sync_some)


@broken("R3", "a new primary is not brought up to date first", faults=("writes fail",))
def gap(patch: Patch) -> None:
    def append(self: Journal) -> None:
        for replica in self.replicas[1:]:
            replica.written = max(replica.written, self.head)
        appended(self)

    appended = Journal._append
    patch.setattr(Journal, "_append", append)


@broken("R1", "a life uses the versions of the one before it again")
def same_term(patch: Patch) -> None:
    patch.setattr(opening, "TERM_SHIFT", 0)


@broken("R2", "records do not name the one before them, and nobody looks")
def no_chain(patch: Patch) -> None:
    def decode(block: bytes | memoryview) -> Any:
        return replace(decoded(block), previous=0)

    decoded = recovery.record.decode
    nothing = property(lambda self: 0, lambda self, crc: None)
    patch.setattr(Journal, "previous", nothing, raising=False)
    patch.setattr(recovery.record, "decode", decode)


@broken("R21", "journal space is free when a checkpoint begins, not when it is committed")
def journal_free_early(patch: Patch) -> None:
    async def attempt(self: Checkpoint) -> bool:
        state = self._moving.state
        found = state.journal.start_of(state.fifo[0][0]) if state.fifo else state.journal.head
        state.journal.release(found)
        return await attempted(self)

    attempted = Checkpoint._attempt
    patch.setattr(Checkpoint, "_attempt", attempt)


@broken("R6", "recovery names replicas without making them whole", power=0.9, away=0.5)
def replicas_not_whole(patch: Patch) -> None:
    async def to(self: Copy, target: Any, *, whole: bool) -> None:
        return

    patch.setattr(Copy, "to", to)


@broken("R7", "a volume is there, or gone, before the journal is synced", operator=4, power=0.9)
def catalog_unsynced(patch: Patch) -> None:
    async def change(self: Engine, entry: dict[str, Any]) -> None:
        async def flush() -> None:
            return

        self.flush = flush  # type: ignore[method-assign]
        try:
            await changed(self, entry)
        finally:
            del self.flush

    changed = Engine.change_catalog
    patch.setattr(Engine, "change_catalog", change)


@broken("R18", "a trim is applied and not journaled")
def trim_unversioned(patch: Patch) -> None:
    def stage(self: Journal, kind: int, layer: int, block: int, count: int) -> None:
        if kind != KIND_TRIM:
            staged(self, kind, layer, block, count)
            return
        extent = Committed(kind, layer, block, count, self.head, self.version, [])
        apply.apply(self._on_failure.__self__.state, [extent], lambda extent: None)  # type: ignore[attr-defined]

    staged = Journal.stage_range
    patch.setattr(Journal, "stage_range", stage)


# -- movers ----------------------------------------------------------------------------------


@broken("R9", "stripes and checkpoints do not wait for the journal", power=1.0, cached=0.0)
def journal_unsynced(patch: Patch) -> None:
    """The checkpoint waits as well, for all that it covers: both have to go."""

    def flush(self: Journal, position: int | None = None) -> asyncio.Future[None]:
        if position is None:
            return flushed(self)
        waiter = asyncio.get_running_loop().create_future()
        waiter.set_result(None)
        return waiter

    flushed = Journal.flush
    patch.setattr(Journal, "flush", flush)


@broken("R11", "a mover switches blocks that were overwritten meanwhile")
def switch_blindly(patch: Patch) -> None:
    def blind(leaf: Leaf, blocks: U64, old: U64, new: U64, crcs: U32) -> npt.NDArray[np.bool_]:
        found = [leaf.get(int(block) & LEAF_MASK)[0] for block in blocks]
        return switch(leaf, blocks, np.array(found, np.uint64), new, crcs)

    switch = columns.switch
    patch.setattr(moving, "switch", blind)


@broken("R12", "the collector gives what it moves a new version")
def new_versions(patch: Patch) -> None:
    async def live(mover: Any, stripe: int) -> Columns | None:
        found = await looked(mover, stripe)
        if found is not None:
            found.versions = found.versions + np.uint64(1 << 20)
        return found

    looked = collector._live_blocks
    patch.setattr(collector, "_live_blocks", live)


@broken("R13", "a mover makes new checksums for what it has read", faults=("rot", "bits flip"))
def new_checksums(patch: Patch) -> None:
    async def gather(job: Any, data: memoryview, members: Any, outcome: Any) -> bool:
        whole = await gathered(job, data, members, writer.Outcome())
        job.crcs[: job.used] = block_crcs(data[: job.used * 4096])
        return whole or True

    gathered = writer._gather
    patch.setattr(writer, "_gather", gather)


@broken("R16", "a stripe counts before its shards are synced", power=0.9)
def stripes_unsynced(patch: Patch) -> None:
    async def sync(*_: object) -> None:
        return

    patch.setattr(writer, "_sync", sync)


@broken("R21", "slots of dead stripes are used again before the root is committed")
def slots_free_early(patch: Patch) -> None:
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


@broken("R10, P5", "nothing is reserved for a write", first=overfill)
def no_reserve(patch: Patch) -> None:
    patch.setattr(State, "_limit", lambda self, catalog: 1 << 40)


# -- root and members ------------------------------------------------------------------------


@broken("R19, R21", "a root counts once one device has it", away=0.5, endings=("operation",))
def one_is_a_quorum(patch: Patch) -> None:
    async def write_all(self: Any, root: dict[str, object]) -> dict[int, int]:
        targets = [m for m in self._state.active() if m.index not in self._failed]
        tasks = {asyncio.ensure_future(self._write(m, root)): m for m in targets}
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        good = [task for task in tasks if task in done and task.exception() is None]
        return {tasks[task].index: task.result() for task in good}

    patch.setattr(membership.Membership, "_write_all", write_all)
    patch.setattr(membership, "quorum", lambda members, parity: 1)


@broken("R19", "of two roots of one generation the rarer is taken", first=fork)
def wrong_fork(patch: Patch) -> None:
    def choose(found: Any) -> Any:
        items = list(found)
        newest = max(item.block.generation for item in items)
        rivals: dict[str, list[Any]] = {}
        for item in items:
            if item.block.generation == newest:
                rivals.setdefault(item.block.digest, []).append(item.block)
        return min(rivals.values(), key=len)[0] if rivals else chosen(items)

    chosen = opening.choose_root
    patch.setattr(opening, "choose_root", choose)


def old_replica(seed: int) -> None:
    """A replica that forgot what was flushed counts again only once it is whole; then the other
    one is lost (P2, R24). Raises Violation, PoolError."""

    async def lives() -> None:
        life = Lives(seed)
        await forget(life, roots=seed % 4)
        async with life.life() as pool:
            await check(pool, 2)
        async with life.life(without=LATER_LOST) as pool:
            await check(pool, 2)

    run(lives())


@broken("R24, P7", "an old copy of a device is believed", first=old_replica)
def stale_serves(patch: Patch) -> None:
    def attach(state: State, *rest: Any) -> tuple[set[int], set[int], list[str]]:
        present, _, unfit = attached(state, *rest)
        state.behind.clear()
        return present, set(), unfit

    async def forgetful(*_: object) -> set[int]:
        return set()

    attached = opening._attach
    patch.setattr(opening, "_attach", attach)
    patch.setattr(opening, "forgetful", forgetful)
    patch.setattr(CatchUp, "start", lambda self, members: None)


@broken("R23", "the map of a volume goes before its deletion is durable", first=delete_under_reads)
def deleted_early(patch: Patch) -> None:
    def dropped(self: State) -> list[int]:
        return [layer.id for layer in self.catalog.layers.values() if layer.dropped]

    patch.setattr(State, "dropped_layers", dropped)


# -- readers ---------------------------------------------------------------------------------


@broken("P4, R13", "what a device returns is believed", faults=("bits flip", "rot"))
def no_checksums(patch: Patch) -> None:
    for module in (volume, reader):
        patch.setattr(module, "verify", lambda *_: -1)


@broken("P4", "a read from memory is not verified", faults=("rot", "bits flip"), cached=1.0)
def warm_unverified(patch: Patch) -> None:
    def try_read_sparse(self: volume.Volume, offset: int, into: memoryview) -> bool:
        patch.setattr(volume, "verify", lambda *_: -1)
        patch.setattr(volume, "crc32c", lambda data: _Any())
        try:
            return tried(self, offset, into)
        finally:
            patch.setattr(volume, "verify", verify)
            patch.setattr(volume, "crc32c", crc32c)

    tried, verify, crc32c = volume.Volume.try_read_sparse, volume.verify, volume.crc32c
    patch.setattr(volume.Volume, "try_read_sparse", try_read_sparse)


class _Any:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@broken("R14", "a repair does not pin what it repairs", faults=("rot", "slow"), faults_per_life=4)
def repair_unpinned(patch: Patch) -> None:
    patch.setattr(Gate, "inside", lambda self: nullcontext())


@broken("R16, R21", "a page that cannot be read is a hole", beyond=True)
def lost_is_a_hole(patch: Patch) -> None:
    async def load(self: Loader, pointer: Any, layer: int, number: int) -> None:
        try:
            await loaded(self, pointer, layer, number)
        except DataLost:
            self._state.maps[layer].install(number, Leaf(), pointer)

    loaded = Loader._load
    patch.setattr(Loader, "_load", load)


@broken("P4", "a block that cannot be read is zeros", beyond=True)
def lost_is_zeros(patch: Patch) -> None:
    async def run(self: reader.Reader, location: int, crcs: Any) -> bytes:
        try:
            return await ran(self, location, crcs)
        except DataLost:
            return bytes(4096 * len(crcs))

    ran = reader.Reader.run
    patch.setattr(reader.Reader, "run", run)


# -- the NBD server --------------------------------------------------------------------------


@broken("R8", "requests of a lost connection go on", cuts=6, latency=0.02, network=0.0001)
def ghosts(patch: Patch) -> None:
    def close(self: Session, reason: str | None = None) -> None:
        ghosts.update(self._tasks)
        kept = dict(self._tasks)
        self._tasks.clear()
        closed(self, reason)
        self._tasks.update(kept)

    ghosts: set[Any] = set()
    closed = Session.close
    patch.setattr(Session, "close", close)


@broken("R8", "a reply's buffer is used again before it is sent", socket=2048, users=5)
def reply_recycled(patch: Patch) -> None:
    def keep(self: Outbox, data: memoryview, pooled: memoryview | None) -> None:
        kept(self, data, None)
        if pooled is not None:
            self._pool.give(pooled)

    kept = Outbox._keep
    patch.setattr(Outbox, "_keep", keep)


@broken("P2", "FUA is ignored", power=0.9)
def no_fua(patch: Patch) -> None:
    async def perform(self: Transmission, request: Any, payload: Any) -> bytes:
        flags, *rest = request
        return await performed(self, (flags & ~1, *rest), payload)

    performed = Transmission._perform
    patch.setattr(Transmission, "_perform", perform)


# -- catching them ---------------------------------------------------------------------------


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


def catch(name: str, patch: Patch, limit: int = LIMIT) -> tuple[int, BaseException] | None:
    """Run seeds on a broken engine until one notices: how many it took, and what was said."""
    engine = ENGINES[name]
    engine.make(patch)
    for seed in range(limit):
        try:
            if engine.first is not None:
                engine.first(seed)
            run_seed(seed, **engine.options)
        except BaseException as error:
            found = [one for one in leaves(error) if isinstance(one, CAUGHT)]
            if not found:
                raise
            return seed + 1, min(found, key=lambda one: not isinstance(one, Violation))
    return None


def main() -> int:
    """Print the table. The exit status says whether all were caught."""
    missed = 0
    print("| rule | mistake | seeds | said |\n|---|---|---:|---|")
    for name in sys.argv[1:] or ENGINES:
        with pytest.MonkeyPatch.context() as patch:
            found = catch(name, patch)
        seeds, error = found if found else ("none", f"nobody noticed in {LIMIT}")
        missed += found is None
        text = (str(error) or repr(error)).partition("\n")[0].replace("|", "/")[:90]
        print(f"| {ENGINES[name].rules} | {ENGINES[name].what} | {seeds} | {text} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
