"""How a command reaches a pool: through the daemon that serves it, or by opening it itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from stripewell.control import Caller, ControlClient
from stripewell.state import PoolRecord, State


@asynccontextmanager
async def reach(
    state: State, record: PoolRecord, *, read_only: bool, warn: Callable[[str], None]
) -> AsyncIterator[Caller]:
    """Something to call operations on; `warn` is told which devices could not be opened.

    Raises `UserError`.
    """
    client = await ControlClient.connect(state.control_socket(record.name))
    if client:
        try:
            yield client
        finally:
            await client.close()
        return
    # Only here, since it loads the engine, which a command of a served pool needs not.
    from stripewell.controller import Controller
    from stripewell.opening import open_pool

    async with open_pool(record, read_only=read_only) as opened:
        for problem in opened.problems:
            warn(problem)
        yield Controller(opened.pool, elsewhere=opened.elsewhere)


async def served(state: State, name: str) -> bool:
    """True if a daemon of this state directory serves the pool now."""
    client = await ControlClient.connect(state.control_socket(name))
    if client is None:
        return False
    await client.close()
    return True
