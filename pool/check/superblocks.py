"""Checks the superblocks of a member: four copies on a device, two objects on a store (R19).

The slot of the committed root must be whole at both ends. The other slot is rewritten by the next
root; what a crash left half written there is a remark until this life has written it itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from backends.base import Device, DeviceError, ObjectStore
from pool.check.report import Fault, Report, Severity
from pool.engine import Engine
from pool.errors import FormatError, PoolError
from pool.format import superblock
from pool.format.superblock import Superblock
from pool.member import ROOT_NAMES, Member
from pool.overdue import READ_SECONDS, answer
from pool.state import State

#: Looks at a member whose root changes under them.
LOOKS = 32
PAUSE_SECONDS = 0.05
ENDS = ("first", "last")


@dataclass(frozen=True, slots=True)
class _Copy:
    """One copy of a superblock: where it is, and what is there."""

    slot: int
    where: str
    block: Superblock | None
    #: Why there is none; empty for a place that was never written.
    why: str = ""


async def check_superblocks(engine: Engine, report: Report) -> None:
    """Look at the superblocks of every member that is present."""
    for member in list(engine.state.members.values()):
        if member.present:
            report.checked.members += 1
            for fault in await _check_member(engine, member, report):
                report.add(fault)


async def _check_member(engine: Engine, member: Member, report: Report) -> list[Fault]:
    """The faults of a member, at a moment when no root was being written."""
    state = engine.state
    for look in range(LOOKS):
        if look:
            await asyncio.sleep(PAUSE_SECONDS)
        before = (state.generation, engine.membership.committing)
        backend = member.backend
        if backend is None or not member.present:
            return []
        try:
            copies = await _copies(member, backend)
        except DeviceError as error:
            return [] if not member.present else [_fault(member, f"cannot be read: {error}")]
        if before == (state.generation, False) and not engine.membership.committing:
            report.checked.superblocks += len(copies)
            return [*_judge(state, member, copies, report)]
    report.remark(f"device {member.index}: roots changed faster than they could be looked at")
    return []


async def _copies(member: Member, backend: Device | ObjectStore) -> list[_Copy]:
    """What is in the places of superblocks. Raises DeviceError if none can be read."""
    copies: list[_Copy] = []
    failure: DeviceError | None = None
    for slot in (0, 1):
        offsets = member.layout.root_offsets(slot) if isinstance(backend, Device) else (0,)
        for end, offset in zip(ENDS, offsets, strict=False):
            where = f"the {end} copy" if isinstance(backend, Device) else "the object"
            where += f" of root slot {slot}"
            try:
                image = await answer(_read(member, backend, slot, offset), READ_SECONDS, member.url)
            except DeviceError as error:
                failure = error
                copies.append(_Copy(slot, where, None, f"cannot be read ({error})"))
                continue
            copies.append(_decode(slot, where, image))
    if failure is not None and not any(copy.block for copy in copies):
        raise failure
    return copies


async def _read(member: Member, backend: Device | ObjectStore, slot: int, offset: int) -> bytes:
    if isinstance(backend, Device):
        return await backend.read(offset, member.layout.root_bytes)
    name = ROOT_NAMES[slot]
    if name not in await backend.list("root-"):
        return b""
    head = await backend.get(name, 0, superblock.HEAD_BYTES)
    return await backend.get(name, 0, superblock.HEAD_BYTES + superblock.body_length(head))


def _decode(slot: int, where: str, image: bytes) -> _Copy:
    if not any(image[: superblock.HEAD_BYTES]):
        return _Copy(slot, where, None)
    try:
        return _Copy(slot, where, superblock.decode(image))
    except (FormatError, PoolError) as error:
        return _Copy(slot, where, None, f"is damaged ({error})")


def _judge(state: State, member: Member, copies: list[_Copy], report: Report) -> Iterator[Fault]:
    whole = [copy for copy in copies if copy.block is not None]
    newest = max((copy.block.generation for copy in whole if copy.block), default=0)
    if newest < state.generation:
        yield from _left_behind(state, member, newest, report)
        return
    rest = _rest(member, whole)
    for copy in copies:
        problem = _problem(state, member, copy)
        if not problem:
            continue
        text = f"{copy.where} {problem}"
        if copy.slot == member.committed_slot:
            yield _fault(member, f"{text}; {rest}")
        elif copy.block is None and state.counters["roots"] < 2:
            report.remark(
                f"device {member.index} ({member.url}): {text}; no root that counts is there, and "
                "the next one is written over it"
            )
        else:
            yield _fault(member, f"{text}; no root that counts is there")


def _problem(state: State, member: Member, copy: _Copy) -> str:
    """What is wrong with a copy; empty if nothing is."""
    block, committed = copy.block, copy.slot == member.committed_slot
    if block is None:
        return copy.why or ("was never written" if committed else "")
    if block.pool != state.uuid:
        return f"is of another pool ({block.pool.hex()})"
    if (block.device, block.index) != (member.uuid, member.index):
        return f"is of device {block.index} ({block.device.hex()})"
    if block.layout != member.layout:
        return "divides the device in another way than the root says"
    if committed and (block.generation, block.digest) != (state.generation, state.parent):
        return f"has root {block.generation}, not the committed one, {state.generation}"
    if not committed and block.generation >= state.generation and not state.stopped:
        return f"has root {block.generation}, which is not behind the committed one"
    return ""


def _rest(member: Member, whole: list[_Copy]) -> str:
    if any(copy.slot == member.committed_slot for copy in whole):
        return "the other copy of it is whole"
    return "the other devices have the root"


def _left_behind(state: State, member: Member, newest: int, report: Report) -> Iterator[Fault]:
    """The device does not carry the pool's root at all."""
    text = f"carries root {newest or 'none'}, the pool's is {state.generation}"
    if newest == state.generation - 1 and state.counters["roots"] == 0:
        # As a crash between two superblocks of one commit leaves it.
        report.remark(
            f"device {member.index} ({member.url}) {text}: it missed the last commit, and gets "
            "the next one"
        )
        return
    yield _fault(member, f"{text}; it is written anew when the pool is served")


def _fault(member: Member, text: str) -> Fault:
    return Fault(
        "superblock", Severity.DEGRADED, f"device {member.index} ({member.url}): {text}",
        member=member.index,
    )  # fmt: skip
