"""Checks stripes: every header, every block of every shard, the code, and the map's claims.

All headers of a stripe are one (R15), each block has the checksum that they say, and the parity is
the code of the data: any `k` shards give the others. A stripe is read in strips of some blocks of
all shards, inside the gate, so that its slots stay its own. What is wrong is a fault only if it is
so when looked at again: a reader may be repairing it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from backends.base import BLOCK_SIZE, DeviceError
from pool.check.claims import StripeClaims
from pool.check.report import Fault, Report, Severity
from pool.checksum import block_crcs
from pool.erasure import codec
from pool.errors import FormatError
from pool.format import stripe as stripe_format
from pool.format.stripe import Header
from pool.overdue import READ_SECONDS, answer
from pool.state import State
from pool.table import DATA, NOWHERE, Stripe
from pool.words import counted

#: Blocks of each shard that are looked at together.
STRIP_BLOCKS = 64

Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Shard:
    """A stored shard under examination."""

    number: int
    member: int
    slot: int
    header: Header | None = None
    #: Blocks that are wrong or cannot be read; of one that is missing, all.
    bad: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    #: What is wrong with it, as (kind, text).
    problems: list[tuple[str, str]] = field(default_factory=list)
    #: Another shard lies in its place: its blocks need no remark of their own.
    foreign: bool = False
    missing: bool = False


class StripeCheck:
    """Looks at stripes, one at a time."""

    def __init__(self, state: State, claims: StripeClaims, report: Report) -> None:
        self._state = state
        self._claims = claims
        self._report = report
        #: Shards on members that are missing, and members that do not answer.
        self.away = Counter[int]()
        self.silent = Counter[int]()
        #: Stripes whose header and map disagree; `suspects.Suspects` finds out where.
        self.suspects: set[int] = set()

    async def check(self, stripe: int) -> None:
        """Look at a stripe if it still is one, and again if something is wrong."""
        away, silent = self.away.copy(), self.silent.copy()
        faults = await self._look(stripe)
        if faults:
            self.away, self.silent = away, silent
            await asyncio.sleep(0)
            faults = await self._look(stripe)
        for fault in faults:
            self._report.add(fault)
        self._report.checked.stripes += 1

    async def _look(self, stripe: int) -> list[Fault]:
        with self._state.gate.inside():
            try:
                row = self._state.row(stripe)
            except KeyError:
                return []
            shards = self._shards(row)
            await asyncio.gather(*(self._read_header(row, shard) for shard in shards))
            header = _agreed(shards)
            if header is not None:
                for shard in shards:
                    _hold_against(shard, header)
            for start in range(0, row.shape.shard_blocks, STRIP_BLOCKS):
                await self._check_strip(row, shards, header, start)
            self._report.checked.shards += sum(not shard.missing for shard in shards)
            return [*self._judge_header(row, header), *self._judge(row, shards, header)]

    # -- reading -----------------------------------------------------------------------------

    def _shards(self, row: Stripe) -> list[_Shard]:
        shards = []
        for number, (member, slot) in enumerate(row.places):
            shard = _Shard(number, member, slot)
            shard.bad = np.zeros(row.shape.shard_blocks, np.bool_)
            found = self._state.members.get(member)
            if member == NOWHERE:
                shard.problems.append(("unstored", "is missing: it was never stored"))
            if found is None or not found.present or found.shards is None:
                shard.missing = True
                shard.bad[:] = True
                if member != NOWHERE:
                    self.away[member] += 1
            shards.append(shard)
        return shards

    async def _read(self, row: Stripe, shard: _Shard, offset: int, length: int) -> bytes:
        """Bytes of a shard. Raises DeviceError."""
        member = self._state.members[shard.member]
        if member.shards is None:
            raise DeviceError(5, f"{member.url}: it has left the pool")
        read = member.shards.read(row.id, shard.number, shard.slot, offset, length)
        return await answer(read, READ_SECONDS, member.url)

    async def _read_header(self, row: Stripe, shard: _Shard) -> None:
        if shard.missing:
            return
        if shard.member in self.silent:
            # Once was enough: each shard on it would take as long.
            self._silence(shard)
            return
        try:
            header = stripe_format.decode(await self._read(row, shard, 0, row.shape.header_bytes))
        except DeviceError as error:
            self._silence(shard) if _hangs(error) else self._unreadable(shard, error)
            return
        except FormatError as error:
            shard.problems.append(("header", f"its header is damaged ({error})"))
            return
        if (header.pool, header.stripe, header.shard, header.shape) != (
            self._state.uuid, row.id, shard.number, row.shape,
        ):  # fmt: skip
            shard.foreign = True
            what = f"stripe {header.stripe}, shard {header.shard}"
            if header.pool != self._state.uuid:
                what += " of another pool"
            elif header.shape != row.shape:
                what += " of another shape"
            shard.problems.append(("foreign", f"holds {what}"))
            return
        shard.header = header

    def _silence(self, shard: _Shard) -> None:
        self.silent[shard.member] += 1
        shard.missing = True
        shard.bad[:] = True

    @staticmethod
    def _unreadable(shard: _Shard, error: DeviceError) -> None:
        shard.problems.append(("unreadable", f"cannot be read ({error.strerror})"))
        shard.missing = True
        shard.bad[:] = True

    async def _check_strip(
        self, row: Stripe, shards: list[_Shard], header: Header | None, start: int
    ) -> None:
        """Read some blocks of all shards and hold them against the header and each other."""
        count = min(STRIP_BLOCKS, row.shape.shard_blocks - start)
        here = slice(start, start + count)
        there = [shard for shard in shards if not shard.missing]
        parts = await asyncio.gather(*(self._strip(row, shard, start, count) for shard in there))
        good: dict[int, bytes] = {}
        for shard, data in zip(there, parts, strict=True):
            if data is None:
                shard.bad[here] = True
            elif header is not None:
                shard.bad[here] = _wrong(header, shard.number, start, data)
                if not shard.bad[here].any():
                    good[shard.number] = data
            self._report.checked.blocks += count
        if header is not None and len(good) >= row.shape.data:
            _check_code(row, shards, header, start, good)

    async def _strip(self, row: Stripe, shard: _Shard, start: int, count: int) -> bytes | None:
        offset = row.shape.header_bytes + start * BLOCK_SIZE
        try:
            return await self._read(row, shard, offset, count * BLOCK_SIZE)
        except DeviceError as error:
            if not any(kind == "unreadable" for kind, _ in shard.problems):
                shard.problems.append(("unreadable", f"cannot be read in full ({error.strerror})"))
            return None

    # -- judging -----------------------------------------------------------------------------

    def _judge_header(self, row: Stripe, header: Header | None) -> Iterator[Fault]:
        if header is None:
            return
        contents, used = header.contents, header.used
        newest = int(contents.versions.max(initial=0))
        problem = ""
        if header.kind != row.kind:
            problem = f"says kind {header.kind}, the table says {row.kind}"
        elif stripe_format.digest(header) != header.digest:
            problem = "does not have the digest of what it says"
        elif contents.layers[used:].any() or contents.blocks[used:].any():
            problem = f"names blocks behind the {used} that are in use"
        elif newest > self._state.journal.version:
            problem = f"has version {newest}, the journal is at {self._state.journal.version}"
        if problem:
            yield Fault(
                "header", Severity.WRONG, f"stripe {row.id}: its header {problem}", stripe=row.id
            )
        live = row.kind == DATA and row.id in self._state.table
        if live and not self._claims.agree(
            row.id, contents.layers[:used], contents.blocks[:used], contents.crcs[:used]
        ):
            self.suspects.add(row.id)

    def _judge(self, row: Stripe, shards: list[_Shard], header: Header | None) -> Iterator[Fault]:
        """A line per shard that is bad, with what it means for the data."""
        beyond = sum(shard.bad.astype(np.int64) for shard in shards) > row.shape.parity
        lost = np.concatenate([shard.bad & beyond for shard in shards[: row.shape.data]])
        needed = self._needed(row)
        lost &= needed
        for shard in shards:
            count = int(shard.bad.sum())
            if count and not shard.missing and not shard.foreign and not any(
                kind in ("unreadable", "code") for kind, _ in shard.problems
            ):  # fmt: skip
                shard.problems.append(
                    ("block", f"{count} of {len(shard.bad)} blocks of {BLOCK_SIZE} are wrong")
                )
            if not shard.problems:
                continue
            first = shard.number * row.shape.shard_blocks
            own = lost[first : first + row.shape.shard_blocks]
            yield self._fault(row, shard, int(own.sum()), needed=bool(needed.any()))
        if lost.any() and all(not shard.problems for shard in shards):
            yield self._gone(row, int(lost.sum()))
        if header is None and any(not shard.missing for shard in shards):
            yield Fault(
                "header", Severity.WRONG,
                f"stripe {row.id}: no shard has a whole header: nothing of it can be reconstructed",
                stripe=row.id,
            )  # fmt: skip

    def _needed(self, row: Stripe) -> Mask:
        """Which data blocks of the stripe matter."""
        needed = np.ones(row.shape.blocks, np.bool_)
        if row.kind == DATA:
            needed[:] = False
            needed[self._claims.places(row.id)] = True
        return needed

    def _fault(self, row: Stripe, shard: _Shard, lost: int, *, needed: bool) -> Fault:
        what = " and ".join(text for _, text in shard.problems)
        where = f"stripe {row.id}, shard {shard.number}"
        member = self._state.members.get(shard.member)
        if member is not None:
            where += f" on device {member.index} ({member.url})"
        if lost:
            meaning = f"{counted(lost, 'block')} of data lost: too few other shards are good"
        elif not needed:
            meaning = "nothing in the stripe is needed any more"
        elif shard.number < row.shape.data:
            meaning = "still readable through parity"
        else:
            meaning = "no data in it, but less parity to rely on"
        joint = " " if what.startswith(("is ", "holds ", "cannot ")) else ": "
        return Fault(
            shard.problems[0][0], Severity.LOST if lost else Severity.DEGRADED,
            f"{where}{joint}{what}; {meaning}",
            member=None if member is None else member.index, stripe=row.id, shard=shard.number,
        )  # fmt: skip

    @staticmethod
    def _gone(row: Stripe, lost: int) -> Fault:
        return Fault(
            "stripe", Severity.LOST,
            f"stripe {row.id}: {counted(lost, 'block')} of data cannot be read: more shards are on "
            f"missing devices than its parity of {row.shape.parity} can replace",
            stripe=row.id,
        )  # fmt: skip

    def missing(self) -> Iterator[Fault]:
        """A line per device that is missing or does not answer."""
        for members, text in ((self.away, "is missing"), (self.silent, "does not answer")):
            for member, shards in sorted(members.items()):
                yield Fault(
                    "device", Severity.UNCHECKED,
                    f"device {member} {text}: {counted(shards, 'shard')} on it could not be "
                    "checked",
                    member=member,
                )  # fmt: skip


def _hangs(error: DeviceError) -> bool:
    return "no answer for" in str(error)


def _agreed(shards: list[_Shard]) -> Header | None:
    """The header that most shards have."""
    headers = {s.header.digest: s.header for s in shards if s.header is not None}
    counts = Counter(s.header.digest for s in shards if s.header is not None)
    return headers[counts.most_common(1)[0][0]] if counts else None


def _hold_against(shard: _Shard, header: Header) -> None:
    """Headers of one stripe differ in nothing but the shard's number (R15)."""
    own = shard.header
    if own is None:
        return
    if own.digest != header.digest:
        shard.foreign = True
        shard.problems.append(("attempt", "is of another attempt at the stripe"))
    elif (own.kind, own.used) != (header.kind, header.used) or not np.array_equal(
        own.contents.crcs, header.contents.crcs
    ):
        shard.problems.append(("header", "its header differs from the others"))


