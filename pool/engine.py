"""The engine: the parts of an open pool, and the few steps that need several of them.

Called by `pool.volume` (data path) and `pool.pool` (operations). Everything here runs in one event
loop; what has no await is atomic.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from backends.base import BLOCK_SIZE, DeviceError
from pool.apply import apply
from pool.blockmap import LayerMap
from pool.checkpoint import Checkpoint
from pool.errors import PoolFull, PoolStopped
from pool.failpoints import reached
from pool.journal import Committed, Journal
from pool.loader import Loader
from pool.maintenance import Maintenance
from pool.membership import Membership
from pool.moving import Moving
from pool.reader import Reader
from pool.state import State

T = TypeVar("T")

#: The most bytes staged in one piece; larger writes are several, in order.
PIECE_BYTES = 1 << 20


class Engine:
    """Parts of an open pool. Without a journal (read-only) only reading works."""

    def __init__(
        self, state: State, reader: Reader, loader: Loader, membership: Membership,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.state = state
        self.reader = reader
        self.loader = loader
        self.membership = membership
        reader.on_failure = membership.report
        self.moving = Moving(state, reader, loader, membership.expel)
        self.checkpoint = Checkpoint(self.moving, membership)
        self.maintenance: Maintenance | None = None
        #: Opened to be read: nothing is written, not even what recovery would.
        self.read_only = False
        self._clock = clock
        self._kick_at = 0
        blocks = max(1, state.journal_blocks // 8)
        #: Journal blocks that only trims, deletes and the like may use: they go on when the pool is
        #: full (P5). The last of them are for deletes alone.
        self.headroom = max(6, min(64, state.journal_blocks // 64))
        self.last_room = max(2, self.headroom // 4)
        self.piece_bytes = min(PIECE_BYTES, blocks * BLOCK_SIZE)

    @property
    def journal(self) -> Journal:
        return self.state.journal

    @property
    def staged(self) -> bool:
        return self.state.journal.staged

    def start(self, catch_up: set[int]) -> None:
        """Begin maintenance, once the journal runs; these members may have missed something."""
        self.maintenance = Maintenance(self.moving, self.checkpoint, self._clock)
        self.maintenance.catch_up.start(catch_up)
        self.maintenance.start()

    # -- data path: no await, atomic ---------------------------------------------------------

    def commit(self) -> None:
        """Append what is staged and make it visible. Raises PoolStopped; then it never happened,
        and nothing is taken any more: who staged with it must not be answered by a later commit."""
        state, journal = self.state, self.state.journal
        state.reserved = 0
        if state.stopped:
            raise PoolStopped(state.stopped)
        try:
            committed = journal.commit()
        except PoolStopped as error:
            state.stop(str(error))
            raise
        reached("append_after_primary_before_map")
        apply(state, committed, self._catalog_change)
        reached("append_after_map_before_answer")
        if journal.head >= self._kick_at:
            self._kick_at = journal.head + max(1, journal.size // 64)
            self.kick()

    def _catalog_change(self, extent: Committed) -> None:
        """Catalog changes are applied by `change_catalog`, which has the text at hand."""

    def journal_full(self) -> None:
        """A writer found no room: make the maintenance loop look."""
        self.kick()

    def kick(self) -> None:
        if self.maintenance is not None:
            self.maintenance.kick()

    # -- waiting -----------------------------------------------------------------------------

    async def at_rest(self, look: Callable[[], T]) -> T:
        """What `look` says at a moment when maintenance has no stripe in flight."""
        return look() if self.maintenance is None else await self.maintenance.at_rest(look)

    async def wait_room(self, blocks: int) -> None:
        """Return when the journal may have room for `blocks` again. Raises PoolFull if nothing can
        be packed, PoolStopped."""
        if self.state.stopped:
            raise PoolStopped(self.state.stopped)
        maintenance = self.maintenance
        assert maintenance is not None
        maintenance.writers_waiting += 1
        try:
            self.kick()
            await self.journal.wait_room()
        finally:
            maintenance.writers_waiting -= 1
        if maintenance.out_of_space and not self.journal.room(blocks):
            self.state.counters["writes_refused_full"] += 1
            raise PoolFull
        if self.state.stopped:
            raise PoolStopped(self.state.stopped)

    async def flush(self) -> None:
        """Return when all that was committed before is durable on all replicas. Raises
        PoolStopped."""
        if self.state.stopped:
            raise PoolStopped(self.state.stopped)
        await self.journal.flush()

    async def change_catalog(self, change: dict[str, Any]) -> None:
        """Journal a catalog change, sync it, and only then let anybody see it done (R7)."""
        text = json.dumps(change, sort_keys=True).encode()
        blocks = -(-len(text) // BLOCK_SIZE)
        if change["do"] != "delete":
            blocks += self.last_room
        while not self.journal.room(blocks):
            await self.wait_room(blocks)
        if self.staged:
            self.commit()
        self.journal.stage_catalog(text)
        self.commit()
        reached("catalog_after_commit_before_apply")
        apply_change(self.state, change)
        reached("catalog_after_apply_before_flush")
        await self.flush()
        reached("catalog_after_flush_before_answer")

    def member_failed(self, index: int, error: DeviceError) -> None:
        """A journal replica failed."""
        self.membership.report(index, error)


def apply_change(state: State, change: object) -> None:
    """Apply a catalog change, at run time and in replay. Raises FormatError."""
    state.catalog.apply(change)
    for layer in state.catalog.layers.keys() - state.maps.keys():
        state.maps[layer] = LayerMap(layer)
