"""Scrub: read every shard of every stripe, and rebuild in its slot each that is not right (P4).

A shard is right when its header is that of its stripe and every block has the checksum that the
header names, parity included. What is rebuilt comes from `k` other shards. It runs beside guests:
a stripe is pinned while it is looked at, so that its slots cannot be given to another (R14).

Called by `Pool.scrub`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.base import DeviceError
from pool.checksum import verify
from pool.errors import DataLost, FormatError
from pool.format import stripe as stripe_format
from pool.member import Member
from pool.overdue import READ_SECONDS, WRITE_SECONDS, answer
from pool.reader import Reader
from pool.state import State
from pool.table import NOWHERE, Stripe


@dataclass(slots=True)
class Scrubbed:
    """What a scrub found. `wrong` counts shards by member; `unrepaired` has one line per shard that
    could not be made right."""

    shards: int = 0
    wrong: Counter[int] = field(default_factory=Counter)
    unrepaired: list[str] = field(default_factory=list)


async def scrub(state: State, reader: Reader, progress: Callable[[int, int], None]) -> Scrubbed:
    """Look at all stripes that exist now; `progress` gets stripes done and in all."""
    found = Scrubbed()
    stripes = [*sorted(state.table.rows), *state.committed.anchors]
    for done, stripe in enumerate(stripes):
        progress(done, len(stripes))
        with state.gate.inside():
            try:
                row = state.row(stripe)
            except KeyError:
                continue  # it was emptied meanwhile
            for shard in range(row.shape.shards):
                await _scrub_shard(state, reader, row, shard, found)
    for index in found.wrong:
        await _sync(state.members[index], found)
    progress(len(stripes), len(stripes))
    return found


async def _scrub_shard(
    state: State, reader: Reader, row: Stripe, shard: int, found: Scrubbed
) -> None:
    device, slot = row.places[shard]
    member = state.members.get(device) if device != NOWHERE else None
    if member is None or not member.present or member.shards is None:
        return
    found.shards += 1
    if await _is_right(state, member, row, shard):
        return
    found.wrong[device] += 1
    state.counters["scrubbed_shards"] += 1
    try:
        header, data = await reader.shard(row, shard)
    except DataLost as error:
        found.unrepaired.append(f"stripe {row.id}, shard {shard} on device {device}: {error}")
        return
    if member.shards is None:
        return  # it was expelled meanwhile
    write = member.shards.write(row.id, shard, slot, [header, data])
    if not await reader.put_right(member, write):
        found.unrepaired.append(f"stripe {row.id}, shard {shard}: device {device} did not take it")


async def _is_right(state: State, member: Member, row: Stripe, shard: int) -> bool:
    assert member.shards is not None
    slot, shape = row.places[shard][1], row.shape
    size = shape.header_bytes + shape.shard_bytes
    try:
        read = member.shards.read(row.id, shard, slot, 0, size)
        data = await answer(read, READ_SECONDS, member.url)
        header = stripe_format.decode(data)
    except (DeviceError, FormatError):
        return False
    if not header.belongs(state.uuid, row.id, shard, shape):
        return False
    first = shard * shape.shard_blocks
    crcs = header.contents.crcs[first : first + shape.shard_blocks].tolist()
    return verify(memoryview(data)[shape.header_bytes :], crcs) == -1


async def _sync(member: Member, found: Scrubbed) -> None:
    if member.shards is not None:
        try:
            await answer(member.shards.sync(), WRITE_SECONDS, member.url)
        except DeviceError as error:
            found.unrepaired.append(f"device {member.index}: {error}")
