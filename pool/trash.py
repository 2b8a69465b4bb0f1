"""Deletes shard objects that nothing refers to: those that a checkpoint let go of, and orphans.

A slot of a device is simply used again; an object takes its store's space until it is deleted. A
crash between a commit and the deletions, or between a write and its commit, leaves *orphans*: found
once per opening, by listing the stores in the background. Only ids of earlier lives count, and only
those that no row and no anchor had when the pool was opened: stripe ids are never reused (R1), so
nothing that this life writes or moves is among them. The term is committed by then, so no root that
could still name them will be chosen again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from backends.base import DeviceError
from pool.failpoints import reached
from pool.overdue import WRITE_SECONDS, answer
from pool.state import State

#: Names looked at between two turns of the event loop.
SLICE = 1024


async def delete(state: State, objects: Iterable[tuple[int, int, int]]) -> None:
    """Delete (member, stripe, shard), one after the other. One that cannot be deleted now is an
    orphan at the next opening."""
    for index, stripe, shard in objects:
        shards = state.members[index].shards
        if shards is not None:
            reached("trash_after_root_before_delete")
            try:
                await answer(shards.delete(stripe, shard), WRITE_SECONDS, f"device {index}")
                state.counters["objects_deleted"] += 1
            except DeviceError:
                state.counters["objects_left"] += 1


class Orphans:
    """Made before the first stripe of this life is written."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._stores = [
            member for member in state.active() if member.shards and member.shards.must_delete
        ]
        known = [*state.table.rows, *state.committed.anchors] if self._stores else []
        self._known = np.unique(np.array(known, np.uint64))
        self._first = state.next_stripe

    async def delete(self) -> None:
        """Delete the orphans on all stores. A store that cannot be listed keeps them."""
        for member in self._stores:
            try:
                stored = await member.shards.stored() if member.shards is not None else []
            except DeviceError:
                self._state.counters["stores_not_listed"] += 1
                continue
            for start in range(0, len(stored), SLICE):
                if self._state.stopped:
                    return
                found = self._among(stored[start : start + SLICE])
                self._state.counters["orphans"] += len(found)
                await delete(self._state, ((member.index, *item) for item in found))
                await asyncio.sleep(0)

    def _among(self, stored: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of (stripe, shard) that are orphans."""
        ids = np.array([stripe for stripe, _ in stored], np.uint64)
        orphans = (ids < self._first) & ~np.isin(ids, self._known)
        return [stored[at] for at in np.flatnonzero(orphans).tolist()]
