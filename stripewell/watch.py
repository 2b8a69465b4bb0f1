"""Tells the log what changes in a served pool: devices that go, come back and catch up, its state.

Two looks at the pool are compared, so that the data path knows nothing of it. Called by the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pool import Health, Pool

Log = Callable[[str], None]

#: Between two looks.
SECONDS = 1.0
#: Looking may take up to this share of the event loop's time.
SHARE = 0.01


@asynccontextmanager
async def watched(pool: Pool, log: Log) -> AsyncIterator[None]:
    """Log what is not well at the beginning, and from then on what changes."""
    watch = _Watch(pool, log)
    watch.look()
    task = asyncio.create_task(watch.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        watch.look()


class _Watch:
    def __init__(self, pool: Pool, log: Log) -> None:
        self._pool = pool
        self._log = log
        self._last = Health()

    def look(self) -> None:
        before, self._last = self._last, self._pool.health()
        for line in changes(self._pool.name, before, self._last):
            self._log(line)

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            self.look()
            await asyncio.sleep(max(SECONDS, (clock() - started) / SHARE))


def changes(name: str, before: Health, after: Health) -> list[str]:
    """Lines for what is in `after` and was not `before`: the cause first, then the effect."""
    new = after.problems.keys() - before.problems.keys()
    lines = [f"warning: {text}" for kind, text in after.problems.items() if kind in new]
    for device, whole in after.returned.items():
        if device not in before.returned:
            lines.append(f"{device} is back; what it missed is rebuilt")
        if whole and not before.returned.get(device):
            lines.append(f"{device} has everything again")
    if after.state == before.state:
        return lines
    if after.state == "healthy":
        return [*lines, f"pool {name} is healthy again (it was {before.state})"]
    return [*lines, f"warning: pool {name} is {after.state} (it was {before.state})"]
