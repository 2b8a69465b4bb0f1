"""What clients of a simulated pool may see: the judge of P1 to P4.

Every write stamps its number and place into each 512-byte sector, so what is read says who wrote
it. The oracle knows of each operation only what a client knows: when it was issued, when it was
acknowledged, which flush covered it. It never looks into the engine.

Theory of operation: an operation takes effect at one moment between issue and acknowledgement.
After a crash the content of a volume must be explained by a set of operations that is closed
towards the past (a prefix, P3), contains everything promised (flushed, P2; acknowledged when only
the process died, P1), and in which every sector's writer is the last one to touch it. `explain`
finds the least such set, and the earliest moment of each member, as a fixed point; there is none
exactly when some moment falls behind its acknowledgement, or two operations would each have to
precede the other. Writes larger than a piece are chains of operations, in order.

What was read back after a crash is the new base: the same bytes must be there from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SECTOR = 512
_WORDS = SECTOR // 8
_STEP = 1e-6
_BASE = -1
_FOREIGN = -2
#: Explanations that are tried, per operation.
TRIES = 4

Ids = npt.NDArray[np.int64]


class Violation(AssertionError):
    """A promise was broken. `late` is the operation that came too late to explain what is seen."""

    late: int | None = None


@dataclass(slots=True, eq=False)
class Op:
    """A write (or, with `zero`, a trim or write of zeros) of sectors `first` to `end`."""

    id: int
    first: int
    end: int
    zero: bool
    issued: float
    acked: float = math.inf
    flushed: bool = False
    #: The operation that takes effect before it in any case: the piece in front.
    after: Op | None = None

    def __str__(self) -> str:
        what = "zeroing" if self.zero else "write"
        return (
            f"{what} {self.id} of sectors {self.first}..{self.end} (issued {self.issued:.0f}, "
            f"acknowledged {self.acked:.0f}{', flushed' if self.flushed else ''})"
        )


@dataclass(slots=True)
class History:
    """One volume: what it held when it was last pinned, and what was done to it since."""

    base: Ids
    ops: list[Op] = field(default_factory=list)


class Oracle:
    """Records operations by volume and judges what is read. Times are ticks of its own clock."""

    def __init__(self) -> None:
        self.volumes: dict[str, History] = {}
        #: Volumes whose creation or deletion was not acknowledged: either is right.
        self.uncertain: set[str] = set()
        self._tick = 0
        self._next = 1

    def tick(self) -> int:
        """The time, one later than any before."""
        self._tick += 1
        return self._tick

    # -- recording ---------------------------------------------------------------------------

    def add_volume(self, name: str, size: int) -> None:
        """A volume of `size` bytes is being created."""
        self.volumes[name] = History(np.zeros(size // SECTOR, np.int64))

    def forget(self, name: str) -> None:
        """A volume was not created after all, as its creator was told."""
        self.volumes.pop(name, None)
        self.uncertain.discard(name)

    def begin(
        self, name: str, first: int, end: int, *, zero: bool = False, after: Op | None = None
    ) -> Op:
        """An operation on sectors `first` to `end` is issued."""
        op = Op(self._next, first, end, zero, self.tick(), after=after)
        self._next += 1
        self.volumes[name].ops.append(op)
        return op

    def acknowledge(self, ops: Sequence[Op]) -> None:
        """Operations were answered."""
        now = self.tick()
        for op in ops:
            op.acked = now

    def refuse(self, name: str, ops: Sequence[Op]) -> None:
        """Operations were refused as a whole: nothing of them may ever be seen."""
        history = self.volumes.get(name)
        if history is not None:
            history.ops = [op for op in history.ops if op not in ops]

    def flushed(self, begun: int) -> None:
        """A flush issued at `begun` was answered. Volumes share the journal, so it covers all."""
        for history in self.volumes.values():
            for op in history.ops:
                op.flushed = op.flushed or op.acked < begun

    # -- judging -----------------------------------------------------------------------------

    def check_read(self, name: str, first: int, data: bytes | memoryview, begun: int) -> None:
        """Judge a read issued at `begun` that returned just now. Raises Violation."""
        history = self.volumes[name]
        seen = identify(data, first)
        base = history.base[first : first + len(seen)]
        # Within [begun, now] every sector is judged by itself: a read is not atomic.
        shown = seen == base
        newest = np.zeros(len(seen))
        for op in history.ops:
            here = slice(max(op.first - first, 0), max(op.end - first, 0))
            if op.acked < begun:
                newest[here] = np.maximum(newest[here], op.issued)
        allowed = shown & (newest == 0)
        for op in history.ops:
            here = slice(max(op.first - first, 0), max(op.end - first, 0))
            value = 0 if op.zero else op.id
            allowed[here] |= (seen[here] == value) & (op.acked >= newest[here])
        if not allowed.all():
            at = int(np.argmin(allowed))
            raise Violation(
                f"P4: {name}, sector {first + at}: a read shows {seen[at]}, which was neither "
                f"there nor written meanwhile; touched by {touching(history.ops, first + at)}"
            )

    def check_recovered(self, name: str, data: bytes | memoryview, *, power_lost: bool) -> int:
        """Judge a volume after a crash, and pin what was found. Returns how many acknowledged
        operations are gone. Raises Violation."""
        history = self.volumes[name]
        seen = identify(data, 0)
        try:
            kept = explain(history.base, history.ops, seen, power_lost=power_lost)
        except Violation as violation:
            raise Violation(f"{name}: {violation}") from None
        lost = [op for op in history.ops if op.acked < math.inf and op not in kept]
        self.volumes[name] = History(seen)
        return len(lost)


def stamp(op: int, first: int, end: int) -> bytes:
    """What operation `op` writes into sectors `first` to `end`."""
    words = np.empty((end - first, _WORDS), np.int64)
    words[:, 0::2] = op
    words[:, 1::2] = np.arange(first, end)[:, None]
    return words.tobytes()


def identify(data: bytes | memoryview, first: int) -> Ids:
    """Who wrote each sector of `data`, which begins at sector `first`; 0 for zeros. Raises
    Violation for bytes that nobody ever wrote there."""
    words = np.frombuffer(data, np.int64).reshape(-1, _WORDS)
    ids = words[:, 0].copy()
    places = np.where(ids == 0, 0, np.arange(first, first + len(ids)))
    wrong = (words[:, 0::2] != ids[:, None]).any(axis=1)
    wrong |= (words[:, 1::2] != places[:, None]).any(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise Violation(
            f"P4: sector {first + at} holds bytes that nobody wrote there: {words[at, :4].tolist()}"
        )
    return ids


def touching(ops: Sequence[Op], sector: int) -> str:
    """The operations on a sector, for messages."""
    found = [str(op) for op in ops if op.first <= sector < op.end]
    return "; ".join(found[-6:]) or "nothing"


def explain(base: Ids, ops: Sequence[Op], seen: Ids, *, power_lost: bool) -> set[Op]:
    """The least set of operations that explains what is seen. Raises Violation."""
    return _Puzzle(base, ops, seen).solve(power_lost=power_lost)


class _Puzzle:
    """The fixed point; see the module. Sectors that no operation tells apart are looked at once."""

    def __init__(self, base: Ids, ops: Sequence[Op], seen: Ids) -> None:
        edges = {0, *(op.first for op in ops), *(op.end for op in ops)}
        edges.update((np.flatnonzero(np.diff(seen)) + 1).tolist())
        edges.update((np.flatnonzero(np.diff(base)) + 1).tolist())
        self.sectors = np.array(sorted(edge for edge in edges if edge < len(base)))
        self.ops = ops
        self.base, self.seen = base[self.sectors], seen[self.sectors]
        self.issued = np.array([op.issued for op in ops], float)
        self.acked = np.array([op.acked for op in ops], float)
        self.zero = np.array([op.zero for op in ops], bool)
        first = np.array([op.first for op in ops], int).reshape(-1, 1)
        end = np.array([op.end for op in ops], int).reshape(-1, 1)
        self.covers = (first <= self.sectors) & (self.sectors < end)
        number = {op: i for i, op in enumerate(ops)}
        self.chain = [(number[op.after], i) for i, op in enumerate(ops) if op.after in number]
        #: Who wrote what is seen; for zeros it is found on the way.
        self.writer = self._writers()
        #: What must have taken effect whatever is seen.
        self.forced = np.zeros(len(ops), bool)
        self.included = self.forced.copy()
        self.moment = self.issued.copy()
        #: Zeroings that cannot be what is seen there, since order would then go in a circle.
        self.barred = np.zeros_like(self.covers)

    def _writers(self) -> npt.NDArray[np.int64]:
        writer = np.full(len(self.sectors), _FOREIGN)
        writer[(self.seen == self.base) | (self.seen == 0)] = _BASE
        for i, op in enumerate(self.ops):
            if not op.zero:
                writer[self.covers[i] & (self.seen == op.id)] = i
        if (writer == _FOREIGN).any():
            at = int(np.argmax(writer == _FOREIGN))
            raise Violation(
                f"P4: sector {self.sectors[at]} shows write {self.seen[at]}, which is older than "
                f"the pinned {self.base[at]}, was refused or was never made there"
            )
        return writer

    def solve(self, *, power_lost: bool) -> set[Op]:
        """Zeros do not say which zeroing they come from: if the first that could be it leads
        nowhere, it is barred, and the next one is tried."""
        promised = [op.flushed or (not power_lost and op.acked < math.inf) for op in self.ops]
        forced = self.forced = np.array(promised, bool)
        first: Violation | None = None
        for _ in range(TRIES * len(self.ops) + 1):
            self.included = forced.copy()
            self.moment = self.issued.copy()
            self.writer = self._writers()
            try:
                return self._explanation()
            except Violation as violation:
                first = first or violation
                late = violation.late
            if late is not None and self._bar_elsewhere(late):
                continue
            guesses = np.flatnonzero(self.included & self.zero & ~forced & ~self.barred.all(axis=1))
            if not len(guesses):
                break
            wrong = [i for i in guesses.tolist() if self._impossible(i)]
            self.barred[wrong or [max(guesses.tolist(), key=lambda i: self.issued[i])]] = True
        assert first is not None
        raise first

    def _bar_elsewhere(self, late: int) -> bool:
        """An operation came too late because a zeroing, itself or one seen under it, was taken for
        zeros that must be younger: bar it there. False if that is not why."""
        if self.zero[late]:
            here = self.writer == late
            self.barred[late] |= here
            return bool(here.any())
        under = self.covers[:, self.writer == late].any(axis=1) & self.zero
        young = self.included & (self.moment >= self.acked[late])
        young[late] = False
        done = False
        for i in np.flatnonzero(under & (self.moment > self.acked[late])).tolist():
            others = young.copy()
            others[i] = False
            here = (self.covers & others[:, None]).any(axis=0) & (self.writer == i)
            self.barred[i] |= here
            done = done or bool(here.any())
        return done

    def _impossible(self, zeroing: int) -> bool:
        """Whether something is seen under a zeroing, or under a piece in front of it, that was over
        before it was issued."""
        seen = self.writer[self.covers[zeroing] & (self.seen != 0)]
        if bool((seen == _BASE).any() or (self.acked[seen] < self.issued[zeroing]).any()):
            return True
        fronts = [front for front, piece in self.chain if piece == zeroing]
        return any(self._impossible(front) for front in fronts)

    def _explanation(self) -> set[Op]:
        for _ in range(2 * len(self.ops) + 4):
            before = (self.included.copy(), self.moment.copy(), self.writer.copy())
            self._close()
            self._find_zeroings()
            self._order()
            after = (self.included, self.moment, self.writer)
            if all(np.array_equal(old, new) for old, new in zip(before, after, strict=True)):
                return {op for i, op in enumerate(self.ops) if self.included[i]}
        raise Violation("P3: some operations would each have to come before the other")

    def _close(self) -> None:
        """Include the writers of what is seen, and whatever was over before them."""
        self.included[self.writer[self.writer >= 0]] = True
        for front, piece in reversed(self.chain):
            self.included[front] |= self.included[piece]
        if self.included.any():
            self.included |= self.acked < self.moment[self.included].max()

    def _find_zeroings(self) -> None:
        """For zeros over something: the first zeroing that can be behind all that is included."""
        active = self.covers & (self.included & ~self.zero)[:, None]
        newest = np.where(active, self.moment[:, None], 0).max(axis=0, initial=0)
        open_ = (self.seen == 0) & ((self.base != 0) | (newest > 0))
        self.writer[open_] = _FOREIGN
        for i in np.argsort(self.issued, kind="stable").tolist():
            if self.zero[i]:
                here = open_ & self.covers[i] & (self.acked[i] > newest) & ~self.barred[i]
                self.writer[here] = i
                open_ &= ~here
        if open_.any():
            at = int(np.argmax(open_))
            raise Violation(
                f"P3: sector {self.sectors[at]} shows zeros and lost {self._story(at)} "
                f"(pinned: {self.base[at]})"
            )

    def _order(self) -> None:
        """Move each operation behind all that it was seen to overwrite."""
        active = self.covers & self.included[:, None]
        stale = active.any(axis=0) & (self.writer == _BASE) & (self.seen != 0)
        if stale.any():
            at = int(np.argmax(stale))
            raise Violation(f"P3: sector {self.sectors[at]} is old and lost {self._story(at)}")
        x, where = np.nonzero(active)
        w = self.writer[where]
        matter = (w >= 0) & (w != x) & ~(self.zero[x] & (self.seen[where] == 0))
        chain = np.array([pair for pair in self.chain if self.included[pair[1]]], int).reshape(
            -1, 2
        )
        pairs = np.unique(np.hstack([np.stack([x[matter], w[matter]]), chain.T]), axis=1)
        for _ in range(len(self.ops) + 1):
            before = self.moment.copy()
            np.maximum.at(self.moment, pairs[1], self.moment[pairs[0]] + _STEP)
            if np.array_equal(before, self.moment):
                break
        else:
            self._break_circle(pairs)
            return
        late = self.included & (self.moment > self.acked)
        if late.any():
            i = int(np.argmax(late))
            lost = [str(self.ops[a]) for a, b in pairs.T.tolist() if b == i]
            violation = Violation(
                f"P3: {self.ops[i]} is seen where it had been overwritten by {lost[-4:]}"
            )
            violation.late = i
            raise violation

    def _break_circle(self, pairs: Ids) -> None:
        """Bar the zeroings through which order goes in a circle. Raises Violation if none does."""
        after: dict[int, set[int]] = {i: set() for i in np.unique(pairs).tolist()}
        for a, b in pairs.T.tolist():
            after[a].add(b)
        for i in after:
            reached, todo = set[int](), [*after[i]]
            while todo:
                todo += after[new := todo.pop()] - reached
                reached.add(new)
            after[i] |= reached
        circle = [i for i, reached in after.items() if i in reached]
        zeroings = [i for i in circle if self.zero[i]]
        met = self.covers[[j for j in circle if not self.zero[j]]].any(axis=0)
        through = {i: met & (self.writer == i) for i in zeroings}
        # Where another zeroing may be what is seen, first: elsewhere it has to be this one.
        elsewhere = {i: here & self._others(i) for i, here in through.items()}
        if any(here.any() for here in elsewhere.values()):
            through = elsewhere
        for i, here in through.items():
            self.barred[i] |= here
        if not zeroings:
            stories = "; ".join(str(self.ops[i]) for i in circle[:4])
            raise Violation(f"P3: each of these is seen to overwrite the other: {stories}")
        # What was taken to be there because of the wrong ones may not be.
        self.included, self.moment = self.forced.copy(), self.issued.copy()
        self.writer = self._writers()

    def _others(self, zeroing: int) -> npt.NDArray[np.bool_]:
        """Where zeros could come from another zeroing than this one."""
        active = self.covers & (self.included & ~self.zero)[:, None]
        newest = np.where(active, self.moment[:, None], 0).max(axis=0, initial=0)
        can = self.covers & self.zero[:, None] & ~self.barred & (self.acked[:, None] > newest)
        can[zeroing] = False
        found: npt.NDArray[np.bool_] = can.any(axis=0)
        return found

    def _story(self, at: int) -> str:
        found = [str(op) for i, op in enumerate(self.ops) if self.covers[i, at] & self.included[i]]
        return "; ".join(found[-6:])
