"""Checks the journal on every replica: headers, chain, payload, and what the map finds in it (R2).

The records are walked from the tail to what was durable when the walk began. The engine knows where
each begins, so one that is bad on a replica does not hide what is behind it. Each record is read
inside the gate: the tail cannot pass it meanwhile (R21).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise

from crc32c import crc32c

from pool.check.claims import JournalClaims
from pool.check.pages import owner
from pool.check.report import Report
from pool.errors import FormatError
from pool.format import record
from pool.format.record import KIND_DATA, Record
from pool.journal import Journal, Replica
from pool.recovery import Source, Window
from pool.state import State
from pool.words import counted

#: Blocks looked at between two turns of the event loop.
SLICE = 256
#: Runs of bad blocks that are named per replica.
RUNS_MAX = 32


@dataclass(slots=True)
class _Copy:
    """A replica under the walk: what of it is bad, as runs of positions."""

    replica: Replica
    window: Window
    #: Everything below must be there and right.
    end: int
    runs: list[list[int]] = field(default_factory=list)

    def blame(self, position: int) -> None:
        """Note a bad block; positions come in order."""
        if self.runs and self.runs[-1][1] == position:
            self.runs[-1][1] = position + 1
        else:
            self.runs.append([position, position + 1])

    def holds(self, position: int) -> bool:
        return self.replica.valid_from <= position < self.end


class LogCheck:
    """The walk over the journal."""

    def __init__(self, state: State, claims: JournalClaims, report: Report) -> None:
        self._state = state
        self._claims = claims
        self._report = report
        #: Bad on all replicas, as (position, owner): owner is None if nothing maps it.
        self._lost: list[tuple[int, tuple[int, int] | None]] = []

    async def run(self) -> None:
        """Walk all records that are durable; of a pool open for reading, all that there are."""
        journal = self._state.journal
        writable = self._state.writable
        end = journal.durable if writable else journal.head
        copies = [
            _Copy(replica, Window(_source(replica, journal)), min(end, replica.synced))
            for replica in journal.replicas
            if not replica.failed
        ]
        # What is durable may end inside of a record: that one is not looked at.
        bounds = [at for at in (*journal.starts, journal.head) if at <= end]
        last: Record | None = None
        seen = 0
        for at, behind in pairwise(bounds):
            with self._state.gate.inside():
                if at >= journal.tail:
                    last = await self._record(copies, at, behind, last)
                    self._report.checked.records += 1
                else:
                    last = None
            seen += behind - at
            if seen >= SLICE:
                seen = 0
                await asyncio.sleep(0)
        if bounds:
            self._left(max(journal.tail, bounds[0]), bounds[-1])
        self._tell(copies)

    # -- one record --------------------------------------------------------------------------

    async def _record(
        self, copies: list[_Copy], at: int, behind: int, last: Record | None
    ) -> Record | None:
        """Look at the record at a position on all replicas; returns it."""
        headers = [await _header(copy, at) for copy in copies]
        found = next((h for h in headers if h is not None and _continues(h, last)), None)
        if found is None:
            found = next((h for h in headers if h is not None), None)
            if found is not None:
                self._wrong(at, "does not continue the one before it")
        if found is not None and found.end != behind:
            self._wrong(at, f"ends at {found.end}, the next one begins at {behind}")
        for copy, header in zip(copies, headers, strict=True):
            if copy.holds(at) and (header is None or found is None or header.crc != found.crc):
                copy.blame(at)
        if found is None:
            self._bare(at)
            for position in range(at + 1, behind):
                claim = self._claims.peek(position)
                if claim is not None:
                    await self._block(copies, position, claim[2])
            return None
        self._compare(found)
        for index, crc in enumerate(found.crcs):
            await self._block(copies, at + 1 + index, crc)
        return found

    async def _block(self, copies: list[_Copy], position: int, crc: int) -> None:
        owner_here = self._claims.take(position)
        right = False
        for copy in copies:
            data = await copy.window.block(position)
            if data is not None and crc32c(data) == crc:
                right = True
            elif copy.holds(position):
                copy.blame(position)
        if not right:
            self._lost.append((position, owner_here[:2] if owner_here else None))

    def _compare(self, found: Record) -> None:
        """What the map finds in the record must be what the record says that it holds."""
        position, used = found.position + 1, 0
        for extent in found.extents:
            for index in range(extent.payload):
                here = position + used + index
                claim = self._claims.peek(here)
                if claim is None:
                    continue
                layer, block, _ = claim
                said = (extent.layer, extent.block + index, found.crcs[used + index])
                if extent.kind != KIND_DATA or claim != said:
                    self._misplaced(here, layer, block)
            used += extent.payload

    # -- the result --------------------------------------------------------------------------

    def _bare(self, position: int) -> None:
        """The header of a record is nowhere."""
        self._lost.append((position, None))
        self._report.lost(
            "record",
            f"no replica has the journal record at {position}: what is behind it is lost if the "
            "pool is closed before its next checkpoint",
            position=position,
        )

    def _left(self, start: int, end: int) -> None:
        """Entries at positions where no record has a block."""
        for position in list(self._claims.left(start, end)):
            claim = self._claims.take(position)
            if claim is not None:
                self._misplaced(position, claim[0], claim[1])

    def _misplaced(self, position: int, layer: int, block: int) -> None:
        self._report.wrong(
            "entry",
            f"{owner(self._state, layer)}: block {block}: journal position {position} holds "
            "something else",
            position=position,
            layer=layer,
            block=block,
        )

    def _wrong(self, position: int, what: str) -> None:
        self._report.wrong(
            "record",
            f"the journal record at {position} {what}",
            position=position,
        )

    def _tell(self, copies: list[_Copy]) -> None:
        lost = {position for position, _ in self._lost}
        for copy in copies:
            member = self._state.members[copy.replica.member]
            for start, end in copy.runs[:RUNS_MAX]:
                alone = not lost.intersection(range(start, end))
                meaning = "another replica has them" if alone else "not all are on another replica"
                blocks = counted(end - start, "block")
                self._report.degraded(
                    "journal",
                    f"journal on device {member.index} ({member.url}): {blocks} from position "
                    f"{start} on missing or damaged; {meaning}",
                    member=member.index,
                    position=start,
                )
            if len(copy.runs) > RUNS_MAX:
                self._report.more += len(copy.runs) - RUNS_MAX
        for position, whose in self._lost:
            if whose is not None:
                self._report.lost(
                    "journal",
                    f"{owner(self._state, whose[0])}: block {whose[1]} is lost: no replica has "
                    f"journal position {position} right; it reads as an error until it is "
                    "overwritten",
                    position=position,
                    layer=whose[0],
                    block=whose[1],
                )


def _source(replica: Replica, journal: Journal) -> Source:
    return Source(replica.member, replica.device, replica.offset, journal.size)


async def _header(copy: _Copy, position: int) -> Record | None:
    data = await copy.window.block(position)
    if data is None:
        return None
    try:
        found = record.decode(data)
    except FormatError:
        return None
    return found if found.position == position else None


def _continues(header: Record, last: Record | None) -> bool:
    return last is None or (header.previous == last.crc and header.version > last.version)
