"""The maintenance loop: decides whether to destage, collect, write a checkpoint or wait.

One task does all of it, one step at a time, so none of them ever races another; they race only
foreground writes, which the map's compare-and-swap and the checkpoint's frozen leaves settle.
`decide` is pure. Steps run until there is nothing to do; then the loop sleeps until it is kicked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pool.apply import drop_leaf
from pool.catch_up import CatchUp
from pool.checkpoint import Checkpoint
from pool.collector import collect, collect_meta
from pool.destage import destage
from pool.errors import DataLost, PoolStopped
from pool.failpoints import reached
from pool.moving import Moving
from pool.placement import NoSpace
from pool.state import RESERVE_STRIPES, State
from pool.trash import Orphans, delete

T = TypeVar("T")

#: At most so many stripes per destage or collector step.
STEP_STRIPES = 24
#: Shards of returned devices looked at between two steps.
CATCH_UP_SHARDS = 32
#: Leaves of a dropped layer taken apart per step.
DROP_LEAVES = 256
#: A checkpoint is written at least this often while anything changed.
CHECKPOINT_SECONDS = 30.0
#: How long nothing was written before the journal is packed although it has room.
QUIET_SECONDS = 0.2
#: How often storage that ran full under its members is tried again.
FULL_SECONDS = 5.0


class Step(Enum):
    DESTAGE = "destage"
    DRAIN = "drain"
    COLLECT = "collect"
    CHECKPOINT = "checkpoint"
    DROP = "drop"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Situation:
    """What `decide` looks at. Journal figures in blocks, stripe figures in stripes."""

    journal_size: int
    journal_used: int
    journal_unpacked: int
    stripe_blocks: int
    free: int
    total: int
    dead: int
    collectable: bool
    dropped_layer: bool
    dirty_seconds: float
    waiting_writers: bool
    #: Nothing was written since destage last found less than a full stripe.
    starved: bool
    #: Guests have been quiet for a moment. While they write, the journal is filled further before
    #: destage begins: a burst has the machine to itself, and overwrites die before they are packed.
    quiet: bool = True
    #: Stripes that only checkpoints and the collector may take.
    reserve: int = RESERVE_STRIPES


def decide(now: Situation) -> Step:
    """The most urgent step: stripes to write into come first, then room in the journal."""
    return _for_stripes(now) or _for_journal(now) or Step.WAIT


def _for_stripes(now: Situation) -> Step | None:
    low = max(now.reserve * 2, now.total // 20)
    if now.free < now.reserve and now.dead:
        return Step.CHECKPOINT
    if now.free + now.dead < low and now.collectable:
        return Step.COLLECT
    if now.dead > low and now.free < low:
        return Step.CHECKPOINT
    return Step.DROP if now.dropped_layer else None


def _for_journal(now: Situation) -> Step | None:
    releasable = now.journal_used - now.journal_unpacked
    if now.journal_used > now.journal_size // 2 and releasable > now.journal_size // 4:
        return Step.CHECKPOINT
    if now.waiting_writers and now.journal_unpacked <= now.journal_size // 8 and releasable:
        return Step.CHECKPOINT
    packing = _packing(now)
    if packing is not None:
        return packing
    if now.waiting_writers and releasable:
        return Step.CHECKPOINT
    if now.quiet and releasable > now.journal_size // 16:
        # The next burst finds an empty journal.
        return Step.CHECKPOINT
    return Step.CHECKPOINT if now.dirty_seconds > CHECKPOINT_SECONDS else None


def _packing(now: Situation) -> Step | None:
    """How to move journal blocks into stripes, if that is to be done."""
    if now.free > now.reserve:
        threshold = min(STEP_STRIPES * now.stripe_blocks, now.journal_size // 4)
        if not now.quiet and not now.waiting_writers:
            threshold = max(threshold, now.journal_size * 3 // 8)
        if now.journal_unpacked > threshold:
            if not now.starved:
                return Step.DESTAGE
            if now.journal_unpacked > now.journal_size // 2:
                return Step.DRAIN
        if now.waiting_writers and now.journal_unpacked:
            return Step.DRAIN
    elif now.dead:
        return Step.CHECKPOINT
    return None


class Maintenance:
    """Runs steps in one task."""

    def __init__(self, moving: Moving, checkpoint: Checkpoint, clock: Callable[[], float]) -> None:
        self._moving = moving
        self._state: State = moving.state
        self._checkpoint = checkpoint
        self._clock = clock
        self._wake = asyncio.Event()
        self._clean_at = clock()
        self._clean_head = moving.state.journal.head
        self._collectable = True
        self._task: asyncio.Task[None] | None = None
        self._orphans: asyncio.Task[None] | None = None
        self._want_checkpoint: list[asyncio.Future[None]] = []
        #: What wants to look at the pool between two steps.
        self._lookers: list[Callable[[], None]] = []
        self._starved_at = -1
        self._seen_head, self._seen_at = moving.state.journal.head, clock()
        self._stopping = False
        self.writers_waiting = 0
        #: Nothing could be packed when it was last tried: writers must not wait for it.
        self.out_of_space = False
        self._full_at = clock()
        self.catch_up = CatchUp(moving.state, moving.reader)

    def start(self) -> None:
        """Begin. The task ends when the pool stops or `stop` is called."""
        loop = asyncio.get_running_loop()
        # Listing a store may take minutes, so nothing waits for it.
        self._orphans = loop.create_task(Orphans(self._state).delete())
        self._task = loop.create_task(self._run())

    def kick(self) -> None:
        """Something changed: look again."""
        self._wake.set()

    def situation(self) -> Situation:
        """What there is to decide on."""
        state, journal = self._state, self._state.journal
        state.settle()
        # As a checkpoint sees it: it releases whole records, up to the oldest with a live block,
        # and what it released counts at once, even while a reader still pins the space.
        unpacked = journal.head - journal.start_of(state.fifo[0][0]) if state.fifo else 0
        dirty = journal.head != self._clean_head
        return Situation(
            journal_size=journal.size,
            journal_used=journal.head - state.committed.tail,
            journal_unpacked=unpacked,
            stripe_blocks=state.shape().blocks,
            free=state.free_stripes(),
            total=state.total_stripes(),
            dead=len(state.table.dead()),
            collectable=self._collectable,
            dropped_layer=bool(state.dropped_layers()),
            dirty_seconds=self._clock() - self._clean_at if dirty else 0.0,
            waiting_writers=self.writers_waiting > 0,
            starved=self._starved_at == journal.head,
            quiet=self._quiet(),
            reserve=state.reserve_stripes(),
        )

    def _quiet(self) -> bool:
        head, now = self._state.journal.head, self._clock()
        if head != self._seen_head:
            self._seen_head, self._seen_at = head, now
        return now - self._seen_at >= QUIET_SECONDS

    async def _run(self) -> None:
        state = self._state
        while not state.stopped and not self._stopping:
            try:
                step = Step.CHECKPOINT if self._want_checkpoint else decide(self.situation())
                state.counters[f"steps_{step.value}"] += 1
                await self._perform(step)
                await self._empty_trash()
                await self._catch_up()
                self._try_full_again()
                self._let_look()
                await asyncio.sleep(0)
            except NoSpace:
                self._try_full_again()
                state.counters["steps_without_space"] += 1
                await self._make_space()
            except DataLost as error:
                state.counters["steps_with_lost_data"] += 1
                state.problems["lost"] = str(error)
                # Whoever waits for room in the journal may wait for just this.
                self._give_up_on_space()
                await self._sleep(1.0)
            except PoolStopped as error:
                if state.stopped:
                    break
                # Too few members to write, for now: what is left goes on being read.
                state.stop(str(error))
            except Exception as error:
                # A bug; but those who wait for this loop must hear of it.
                state.stop(f"internal error {error!r}: restart the daemon, and report it")
                raise
        for waiter in self._want_checkpoint:
            if not waiter.done():
                waiter.set_exception(PoolStopped(state.stopped or "the pool is closing"))
        self._want_checkpoint.clear()
        self._let_look()

    async def _perform(self, step: Step) -> None:
        if step is Step.DESTAGE:
            head = self._state.journal.head
            if not await destage(self._moving, self._step_stripes(), force=False):
                self._starved_at = head
            self.out_of_space = False
            self._moving.loader.trim_memory()
        elif step is Step.DRAIN:
            await destage(self._moving, self._step_stripes(), force=True)
            self.out_of_space = False
        elif step is Step.COLLECT:
            await self._collect()
        elif step is Step.CHECKPOINT:
            await self.checkpoint_now()
        elif step is Step.DROP:
            await self._drop_layer()
        else:
            if self.writers_waiting and self._state.fifo:
                self._give_up_on_space()
            waits_for_quiet = self._state.fifo and not self._quiet()
            if not self.catch_up.left:
                await self._sleep(QUIET_SECONDS if waits_for_quiet else CHECKPOINT_SECONDS / 2)

    def _step_stripes(self) -> int:
        """How many stripes a step may fill: the reserve is for the checkpoint that frees others."""
        return max(1, min(STEP_STRIPES, self._state.free_stripes() - self._state.reserve_stripes()))

    async def _catch_up(self) -> None:
        """Give returned devices what they missed, a little between every two other steps."""
        if self.catch_up.left:
            await self.catch_up.step(CATCH_UP_SHARDS)

    async def _empty_trash(self) -> None:
        state = self._state
        trash, state.trash = state.trash, []
        await delete(state, trash)

    async def _sleep(self, seconds: float) -> None:
        if self._stopping:
            return
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _collect(self) -> None:
        """Empty some stripes. If that gained nothing it is not tried again before a checkpoint."""
        before = self._gained()
        emptied = await collect(self._moving, self._step_stripes())
        if not emptied:
            emptied = await collect_meta(self._moving, STEP_STRIPES)
            if emptied:
                await self.checkpoint_now()
        self._collectable = self._gained() > before

    def _gained(self) -> int:
        """Stripes that can be placed now or after the next checkpoint."""
        self._state.settle()
        return self._state.free_stripes() + len(self._state.table.dead())

    async def checkpoint_now(self) -> None:
        """Write a checkpoint and answer those who asked for one."""
        waiters, self._want_checkpoint = self._want_checkpoint, []
        head = self._state.journal.head
        try:
            await self._checkpoint.write()
        except BaseException as error:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(PoolStopped(str(error)))
            raise
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._clean_at, self._clean_head = self._clock(), head
        self.out_of_space = False
        self._collectable = True
        self._moving.loader.trim_memory()

    def request_checkpoint(self) -> asyncio.Future[None]:
        """A future that is done when a checkpoint begun after this call is committed."""
        waiter = asyncio.get_running_loop().create_future()
        self._want_checkpoint.append(waiter)
        self.kick()
        return waiter

    def at_rest(self, look: Callable[[], T]) -> asyncio.Future[T]:
        """A future with what `look` says between two steps: then no stripe is placed that neither
        the table nor a root names."""
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def now() -> None:
            if waiter.done():
                return
            try:
                waiter.set_result(look())
            except Exception as error:
                waiter.set_exception(error)

        self._lookers.append(now)
        self.kick()
        if self._task is None or self._task.done():
            self._let_look()
        return waiter

    def _let_look(self) -> None:
        lookers, self._lookers = self._lookers, []
        for look in lookers:
            look()

    async def _make_space(self) -> None:
        """No stripe could be placed: release what is dead, else wait for something to change."""
        before = self._state.free_stripes()
        try:
            if self._state.table.dead():
                await self.checkpoint_now()
            else:
                await self._collect()
        except NoSpace:
            pass
        if self._state.free_stripes() <= before:
            self._give_up_on_space()
            await self._sleep(0.5)

    def _give_up_on_space(self) -> None:
        """Nothing can be packed: whoever waits for room in the journal hears that the pool is full
        (P5)."""
        state = self._state
        if state.gate.waiting:
            # Space is on its way: it was let go of, and comes free when the last read of it ends.
            return
        self.out_of_space = True
        state.journal.wake_writers()

    def _try_full_again(self) -> None:
        """Storage under full members may have room again: they are tried once in a while."""
        state = self._state
        if any(m.full for m in state.active()) and self._clock() - self._full_at > FULL_SECONDS:
            self._full_at = self._clock()
            for member in state.active():
                member.full = False
            state.update_limit()

    async def _drop_layer(self) -> None:
        """Take a part of a deleted volume's map out; the checkpoint forgets the layer when it is
        empty."""
        state = self._state
        for layer in state.dropped_layers():
            layer_map = state.maps.get(layer)
            numbers = [] if layer_map is None else list(layer_map.leaves)[:DROP_LEAVES]
            if layer_map is not None and len(numbers) < DROP_LEAVES:
                paged = (n for n in layer_map.pointers if n not in layer_map.leaves)
                numbers += [n for n, _ in zip(paged, range(DROP_LEAVES), strict=False)]
            if layer_map is None or not numbers:
                await self.checkpoint_now()
                continue
            while await self._moving.loader.ensure((layer, n) for n in numbers):
                pass
            for number in numbers:
                drop_leaf(state, layer_map, number)
                reached("drop_after_leaf_before_next")
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """End the loop after the step it is in."""
        self._stopping = True
        self.kick()
        if self._orphans is not None:
            self._orphans.cancel()
            await asyncio.gather(self._orphans, return_exceptions=True)
            self._orphans = None
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
