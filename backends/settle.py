"""Waits for work that must not be abandoned half-way, also when the waiter is cancelled.

A thread that copies out of a caller's buffer cannot be stopped. The contract says that no buffer
is referenced after the call, so a cancelled write ends only when its thread has let go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def to_the_end(work: Awaitable[T]) -> T:
    """Return the result of `work`; when cancelled, let it finish before raising."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation is what the caller hears of
        raise
