"""Checks the accounts: rows of the table, slots in use, pages per meta stripe, garbage on stores.

Each comparison is one step without an await. Where the engine has something in flight that neither
the table nor a root names yet, it is asked for a moment in which it has nothing
(`maintenance.at_rest`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import numpy as np

from backends.base import DeviceError
from pool.check.report import Fault, Report, Severity
from pool.engine import Engine
from pool.overdue import READ_SECONDS, answer
from pool.rows import all_rows, bad_rows, limits
from pool.slots import Slots
from pool.state import State
from pool.table import META
from pool.words import counted

#: Moments at rest that are asked for until no reader holds released slots back.
LOOKS = 20
#: How long to wait for one: a step that writes to slow devices may take long.
REST_SECONDS = 60.0


async def check_accounts(engine: Engine, report: Report) -> None:
    """All of it."""
    state = engine.state
    for stripe, text in bad_rows(all_rows(state), limits(state)):
        report.wrong("row", f"stripe {stripe} {text}", stripe=stripe)
    for fault in _pages(engine):
        report.add(fault)
    await _check_slots(engine, report)
    await _check_objects(state, report)


# -- pages in meta stripes -------------------------------------------------------------------


def pages_in_use(state: State) -> Counter[int]:
    """How many leaf and directory pages each stripe holds."""
    pages = Counter(pointer.stripe for pointer in state.directories.values())
    for layer_map in state.maps.values():
        pages.update(pointer.stripe for pointer in layer_map.pointers.values())
    return pages


def _pages(engine: Engine) -> Iterator[Fault]:
    """A meta stripe's live count is the pages that are in use of it. One that has none may be part
    of a checkpoint that is being written."""
    state = engine.state
    found, dead = pages_in_use(state), Counter(state.killed)
    for stripe, at in list(state.table.rows.items()):
        if state.table.raw(at)["kind"] != META:
            continue
        live = int(state.table.live[at]) - dead[stripe]
        if live != found[stripe] and (found[stripe] or not engine.checkpoint.running):
            yield Fault(
                "live", Severity.WRONG,
                f"stripe {stripe} counts {live} pages, {found[stripe]} are in use", stripe=stripe,
            )  # fmt: skip


# -- slots -----------------------------------------------------------------------------------


async def _check_slots(engine: Engine, report: Report) -> None:
    """Slots in use are those that stripes claim: no more, or space is lost; no less, or one is
    given out twice."""
    faults: list[Fault] = []
    for _ in range(LOOKS):
        try:
            async with asyncio.timeout(REST_SECONDS):
                faults, exact = await engine.at_rest(lambda: _compare_slots(engine.state))
        except TimeoutError:
            break
        if exact or not faults:
            for fault in faults:
                report.add(fault)
            return
        await asyncio.sleep(0.01)
    report.remark("slots in use were not compared: the pool is never at rest")


def _compare_slots(state: State) -> tuple[list[Fault], bool]:
    """The faults, and whether nothing waits to be released."""
    rows = all_rows(state)
    rows = rows[rows["id"] != 0]
    faults = []
    for index, member in state.members.items():
        claimed = np.unique(rows["slot"][rows["device"] == index])
        free, leaked = member.slots.compare(claimed)
        if len(free):
            faults.append(_slot(index, free, "claimed by a stripe and counted as free"))
        if len(leaked):
            faults.append(_slot(index, leaked, "in use, and no stripe claims it"))
    return faults, not state.gate.waiting


def _slot(index: int, slots: Slots, what: str) -> Fault:
    more = f" and {len(slots) - 1} more" if len(slots) > 1 else ""
    return Fault(
        "slot", Severity.WRONG, f"device {index}: slot {int(slots[0])}{more}: {what}", member=index
    )


# -- object stores ---------------------------------------------------------------------------


async def _check_objects(state: State, report: Report) -> None:
    """Objects that belong to no stripe are no fault: they are deleted after the next opening."""
    for member in state.active():
        if member.shards is None or not member.shards.must_delete:
            continue
        try:
            stored = await answer(member.shards.stored(), READ_SECONDS, member.url)
        except DeviceError as error:
            report.remark(f"device {member.index} ({member.url}) cannot be listed: {error}")
            continue
        garbage = sum(not _named(state, member.index, *item) for item in stored)
        if garbage:
            report.remark(
                f"device {member.index} ({member.url}): {counted(garbage, 'object')} of no stripe, "
                "garbage: deleted after the next opening for writing"
            )


def _named(state: State, member: int, stripe: int, shard: int) -> bool:
    """Whether a stripe has this shard there, or may soon have."""
    if stripe >= state.next_stripe:
        return True
    try:
        places = state.row(stripe).places
    except KeyError:
        return False
    return shard < len(places) and places[shard][0] == member
