"""Time limits for devices: a call that hangs in the kernel must not hang the pool (R4).

A blocking call cannot be cancelled, only left behind: whoever waits goes on with a `DeviceError`,
and the call ends when it ends, on a device that is no member any more by then.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any, TypeVar

from backends.base import DeviceError

T = TypeVar("T")

#: A write or sync that takes longer counts as failed.
WRITE_SECONDS = 30.0
#: A read that takes longer is given up, and another copy is asked.
READ_SECONDS = 10.0


async def answer(call: Coroutine[Any, Any, T], seconds: float, where: str) -> T:
    """The result of a device call. Raises DeviceError if it takes longer than `seconds`."""
    task = asyncio.ensure_future(call)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.add_done_callback(_forget)
        raise DeviceError(
            errno.ETIMEDOUT, f"{where}: no answer for {seconds:.0f} s: check its cables"
        )
    return task.result()


def _forget(task: asyncio.Task[Any]) -> None:
    """Nobody waits any more; its error, if it ends with one, is known already."""
    if not task.cancelled():
        task.exception()
