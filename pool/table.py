"""The stripe table: stripe id → shape and, per shard, device and slot.

The only place that knows where shards are. Columns are typed arrays; a row index is an accident of
this process and of the page it lies on, the stripe id is the name. Rows live on pages of
`PAGE_ROWS` rows; a checkpoint writes the pages that changed.

Called by everything that turns a location into a device address, by placement and by the
checkpoint. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pool.errors import FormatError
from pool.format import stripe as stripe_format
from pool.format.geometry import Geometry

PAGE_ROWS = 128
#: Device number of a shard that is not stored (its device was gone when the stripe was written).
NOWHERE = 0xFFFF


@dataclass(frozen=True, slots=True)
class Stripe:
    """One row. `places` has (device index, slot) per shard, device NOWHERE for one that is not
    stored."""

    id: int
    kind: int
    shape: Geometry
    places: tuple[tuple[int, int], ...]
    placement: int = 0

    def to_json(self) -> list[object]:
        """The row as the root keeps it for the stripes that hold the table itself."""
        s = self.shape
        places = [number for place in self.places for number in place]
        head = [self.id, self.kind, s.data, s.parity, s.header_blocks, s.shard_blocks]
        return [*head, self.placement, places]

    @classmethod
    def from_json(cls, row: list[object]) -> Stripe:
        """Inverse of `to_json`. Raises FormatError."""
        try:
            number, kind, k, m, header, shard, placement, flat = row
            assert isinstance(flat, list)
            assert len(flat) == 2 * (int(k) + int(m))  # type: ignore[call-overload]
            places = tuple((int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2))
            shape = Geometry(int(k), int(m), int(header), int(shard))  # type: ignore[call-overload]
            return cls(int(number), int(kind), shape, places, int(placement))  # type: ignore[call-overload]
        except (ValueError, TypeError, AssertionError) as error:
            raise FormatError("stripe row in the root is damaged") from error


def row_dtype(width: int) -> np.dtype[np.void]:
    """One row on a table page (`docs/format.md`, "Table page"); id 0 marks an empty row."""
    return np.dtype(
        [
            ("id", "<u8"),
            ("live", "<u4"),
            ("placement", "<u4"),
            ("kind", "u1"),
            ("data", "u1"),
            ("parity", "u1"),
            ("class", "u1"),
            ("header", "<u2"),
            ("shard", "<u2"),
            ("device", "<u2", (width,)),
            ("slot", "<u4", (width,)),
        ]
    )


class StripeTable:
    """Rows of all stripes but those that hold the table itself (the root names them)."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: dict[int, int] = {}
        self._free: list[int] = []
        self._data: npt.NDArray[np.void] = np.zeros(PAGE_ROWS, row_dtype(width))
        self._free.extend(range(PAGE_ROWS - 1, -1, -1))
        self._bind()
        #: Pages whose rows were added, removed or moved since the last checkpoint began.
        self.dirty: set[int] = set()

    def _bind(self) -> None:
        self.ids = self._data["id"]
        self.live = self._data["live"]

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, stripe: int) -> bool:
        return stripe in self.rows

    def get(self, stripe: int) -> Stripe:
        """The row of a stripe. Raises KeyError."""
        row = self._data[self.rows[stripe]]
        shape = Geometry(
            int(row["data"]), int(row["parity"]), int(row["header"]), int(row["shard"])
        )
        count = shape.shards
        places = tuple(
            zip(row["device"][:count].tolist(), row["slot"][:count].tolist(), strict=True)
        )
        return Stripe(stripe, int(row["kind"]), shape, places, int(row["placement"]))

    def add(self, stripe: Stripe, live: int) -> None:
        """Add a row with `live` live blocks (pages, for a meta stripe)."""
        assert stripe.id not in self.rows
        if not self._free:
            self._grow(
                len(self._data) + max(PAGE_ROWS, len(self._data) // PAGE_ROWS // 2 * PAGE_ROWS)
            )
        at = self._free.pop()
        self.rows[stripe.id] = at
        self._store(at, stripe, live)

    def _store(self, at: int, stripe: Stripe, live: int) -> None:
        row = self._data[at]
        row["id"], row["live"], row["placement"] = stripe.id, live, stripe.placement
        row["kind"], row["data"], row["parity"] = (
            stripe.kind,
            stripe.shape.data,
            stripe.shape.parity,
        )
        row["header"], row["shard"] = stripe.shape.header_blocks, stripe.shape.shard_blocks
        row["device"] = NOWHERE
        row["slot"] = 0
        for i, (device, slot) in enumerate(stripe.places):
            row["device"][i], row["slot"][i] = device, slot
        self.dirty.add(at // PAGE_ROWS)

    def _grow(self, rows: int) -> None:
        old = len(self._data)
        grown = np.zeros(rows, self._data.dtype)
        grown[:old] = self._data
        self._data = grown
        self._free.extend(range(rows - 1, old - 1, -1))
        self._bind()

    def remove(self, stripe: int) -> Stripe:
        """Drop a row; returns it, so that its slots can be freed once that is safe (R21)."""
        row = self.get(stripe)
        at = self.rows.pop(stripe)
        self._data[at] = np.zeros((), self._data.dtype)
        self._free.append(at)
        self.dirty.add(at // PAGE_ROWS)
        return row

    def add_live(self, stripe: int, change: int) -> None:
        """Adjust the live count of one stripe."""
        at = self.rows[stripe]
        value = int(self.live[at]) + change
        assert value >= 0, f"stripe {stripe} has fewer live blocks than none"
        self.live[at] = value

    def kill(self, stripes: Iterable[int]) -> None:
        """Take one live block from each stripe named, as often as it is named. Raises FormatError
        if there are not so many: a bug, or a table that was tampered with."""
        ids, counts = np.unique(np.fromiter(stripes, np.uint64), return_counts=True)
        rows = self.rows
        live = self.live
        for stripe, count in zip(ids.tolist(), counts.tolist(), strict=True):
            at = rows.get(stripe)
            if at is None or live[at] < count:
                raise FormatError(f"stripe {stripe} counts fewer live blocks than the map had")
            live[at] -= count

    def live_of(self, stripe: int) -> int:
        return int(self.live[self.rows[stripe]])

    def raw(self, at: int) -> np.void:
        """The row at an index of `rows`, as a table page has it."""
        row: np.void = self._data[at]
        return row

    def dead(self) -> list[int]:
        """Ids of stripes without a live block."""
        found: list[int] = self.ids[(self.ids != 0) & (self.live == 0)].tolist()
        return found

    def emptiest(self, count: int, kind: int, below: float) -> list[int]:
        """Up to `count` stripes of `kind` with the smallest live share under `below`, emptiest
        first."""
        data = self._data
        chosen = np.flatnonzero((data["id"] != 0) & (data["kind"] == kind) & (data["live"] > 0))
        if not len(chosen):
            return []
        room = data["data"][chosen].astype(np.float64) * data["shard"][chosen]
        share = data["live"][chosen] / room
        chosen, share = chosen[share < below], share[share < below]
        order = np.argsort(share, kind="stable")[:count]
        found: list[int] = data["id"][chosen[order]].tolist()
        return found

    def stripes(self) -> Iterator[Stripe]:
        """Every row, in no particular order."""
        for stripe in list(self.rows):
            yield self.get(stripe)

    def places(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
        """(device, slot) of every stored shard, flattened."""
        used = self._data[self._data["id"] != 0]
        stored = used["device"] != NOWHERE
        return used["device"][stored], used["slot"][stored]

    def on_device(self, device: int) -> int:
        """How many stripes have a shard on a device."""
        used = self._data[self._data["id"] != 0]
        return int((used["device"] == device).any(axis=1).sum()) if len(used) else 0

    def shapes(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
        """(k, devices) of every row, for counting narrow and degraded stripes."""
        used = self._data[self._data["id"] != 0]
        return used["data"], used["device"]

    def pages(self) -> int:
        return len(self._data) // PAGE_ROWS

    def snapshot(self) -> npt.NDArray[np.void]:
        """A copy of all rows, to be written by a checkpoint."""
        return self._data.copy()

    @classmethod
    def restore(cls, width: int, pages: dict[int, memoryview]) -> StripeTable:
        """The table of a checkpoint's pages, which are numbered from 0 on. What rows say is for
        `pool.rows`. Raises FormatError."""
        table = cls(width)
        dtype = row_dtype(width)
        count = max(pages, default=0) + 1
        data = np.zeros(count * PAGE_ROWS, dtype)
        for number, body in pages.items():
            if len(body) != PAGE_ROWS * dtype.itemsize:
                raise FormatError("table page has the wrong size")
            data[number * PAGE_ROWS : (number + 1) * PAGE_ROWS] = np.frombuffer(body, dtype)
        table._data = data
        table._bind()
        used = np.flatnonzero(data["id"])
        table.rows = dict(zip(data["id"][used].tolist(), used.tolist(), strict=True))
        if len(table.rows) != len(used):
            raise FormatError("a stripe has two rows in the table")
        table._free = np.flatnonzero(data["id"] == 0)[::-1].tolist()
        return table


META = stripe_format.KIND_META
DATA = stripe_format.KIND_DATA
