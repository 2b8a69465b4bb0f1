"""Pins: what must wait until every read and repair that may still use old space is over (R14,
R21)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Readers enter; a deferred action runs when all who were inside when it was deferred have
    left.

    Synchronous and loop-bound: no locks."""

    def __init__(self) -> None:
        self._next = 0
        self._inside: dict[int, None] = {}
        self._deferred: deque[tuple[int, Callable[[], None]]] = deque()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Pin everything that is readable now."""
        token = self._next
        self._next += 1
        self._inside[token] = None
        try:
            yield
        finally:
            del self._inside[token]
            self._run()

    def defer(self, action: Callable[[], None]) -> None:
        """Run `action` once nobody who is inside now is left; at once if nobody is."""
        self._deferred.append((self._next, action))
        self._run()

    def _run(self) -> None:
        # Tokens only grow, so the first one inside is the oldest.
        oldest = next(iter(self._inside), self._next)
        while self._deferred and self._deferred[0][0] <= oldest:
            self._deferred.popleft()[1]()

    @property
    def waiting(self) -> int:
        """Actions that wait."""
        return len(self._deferred)
