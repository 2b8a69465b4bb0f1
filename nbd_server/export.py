"""What the NBD server asks of a thing it serves. A pool's volume satisfies it by shape.

The fast path is synchronous and never waits: a session parses every request that has arrived, calls
`try_read` and `try_write` for each, then `commit` once, and answers the whole batch. What would
have to wait says so with False, and the session runs the awaitable method of the same name instead.

Every method may raise `OSError`; its `errno` becomes the NBD error of the reply, and an attribute
`offset`, if a failed read has one, says where. Offsets and lengths are in bytes, inside the export
(the session has checked them) and may be unaligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nbd_server.constants import BASE_ALLOCATION

#: (first byte, bytes) of pieces of a range, in order.
Holes = Sequence[tuple[int, int]]

#: Flags of an extent, as in NBD's `base:allocation`.
EXTENT_HOLE = 1
EXTENT_ZERO = 2


class Export(Protocol):
    """One named block device."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes. May grow while clients are connected; a session reports the size at its
        handshake."""

    @property
    def read_only(self) -> bool: ...

    @property
    def contexts(self) -> Sequence[str]:
        """Metadata contexts that it knows besides `base:allocation`, as NAMESPACE:NAME."""

    @property
    def closed(self) -> bool:
        """True once the volume was deleted: sessions answer ESHUTDOWN and end."""

    def try_read(self, offset: int, into: memoryview) -> bool:
        """Fill `into` without waiting, or return False and leave its content undefined."""

    def try_read_sparse(self, offset: int, into: memoryview) -> bool | Holes:
        """As `try_read`, but what reads as zeros need not be filled: then the answer says where in
        `into` that is, in at least one piece."""

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Stage a write; it takes effect with `commit`. `data` may be reused on return.

        False if it would have to wait; nothing is staged then."""

    def commit(self) -> None:
        """Make everything staged durable against a crash of this process. If it raises, none of the
        staged writes took effect. Called before the session returns to the event loop."""

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Stage and commit. Cancelling it before it has committed leaves no trace (R8)."""

    async def trim(self, offset: int, length: int) -> None:
        """Forget the whole blocks inside the range. They read as zeros afterwards."""

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool, fast: bool = False
    ) -> None:
        """Make the range read as zeros; with `no_hole` keep space for it, so that overwriting it
        cannot fail for want of space. With `fast`, raise ENOTSUP and change nothing if that would
        not be faster than writing zeros."""

    async def cache(self, offset: int, length: int) -> None:
        """Get ready to read the range soon. Costs no more than reading it would."""

    async def flush(self) -> None:
        """Return when every write committed before the call is durable on all journal replicas."""

    async def extents(
        self, offset: int, length: int, limit: int, context: str = BASE_ALLOCATION
    ) -> list[tuple[int, int]]:
        """What a metadata context says: at least one and at most `limit` pairs (length, flags), in
        order from `offset`; adjacent pairs differ in flags. They may stop short of `length` but not
        pass it."""
