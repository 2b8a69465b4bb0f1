"""Catching up: a device that returned gets back what it missed (R24).

What it holds was never changed behind its back, so every shard whose header is the one the stripe
table means is good; any other shard is rebuilt in its slot from the rest of the stripe. Until that
is done, a read of it is served from parity, and status says how much is left.

Called by the maintenance loop, a few stripes at a time, between its other steps.
"""

from __future__ import annotations

from collections import deque

from backends.base import Device, DeviceError
from pool.errors import DataLost, FormatError
from pool.failpoints import reached
from pool.format import stripe as stripe_format
from pool.member import Member
from pool.overdue import READ_SECONDS, WRITE_SECONDS, answer
from pool.reader import Reader
from pool.state import State
from pool.table import Stripe


class CatchUp:
    """The shards that returned devices may have missed."""

    def __init__(self, state: State, reader: Reader) -> None:
        self._state = state
        self._reader = reader
        #: (member, stripe, shard) still to be looked at.
        self._left: deque[tuple[int, int, int]] = deque()
        self._touched: set[int] = set()
        #: Members that are being looked at, and those of them that could not be made whole.
        self._members: set[int] = set()
        self._unsure: set[int] = set()

    def start(self, members: set[int]) -> None:
        """Look at every shard on these members."""
        self._members = members
        rows = [*self._state.table.stripes(), *self._state.committed.anchors.values()]
        for row in rows:
            for shard, (device, _) in enumerate(row.places):
                if device in members:
                    self._left.append((device, row.id, shard))
        if not self._left:
            self._believe()

    @property
    def left(self) -> int:
        """Shards still to be looked at."""
        return len(self._left)

    async def step(self, shards: int) -> None:
        """Look at up to `shards` shards and rebuild those that were missed."""
        state = self._state
        for _ in range(min(shards, len(self._left))):
            device, stripe, shard = self._left.popleft()
            try:
                row = state.row(stripe)
            except KeyError:
                continue
            member = state.members[device]
            if row.places[shard][0] == device and member.present:
                await self._look(member, row, shard)
        if not self._left:
            await self._finish()
            reached("catch_up_after_sync_before_done")
        self._report()

    async def _look(self, member: Member, row: Stripe, shard: int) -> None:
        with self._state.gate.inside():
            try:
                if not await self._is_there(member, row, shard):
                    reached("catch_up_after_look_before_rebuild")
                    await self._rebuild(member, row, shard)
            except DeviceError:
                # It is expelled by whoever writes to it next; reads use parity meanwhile.
                self._unsure.add(member.index)
                self._state.counters["catch_up_errors"] += 1
            except DataLost as error:
                self._unsure.add(member.index)
                self._state.problems["catch_up"] = str(error)

    async def _is_there(self, member: Member, row: Stripe, shard: int) -> bool:
        assert member.shards is not None
        slot = row.places[shard][1]
        read = member.shards.read(row.id, shard, slot, 0, row.shape.header_bytes)
        try:
            header = stripe_format.decode(await answer(read, READ_SECONDS, member.url))
        except FormatError:
            return False
        except DeviceError:
            if isinstance(member.backend, Device):
                raise
            return False  # a store that does not have the object
        return header.belongs(self._state.uuid, row.id, shard, row.shape)

    async def _rebuild(self, member: Member, row: Stripe, shard: int) -> None:
        header, data = await self._reader.shard(row, shard)
        if member.shards is None:
            return  # it was expelled meanwhile
        write = member.shards.write(row.id, shard, row.places[shard][1], [header, data])
        if not await self._reader.put_right(member, write):
            self._state.counters["catch_up_errors"] += 1
            return
        self._state.counters["caught_up_shards"] += 1
        self._touched.add(member.index)
        reached("catch_up_after_rebuild_before_sync")

    async def _finish(self) -> None:
        """Make what was rebuilt durable; before that it counts as missed."""
        touched, self._touched = self._touched, set()
        for index in touched:
            member = self._state.members[index]
            if member.shards is not None:
                try:
                    await answer(member.shards.sync(), WRITE_SECONDS, member.url)
                except DeviceError:
                    self._unsure.add(index)
                    self._state.counters["catch_up_errors"] += 1
        self._believe()

    def _believe(self) -> None:
        """The next root says that these members have everything."""
        for index in self._members - self._unsure:
            self._state.members[index].missed = False

    def _report(self) -> None:
        problems = self._state.problems
        if self._left:
            problems["catching up"] = f"returned devices are catching up: {self.left} shards to go"
        else:
            problems.pop("catching up", None)