def _wrong(header: Header, shard: int, start: int, data: bytes) -> Mask:
    """Which blocks of a strip do not have the checksum that the header says."""
    found = np.array(block_crcs(memoryview(data)), np.uint32)
    first = shard * header.shape.shard_blocks + start
    wrong: Mask = found != header.contents.crcs[first : first + len(found)]
    return wrong


def _check_code(
    row: Stripe, shards: list[_Shard], header: Header, start: int, good: dict[int, bytes]
) -> None:
    """Any k good shards must give the others: bytes of those that are good, checksums of the
    rest."""
    base = dict(sorted(good.items())[: row.shape.data])
    wanted = [number for number in range(row.shape.shards) if number not in base]
    out = [memoryview(bytearray(len(next(iter(base.values()))))) for _ in wanted]
    codec(row.shape.data, row.shape.parity).reconstruct(base, wanted, out)
    for number, made in zip(wanted, out, strict=True):
        if number in good:
            same = made == good[number]
        else:
            same = not _wrong(header, number, start, bytes(made)).any()
        shard = shards[number]
        if not same and not any(kind == "code" for kind, _ in shard.problems):
            shard.problems.append(("code", "does not fit the others: it is not their code"))
            shard.bad[start : start + len(made) // BLOCK_SIZE] = True
