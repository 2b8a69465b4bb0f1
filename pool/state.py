"""What the engine knows: one object that all its parts share. One event loop owns it.

`State` has no behaviour beyond bookkeeping that several parts need: accounting of live blocks,
slots and space, and finding a shard. Who changes what is in `docs/architecture.md`, "Concurrency".
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.base import BLOCK_SIZE
from pool.blockmap import LayerMap
from pool.catalog import Catalog
from pool.errors import FormatError, PoolError, PoolFull, PoolStopped
from pool.format.geometry import Geometry, geometry
from pool.format.location import STRIPE_MASK, STRIPE_SHIFT, TAG_SHIFT, TAG_STRIPE
from pool.format.page import Pointer
from pool.gate import Gate
from pool.journal import Journal
from pool.member import Member
from pool.mover import Mover
from pool.placement import Candidate, NoSpace, capacity, choose, width
from pool.shards import FastRead
from pool.table import NOWHERE, Stripe, StripeTable
from pool.words import counted

#: Stripe ids reserved by each root; ids below the limit may have been used (R1).
STRIPE_WINDOW = 1 << 16
#: Share of the pool that user data may fill; the rest lets the collector work (P5).
FILL = 0.88
#: Stripes kept for the collector and the checkpoint whatever else is asked for.
RESERVE_STRIPES = 8
#: What a volume takes of the top page at most, with its layer and its first directory.
VOLUME_BYTES = 272
#: Stripes whose places are kept at hand for reading.
LOCATED_MAX = 1 << 16
#: Bytes of map leaves kept in memory.
LEAF_BUDGET = 96 << 20

#: (position, layer, block, count, version) of an extent whose blocks may live in the journal.
JournalExtent = tuple[int, int, int, int, int]
#: Per shard of a stripe: how to read it without waiting, and the byte offset of its first block.
Located = list[FastRead | None]


@dataclass(slots=True)
class Committed:
    """What the last committed root says, as far as the next one repeats it."""

    anchors: dict[int, Stripe] = field(default_factory=dict)
    #: Parts of the top page; none before the first checkpoint.
    top: tuple[Pointer, ...] = ()
    replay: int = 0
    version: int = 0
    previous: int = 0
    tail: int = 0
    durable: int = 0


@dataclass(slots=True)
class State:
    """See the module."""

    uuid: bytes
    name: str
    data: int
    parity: int
    slot_blocks: int
    members: dict[int, Member]
    table: StripeTable
    mover: Mover
    rng: random.Random
    now: Callable[[], float]
    journal_blocks: int = 0
    generation: int = 0
    parent: str = ""
    writer: str = ""
    term: int = 0
    next_stripe: int = 1
    stripe_limit: int = 1
    catalog: Catalog = field(default_factory=Catalog)
    maps: dict[int, LayerMap] = field(default_factory=dict)
    table_pages: dict[int, Pointer] = field(default_factory=dict)
    directories: dict[tuple[int, int], Pointer] = field(default_factory=dict)
    committed: Committed = field(default_factory=Committed)
    gate: Gate = field(default_factory=Gate)
    counters: Counter[str] = field(default_factory=Counter)
    #: Extents whose blocks may still live in the journal, oldest first.
    fifo: deque[JournalExtent] = field(default_factory=deque)
    #: Stripe ids that lost a live block each, not yet taken from the table.
    killed: list[int] = field(default_factory=list)
    #: Mapped blocks of all layers, and blocks promised to writes that are being staged.
    used: int = 0
    reserved: int = 0
    limit: int = 0
    #: Blocks of the last write that was refused for want of space.
    refused: int = 0
    #: Members whose copy of the journal may lack what was synced (`pool.replicas`).
    behind: set[int] = field(default_factory=set)
    #: Members that the root had gone on without, and that were there when the pool was opened.
    returned: set[int] = field(default_factory=set)
    #: Layers of volumes that are being deleted: clients may still read them (R23).
    leaving: set[int] = field(default_factory=set)
    #: (member, stripe, shard) of objects that nothing refers to any more.
    trash: list[tuple[int, int, int]] = field(default_factory=list)
    #: What an operator should know, by kind.
    problems: dict[str, str] = field(default_factory=dict)
    #: Why the pool takes no writes; empty while it does.
    stopped: str = ""
    _journal: Journal | None = None
    located: dict[int, Located] = field(default_factory=dict)

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise PoolStopped("the pool is open for reading only")
        return self._journal

    @property
    def writable(self) -> bool:
        return self._journal is not None and not self.stopped

    def stop(self, why: str) -> None:
        """Take no more writes; whoever waits for the journal is told. The first reason stays."""
        self.stopped = self.stopped or why
        if self._journal is not None:
            self._journal.stop(self.stopped)

    def active(self) -> list[Member]:
        """Members that take part."""
        return [member for member in self.members.values() if member.present]

    # -- finding shards ----------------------------------------------------------------------

    def row(self, stripe: int) -> Stripe:
        """The row of any stripe, also of one that holds the table. Raises KeyError."""
        anchor = self.committed.anchors.get(stripe)
        return anchor if anchor is not None else self.table.get(stripe)

    def locate(self, stripe: int) -> Located:
        """How to read the shards of a stripe without waiting, cached. Raises KeyError."""
        found = self.located.get(stripe)
        if found is None:
            if len(self.located) >= LOCATED_MAX:
                self.located.clear()
            row = self.row(stripe)
            found = self.located[stripe] = [
                self._fast(device, slot, row.shape.header_bytes) for device, slot in row.places
            ]
        return found

    def _fast(self, device: int, slot: int, header: int) -> FastRead | None:
        member = self.members.get(device) if device != NOWHERE else None
        if member is None or not member.present or member.shards is None:
            return None
        fast = member.shards.fast(slot)
        return None if fast is None else (fast[0], fast[1] + header)

    def forget_places(self) -> None:
        """The members changed: nothing cached about shards is true any more."""
        self.located.clear()

    def dropped_layers(self) -> list[int]:
        """Layers whose map is to be taken apart: their volumes are gone for everybody (R23)."""
        layers = self.catalog.layers.values()
        return [one.id for one in layers if one.dropped and one.id not in self.leaving]

    # -- accounting --------------------------------------------------------------------------

    def settle(self) -> None:
        """Take the killed blocks from the table's live counts. If these cannot be right, a stripe
        that is in use might count as dead: nothing is released or written any more."""
        if self.killed:
            killed, self.killed = self.killed, []
            try:
                self.table.kill(killed)
            except FormatError as error:
                self.stop(f"{error}: run `stripewell pool check`, and report it")

    def kill_locations(self, locations: np.typing.NDArray[np.uint64]) -> None:
        """Note that the blocks at these locations (holes allowed) are no longer mapped."""
        stripes = locations[(locations >> np.uint64(TAG_SHIFT)) == TAG_STRIPE]
        self.killed.extend((stripes >> np.uint64(STRIPE_SHIFT) & np.uint64(STRIPE_MASK)).tolist())

    def reserve(self, blocks: int) -> None:
        """Promise space to a write. Raises PoolFull (P5)."""
        if self.used + self.reserved + blocks > self.limit:
            self.counters["writes_refused_full"] += 1
            self.refused = blocks
            raise PoolFull
        self.reserved += blocks

    # -- space -------------------------------------------------------------------------------

    def width(self) -> tuple[int, int]:
        """(k, m) of new stripes: narrower when members are missing, or the storage under them has
        run full (P6). Raises PoolStopped."""
        members = self.active()
        usable = sum(not member.full for member in members)
        found = width(usable, self.data, self.parity) or width(len(members), self.data, self.parity)
        if found is None:
            raise PoolStopped(
                f"{counted(len(self.active()), 'device')} left, more than {self.parity} are "
                "needed to write"
            )
        return found

    def shape(self) -> Geometry:
        """The geometry of new stripes."""
        return geometry(*self.width(), self.slot_blocks)

    def free_stripes(self) -> int:
        """How many stripes can be placed now."""
        free = [m.room for m in self.active()]
        try:
            count = sum(self.width())
        except PoolStopped:
            return 0
        return capacity(free, count) if len(free) >= count else 0

    def total_stripes(self) -> int:
        """How many stripes of today's width the members could hold in all."""
        slots = [m.slots.reach if m.full else m.slots.slots for m in self.active()]
        try:
            count = sum(self.width())
        except PoolStopped:
            return 0
        return capacity(slots, count) if len(slots) >= count else 0

    def update_limit(self) -> None:
        """Recompute how many blocks may be mapped, after members or volumes changed."""
        try:
            self.limit = self._limit(self._catalog_stripes(len(self.catalog.layers)))
        except PoolStopped:
            self.limit = 0

    def _limit(self, catalog: int) -> int:
        stripes = self.total_stripes() - 2 * (RESERVE_STRIPES + catalog)
        return max(0, int(stripes * self.shape().blocks * FILL))

    def reserve_stripes(self) -> int:
        """Stripes that only the checkpoint and the collector may take. Raises PoolStopped."""
        return RESERVE_STRIPES + self._catalog_stripes(len(self.catalog.layers))

    def _catalog_stripes(self, volumes: int) -> int:
        return volumes * VOLUME_BYTES // (self.shape().blocks * BLOCK_SIZE)

    def check_new_volume(self) -> None:
        """Raise PoolError unless checkpoints have room for one volume more, PoolStopped."""
        count = len(self.catalog.layers) + 1
        stripes = self._catalog_stripes(count)
        if stripes > self.total_stripes() // 8 or (stripes and self.used > self._limit(stripes)):
            raise PoolError(f"the pool is too small for {count} volumes: delete volumes")
        # Each stripe has a pointer and an anchor in the root.
        need = stripes * (80 + 14 * sum(self.width()))
        if need > min(member.layout.root_bytes for member in self.members.values()) * 3 // 4:
            raise PoolError(
                f"slots of {self.slot_blocks * 4} KiB are too small for {count} volumes, the root "
                "cannot name all parts of their catalog: delete volumes, or make a pool with "
                "larger slots"
            )

    def place(self, shards: int) -> tuple[tuple[int, int], ...]:
        """Take a slot on `shards` distinct members. Raises NoSpace."""
        candidates = [Candidate(m.index, m.room, m.domain) for m in self.active() if m.room]
        chosen = [self.members[index] for index in choose(candidates, shards, self.rng)]
        return tuple((m.index, m.slots.take(beyond=not m.full)) for m in chosen)

    def release(self, row: Stripe, *, written: bool = True) -> None:
        """Return the slots of a stripe that no committed root refers to, or that was not even
        written."""
        for shard, (index, slot) in enumerate(row.places):
            member = self.members.get(index) if index != NOWHERE else None
            if member is not None:
                member.slots.give(slot, written=written)
                if member.shards is not None and member.shards.must_delete:
                    self.trash.append((index, row.id, shard))

    def new_stripe(self) -> int:
        """A stripe id that was never used. Raises NoSpace when a root must be committed first."""
        if self.next_stripe >= self.stripe_limit:
            raise NoSpace("stripe ids are used up until the next root")
        self.next_stripe += 1
        return self.next_stripe - 1

    def new_row(self, kind: int) -> Stripe:
        """A placed, unwritten stripe of today's width. Raises NoSpace, PoolStopped."""
        shape = self.shape()
        places = self.place(shape.shards)
        return Stripe(self.new_stripe(), kind, shape, places)

    # -- the root ----------------------------------------------------------------------------

    def _replica(self, index: int) -> dict[str, Any]:
        row = {"member": index, "offset": self.members[index].layout.journal_offset}
        return row | {"behind": True} if index in self.behind else row

    def root(self, committed: Committed, replicas: list[int]) -> dict[str, Any]:
        """The next root (`docs/format.md`, "Root")."""
        return {
            "name": self.name,
            "generation": self.generation + 1,
            "parent": self.parent,
            "writer": self.writer,
            "term": self.term,
            "code": {"data": self.data, "parity": self.parity, "slot_blocks": self.slot_blocks},
            "members": [member.to_json() for member in self.members.values()],
            "streams": [
                {
                    "id": 1,
                    "owner": self.uuid.hex(),
                    "blocks": self.journal_blocks,
                    "tail": committed.tail,
                    "durable": committed.durable,
                    "replay": committed.replay,
                    "version": committed.version,
                    "previous": committed.previous,
                    "replicas": [self._replica(index) for index in replicas],
                }
            ],
            "checkpoint": {
                "width": self.table.width,
                "anchors": [stripe.to_json() for stripe in committed.anchors.values()],
                "top": [list(pointer) for pointer in committed.top],
            },
            "next": {"stripe": self.stripe_limit},
        }
