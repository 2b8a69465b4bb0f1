"""`pool check`: everything on the devices against everything that is known of it. Never writes.

It runs beside guests. What it compares is either true for ever once seen (what a location holds,
what a header says), or compared in one step without an await, or looked at again before it counts.

* `superblocks`: all copies on each member
* `pages`: top, table, directories, leaves, read from the devices
* `maps`, `claims`: each map entry; one owner per block; live counts
* `log`: the journal on each replica, and what the map finds in it
* `stripes`, `suspects`: headers, blocks, parity; and that header and map say the same
* `accounts`: rows, slots, pages per stripe, garbage on object stores

Memory: a bit per block of the pool, a few bytes per stripe and per journal block, one strip of a
stripe. Called by `pool.pool`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pool.check.accounts import check_accounts, pages_in_use
from pool.check.log import LogCheck
from pool.check.maps import SLICE, MapCheck
from pool.check.pages import Pages
from pool.check.report import Checked, Fault, Report, Severity
from pool.check.stripes import StripeCheck
from pool.check.superblocks import check_superblocks
from pool.check.suspects import Suspects
from pool.engine import Engine
from pool.reader import Reader
from pool.state import State
from pool.table import META

__all__ = ["Checked", "Fault", "Report", "Severity", "check_pool"]


async def check_pool(engine: Engine, progress: Callable[[int, int], None]) -> Report:
    """Look at all of the pool; `progress` gets (leaves and stripes done, in all)."""
    clock = asyncio.get_running_loop().time
    began = clock()
    state, report = engine.state, Report()
    reader = Reader(state, repair=False)
    pages = Pages(state, reader, report)
    await check_superblocks(engine, report)
    await pages.check_top()
    await pages.check_table()
    for layer, chunk in list(state.directories):
        await pages.check_directory(layer, chunk)
    maps = MapCheck(state, pages, report)
    leaves = maps.leaves()
    steps = _Steps(progress, sum(len(numbers) for _, numbers in leaves) + len(state.table))
    for layer, numbers in leaves:
        for number in numbers:
            await maps.check_leaf(layer, number)
            await steps.take()
    maps.check_live()
    await maps.check_used()
    await maps.check_shared()
    await LogCheck(state, maps.journal, report).run()
    stripes = StripeCheck(state, maps.stripes, report)
    for stripe in _stripes(engine):
        if not report.full:
            await stripes.check(stripe)
        await steps.take()
    if stripes.suspects:
        await Suspects(state, reader, pages, report).check(maps, stripes.suspects)
    await check_accounts(engine, report)
    for fault in stripes.missing():
        report.add(fault)
    report.finish(clock() - began)
    return report


def _stripes(engine: Engine) -> list[int]:
    """Stripes to look at: not those that a checkpoint is writing just now."""
    state = engine.state
    known = sorted(state.table.rows)
    if engine.checkpoint.running:
        used = pages_in_use(state)
        known = [stripe for stripe in known if not _is_meta(state, stripe) or used[stripe]]
    return [*known, *state.committed.anchors]


def _is_meta(state: State, stripe: int) -> bool:
    return bool(state.table.raw(state.table.rows[stripe])["kind"] == META)


class _Steps:
    """Counts steps for the progress, and lets others run between them."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    async def take(self) -> None:
        self._done += 1
        if self._done % SLICE == 0:
            self._progress(min(self._done, self._total), self._total)
            await asyncio.sleep(0)
