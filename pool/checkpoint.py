"""Writes checkpoints: the map, the stripe table and the catalog as of one position of the journal.

A checkpoint is primary data (R18): what the journal said before its replay position is nowhere
else. Order, each step durable before the next: journal synced through the position, pages in meta
stripes, table and top page in anchor stripes, root on the quorum. Only then are journal space,
slots of dead stripes and replaced pages released (R21), and only when nobody reads them any more.

Freezing is one synchronous step; after it writes go on, and the first change to a frozen leaf keeps
a copy of its bytes. If anything fails, the checkpoint is given up: what it froze is dirty again,
what it placed is free again, and nothing was lost.

The rows of the stripe table change only here, in `moving` and in recovery, which never overlap.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_SHIFT
from pool.catalog import MAX_SIZE
from pool.errors import FormatError, PoolStopped
from pool.failpoints import reached
from pool.format import page
from pool.format.page import Pointer
from pool.membership import Membership
from pool.moving import Moving, note_failures
from pool.placement import NoSpace
from pool.state import Committed, State
from pool.stripe_writer import Job, StripeJob
from pool.table import META, PAGE_ROWS, Stripe

#: Leaves under one directory page.
DIRECTORY_SHIFT = 8
DIRECTORY_DTYPE = np.dtype(
    [("leaf", "<u4"), ("length", "<u4"), ("stripe", "<u8"), ("offset", "<u4"), ("crc", "<u4")]
)
#: The last directory of the largest volume.
DIRECTORY_MAX = (MAX_SIZE // BLOCK_SIZE - 1) >> (LEAF_SHIFT + DIRECTORY_SHIFT)
#: Leaves encoded between two turns of the event loop.
SLICE = 32
#: The most bytes of the top page in one part.
TOP_PART_BYTES = 256 << 10
#: Meta stripes written by one job.
JOB_STRIPES = 8
ATTEMPTS = 4


def encode_directory(leaves: dict[int, Pointer]) -> bytes:
    """The body of a directory page."""
    rows = np.zeros(len(leaves), DIRECTORY_DTYPE)
    for i, (number, pointer) in enumerate(sorted(leaves.items())):
        rows[i] = (
            number & ((1 << DIRECTORY_SHIFT) - 1), pointer.length, pointer.stripe, pointer.offset,
            pointer.crc,
        )  # fmt: skip
    return rows.tobytes()


def decode_directory(index: int, body: memoryview) -> dict[int, Pointer]:
    """Inverse of `encode_directory`. Raises FormatError."""
    if len(body) % DIRECTORY_DTYPE.itemsize:
        raise FormatError("directory has the wrong size")
    leaves = np.frombuffer(body, DIRECTORY_DTYPE)["leaf"].astype(np.int64)
    if (leaves >= 1 << DIRECTORY_SHIFT).any() or (leaves[1:] <= leaves[:-1]).any():
        raise FormatError("directory is not sorted, or names leaves that are not under it")
    base = index << DIRECTORY_SHIFT
    return {
        base + leaf: Pointer(stripe, offset, length, crc)
        for leaf, length, stripe, offset, crc in np.frombuffer(body, DIRECTORY_DTYPE).tolist()
    }


class Packer:
    """Packs pages into stripes; hands out pointers as it goes. Raises NoSpace when it cannot
    place."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.stripes: list[tuple[Stripe, bytearray, int]] = []

    def add(self, image: bytes) -> Pointer:
        """Put a page behind the last one, or into a new stripe."""
        if not self.stripes or len(self.stripes[-1][1]) + len(image) > self._room():
            self.stripes.append((self._state.new_row(META), bytearray(), 0))
            if len(image) > self._room():
                raise PoolStopped("a checkpoint page is larger than a stripe: use larger slots")
        row, data, pages = self.stripes[-1]
        pointer = Pointer(row.id, len(data), len(image), page.checksum(image))
        data += image
        self.stripes[-1] = (row, data, pages + 1)
        return pointer

    def _room(self) -> int:
        return self.stripes[-1][0].shape.blocks * BLOCK_SIZE

    def jobs(self) -> list[StripeJob]:
        """What the stripe writer has to write."""
        return [self._job(row, bytes(data)) for row, data, _ in self.stripes]

    @staticmethod
    def _job(row: Stripe, data: bytes) -> StripeJob:
        used = -(-len(data) // BLOCK_SIZE)
        data += bytes(used * BLOCK_SIZE - len(data))
        room = row.shape.blocks
        crcs = np.zeros(room, np.uint32)
        crcs[:used] = [
            page.checksum(data[i : i + BLOCK_SIZE]) for i in range(0, len(data), BLOCK_SIZE)
        ]
        empty = np.zeros(room, np.uint64)
        return StripeJob(
            row.id, META, row.shape, row.places, used, np.zeros(room, np.uint32), empty, empty,
            crcs, inline=[(0, data)],
        )  # fmt: skip

    def unplace(self) -> None:
        """Give back what was placed."""
        for row, _, _ in self.stripes:
            self._state.release(row, written=False)


@dataclass(slots=True)
class _Frozen:
    """The pool at one position of the journal."""

    replay: int
    version: int
    previous: int
    tail: int
    used: int
    catalog: dict[str, Any]
    #: layer → numbers of the leaves to write.
    leaves: dict[int, set[int]]
    #: (layer, directory) → leaf pointers before the checkpoint.
    directories: dict[tuple[int, int], dict[int, Pointer]]
    #: layer → pages that this checkpoint wrote.
    fresh: dict[int, dict[int, Pointer]] = field(default_factory=dict)


class Checkpoint:
    """Writes checkpoints, one at a time. Called by the maintenance loop and at close."""

    def __init__(self, moving: Moving, membership: Membership) -> None:
        self._moving = moving
        self._state = moving.state
        self._membership = membership
        #: Rows as the committed table pages have them, to find the pages that changed.
        self.written: npt.NDArray[np.void] | None = None
        #: Whether one is being written: the table may have stripes of it that nothing names yet.
        self.running = False

    async def write(self) -> None:
        """Write one checkpoint. Raises NoSpace, PoolStopped, DataLost."""
        self.running = True
        try:
            await self._write()
        finally:
            self.running = False

    async def _write(self) -> None:
        for _ in range(ATTEMPTS):
            if await self._attempt():
                self._state.counters["checkpoints"] += 1
                return
        text = f"no checkpoint could be written in {ATTEMPTS} attempts"
        raise NoSpace(text) if any(m.full for m in self._state.active()) else PoolStopped(text)

    async def _attempt(self) -> bool:
        state = self._state
        frozen = self._freeze()
        meta, anchors = Packer(state), Packer(state)
        added: list[int] = []
        try:
            reached("checkpoint_after_freeze_before_flush")
            await state.journal.flush(frozen.replay)
            reached("checkpoint_after_flush_before_pages")
            await self._pack_leaves(frozen, meta)
            directories = self._pack_directories(frozen, meta)
            for row, _, pages in meta.stripes:
                state.table.add(row, pages)
                added.append(row.id)
            dead, rows = self._next_rows(frozen, directories)
            table_pages, top = self._pack_table(frozen, rows, directories, anchors)
            reached("checkpoint_after_pages_before_store")
            if not await self._store([*meta.jobs(), *anchors.jobs()]):
                raise _TryAgain
            reached("checkpoint_after_store_before_root")
            old = state.committed.anchors
            committed = self._committed(frozen, anchors, table_pages, top)
            await self._membership.commit(committed)
        except BaseException as error:
            self._give_up(added, meta, anchors)
            if isinstance(error, _TryAgain):
                return False
            raise
        reached("checkpoint_after_root_before_release")
        replaced = [row for stripe, row in old.items() if stripe not in committed.anchors]
        self._apply(frozen, directories, table_pages, dead, replaced, rows)
        reached("checkpoint_after_release_before_next")
        return True

    # -- freezing: no await, atomic ----------------------------------------------------------

    def _freeze(self) -> _Frozen:
        state, journal = self._state, self._state.journal
        state.settle()
        for layer in state.dropped_layers():
            found = state.maps.get(layer)
            if found is None or not (found.leaves or found.pointers):
                # Its last block is gone, and this checkpoint says so.
                state.maps.pop(layer, None)
                del state.catalog.layers[layer]
        tail = journal.start_of(state.fifo[0][0]) if state.fifo else journal.head
        frozen = _Frozen(
            journal.head, journal.version, journal.previous, tail, state.used,
            state.catalog.to_json(), {}, {},
        )  # fmt: skip
        for layer, layer_map in state.maps.items():
            frozen.leaves[layer] = layer_map.freeze()
            chunks = {number >> DIRECTORY_SHIFT for number in frozen.leaves[layer]}
            for chunk in chunks | layer_map.redirect:
                first = chunk << DIRECTORY_SHIFT
                frozen.directories[layer, chunk] = {
                    number: pointer
                    for number in range(first, first + (1 << DIRECTORY_SHIFT))
                    if (pointer := layer_map.pointers.get(number)) is not None
                }
            layer_map.redirect.clear()
        return frozen

    # -- packing -----------------------------------------------------------------------------

    async def _pack_leaves(self, frozen: _Frozen, meta: Packer) -> None:
        generation = self._state.generation + 1
        done = 0
        for layer, numbers in frozen.leaves.items():
            layer_map = self._state.maps.get(layer)
            fresh = frozen.fresh[layer] = {}
            for number in sorted(numbers):
                found = layer_map.frozen_page(number) if layer_map is not None else None
                if found is not None:
                    image = page.encode(
                        page.KIND_LEAF, found[0], layer, number, generation, found[1]
                    )
                    fresh[number] = meta.add(image)
                done += 1
                if done % SLICE == 0:
                    await asyncio.sleep(0)

    def _pack_directories(
        self, frozen: _Frozen, meta: Packer
    ) -> dict[tuple[int, int], Pointer | None]:
        """Write the directories above changed leaves; None for one that has no leaf left."""
        generation = self._state.generation + 1
        written: dict[tuple[int, int], Pointer | None] = {}
        for (layer, chunk), leaves in frozen.directories.items():
            fresh = frozen.fresh.get(layer, {})
            merged = {n: p for n, p in leaves.items() if n not in frozen.leaves[layer]}
            merged |= {n: p for n, p in fresh.items() if n >> DIRECTORY_SHIFT == chunk}
            if merged:
                image = page.encode(
                    page.KIND_DIRECTORY, 0, layer, chunk, generation, encode_directory(merged)
                )
                written[layer, chunk] = meta.add(image)
            elif (layer, chunk) in self._state.directories:
                written[layer, chunk] = None
        for layer, chunk in self._state.directories:
            if layer not in frozen.leaves:
                written[layer, chunk] = None
        return written

    def _next_rows(
        self, frozen: _Frozen, directories: dict[tuple[int, int], Pointer | None]
    ) -> tuple[list[int], npt.NDArray[np.void]]:
        """The table as this checkpoint has it, and the stripes that it no longer needs."""
        state = self._state
        rows = state.table.snapshot()
        index = state.table.rows
        for pointer in self._replaced(frozen, directories):
            at = index.get(pointer.stripe)
            if at is None or not rows["live"][at]:
                raise PoolStopped(
                    f"stripe {pointer.stripe} counts fewer pages than are in use of it: run "
                    "`stripewell pool check`, and report it"
                )
            rows["live"][at] -= 1
        dead = (rows["id"] != 0) & (rows["live"] == 0)
        ids: list[int] = rows["id"][dead].tolist()
        rows[dead] = np.zeros((), rows.dtype)
        return ids, rows

    def _replaced(
        self, frozen: _Frozen, directories: dict[tuple[int, int], Pointer | None]
    ) -> Iterable[Pointer]:
        """Pages of the last checkpoint that this one replaces."""
        for (layer, _), leaves in frozen.directories.items():
            numbers = frozen.leaves[layer]
            yield from (pointer for number, pointer in leaves.items() if number in numbers)
        for key in directories:
            old = self._state.directories.get(key)
            if old is not None:
                yield old

    def _pack_table(
        self,
        frozen: _Frozen,
        rows: npt.NDArray[np.void],
        directories: dict[tuple[int, int], Pointer | None],
        anchors: Packer,
    ) -> tuple[dict[int, Pointer], tuple[Pointer, ...]]:
        """Write the table pages that changed and the top page, in as many parts as it needs."""
        state = self._state
        generation = state.generation + 1
        count = len(rows) // PAGE_ROWS
        crowded = len(state.committed.anchors) > 4 + count // 4
        pages = dict(state.table_pages)
        for number in range(count):
            part = rows[number * PAGE_ROWS : (number + 1) * PAGE_ROWS]
            if crowded or number not in pages or self._changed(number, part):
                image = page.encode(page.KIND_TABLE, 0, 0, number, generation, part.tobytes())
                pages[number] = anchors.add(image)
        merged = {k: p for k, p in state.directories.items() if k not in directories}
        merged |= {key: pointer for key, pointer in directories.items() if pointer is not None}
        top = {
            "width": state.table.width,
            "table": [[number, *pointer] for number, pointer in pages.items()],
            "directories": [[*key, *pointer] for key, pointer in merged.items()],
            "catalog": frozen.catalog,
            "used": frozen.used,
        }
        body = json.dumps(top, separators=(",", ":")).encode()
        size = min(TOP_PART_BYTES, state.shape().blocks * BLOCK_SIZE - page.ENVELOPE.size)
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        return pages, tuple(
            anchors.add(page.encode(page.KIND_TOP, 0, 0, number, generation, part))
            for number, part in enumerate(parts)
        )

    def _changed(self, number: int, part: npt.NDArray[np.void]) -> bool:
        if self.written is None or (number + 1) * PAGE_ROWS > len(self.written):
            return True
        old = self.written[number * PAGE_ROWS : (number + 1) * PAGE_ROWS]
        return old.tobytes() != part.tobytes()

    # -- storing and committing --------------------------------------------------------------

    async def _store(self, jobs: list[StripeJob]) -> bool:
        """Write meta stripes. False if some could not be: the members that failed are expelled."""
        state = self._state
        for start in range(0, len(jobs), JOB_STRIPES):
            part = jobs[start : start + JOB_STRIPES]
            outcome = await state.mover.run(Job(state.uuid, part))
            await note_failures(self._moving, outcome)
            if len(outcome.written) < len(part):
                return False
            state.counters["meta_stripes"] += len(part)
        return True

    def _committed(
        self, frozen: _Frozen, anchors: Packer, pages: dict[int, Pointer], top: tuple[Pointer, ...]
    ) -> Committed:
        rows = self._state.committed.anchors | {row.id: row for row, _, _ in anchors.stripes}
        needed = {pointer.stripe for pointer in (*pages.values(), *top)}
        return Committed(
            {stripe: rows[stripe] for stripe in rows if stripe in needed},
            top, frozen.replay, frozen.version, frozen.previous, frozen.tail, frozen.replay,
        )  # fmt: skip

    def _give_up(self, added: list[int], meta: Packer, anchors: Packer) -> None:
        """Nothing of this attempt is referred to by a committed root."""
        state = self._state
        for stripe in added:
            state.table.remove(stripe)
        if not state.stopped:
            meta.unplace()
            anchors.unplace()
        for layer_map in state.maps.values():
            if layer_map.writing:
                layer_map.thaw(None)

    # -- after the commit: no await, atomic --------------------------------------------------

    def _apply(
        self,
        frozen: _Frozen,
        directories: dict[tuple[int, int], Pointer | None],
        table_pages: dict[int, Pointer],
        dead: list[int],
        anchors: list[Stripe],
        rows: npt.NDArray[np.void],
    ) -> None:
        state = self._state
        for layer, fresh in frozen.fresh.items():
            layer_map = state.maps.get(layer)
            if layer_map is not None:
                state.killed.extend(pointer.stripe for pointer in layer_map.thaw(fresh))
            else:
                # Dropped meanwhile: the map is gone, and with it everything that was written of it.
                state.killed.extend(pointer.stripe for pointer in fresh.values())
        for key, pointer in directories.items():
            old = state.directories.pop(key, None)
            if old is not None:
                state.killed.append(old.stripe)
            if pointer is not None:
                state.directories[key] = pointer
        state.table_pages = table_pages
        self.written = rows
        state.settle()
        released = [*(state.table.remove(stripe) for stripe in dead), *anchors]
        state.forget_places()
        for row in released:
            state.counters["stripes_released"] += 1
            state.gate.defer(lambda row=row: state.release(row))  # type: ignore[misc]
        state.gate.defer(lambda: state.journal.release(max(frozen.tail, state.journal.tail)))


class _TryAgain(Exception):
    """Members failed while the checkpoint was written; they are expelled now."""
