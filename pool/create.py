"""Makes a pool, and looks at what a backend holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.base import BLOCK_SIZE, Device, ObjectStore
from pool.catalog import NAME, Catalog
from pool.errors import PoolError
from pool.format.geometry import (
    MAX_DATA,
    MAX_PARITY,
    Layout,
    default_journal_bytes,
    default_slot_bytes,
    geometry,
    layout,
)
from pool.member import ROOT_NAMES, ROOT_SIZES, Member, MemberState, read_superblocks
from pool.membership import choose_journal
from pool.mover import InlineMover
from pool.slots import FreeSlots
from pool.state import RESERVE_STRIPES, Committed, State
from pool.table import StripeTable

ZERO_CHUNK = 1 << 20
MIN_JOURNAL = 64 << 10
#: Beyond this, offsets in a stripe outgrow their fields.
MAX_SLOT = 64 << 20


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What a pool shall be. Sizes in bytes; None means by the size of the smallest device."""

    name: str
    data: int
    parity: int
    slot_size: int | None = None
    journal_size: int | None = None


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """A backend to become a member. `force` takes it even if it belongs to another pool."""

    backend: Device | ObjectStore
    journal: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the newest superblock of a backend says."""

    pool_name: str
    pool_uuid: str
    device_uuid: str
    device_index: int
    generation: int
    members: list[dict[str, Any]]


async def probe(backend: Device | ObjectStore) -> ProbeResult | None:
    """Look at a backend without changing it; None if it holds no superblock of ours.

    Raises PoolError for a damaged or newer one, DeviceError if it cannot be read."""
    found = await read_superblocks(backend)
    if not found:
        return None
    block = found[0][1]
    members = [
        {key: row[key] for key in ("uuid", "index", "url", "state")}
        for row in block.root["members"]
    ]
    return ProbeResult(
        block.root["name"], block.pool.hex(), block.device.hex(), block.index, block.generation,
        members,
    )  # fmt: skip


async def create_pool(
    spec: PoolSpec,
    members: Sequence[MemberSpec],
    *,
    rng: random.Random,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Make a pool of blank backends; returns its uuid. `progress` gets (bytes done, bytes in all).

    Raises PoolError with nothing written if the pool cannot be made, DeviceError if writing
    fails."""
    _check_spec(spec, members)
    for member in members:
        await _check_blank(member)
    smallest = min(member.backend.size for member in members)
    slot_bytes = spec.slot_size or default_slot_bytes(smallest)
    journal_bytes = spec.journal_size or default_journal_bytes(smallest)
    layouts = [_layout(spec, member, slot_bytes, journal_bytes) for member in members]
    pool = rng.randbytes(16)
    state = _blank_state(spec, pool, members, layouts, rng, journal_bytes)
    replicas = _first_replicas(state)
    if state.limit < state.shape().blocks:
        raise PoolError("the devices are too small for a pool of this shape: use larger ones")
    # Positions begin with the second lap, so that none is zero.
    start = journal_bytes // BLOCK_SIZE
    state.committed = Committed(replay=start, tail=start, durable=start)
    state.stripe_limit = 1
    state.term = 0
    root = state.root(state.committed, replicas)
    for found in state.members.values():
        found.superblock(root, pool)
    await _wipe(state, progress)
    for found in state.members.values():
        await found.write_root(root, pool)
    return pool.hex()


def _check_spec(spec: PoolSpec, members: Sequence[MemberSpec]) -> None:
    if not NAME.fullmatch(spec.name):
        raise PoolError(
            f"{spec.name!r} is no pool name: use letters, digits, '.', '_' and '-', at most 64"
        )
    if not 1 <= spec.data <= MAX_DATA:
        raise PoolError(f"--data must be between 1 and {MAX_DATA}, not {spec.data}")
    if not 1 <= spec.parity <= MAX_PARITY:
        raise PoolError(f"--parity must be between 1 and {MAX_PARITY}, not {spec.parity}")
    need = spec.data + spec.parity
    if len(members) < need:
        raise PoolError(
            f"{spec.data}+{spec.parity} needs at least {need} devices, {len(members)} were given"
        )
    if len({id(member.backend) for member in members}) < len(members):
        raise PoolError("a device was given twice")
    capable = sum(isinstance(member.backend, Device) for member in members)
    if capable < spec.parity + 1:
        raise PoolError(
            f"the journal needs {spec.parity + 1} devices that can be overwritten (disks or "
            f"files), {capable} were given"
        )
    _check_sizes(spec)


def _check_sizes(spec: PoolSpec) -> None:
    for size, what in ((spec.slot_size, "slot"), (spec.journal_size, "journal")):
        if size is not None and (size % BLOCK_SIZE or size < 4 * BLOCK_SIZE):
            raise PoolError(f"the {what} size must be a multiple of 4 KiB and at least 16 KiB")
    if spec.slot_size is not None and spec.slot_size > MAX_SLOT:
        raise PoolError(f"the slot size must be at most {MAX_SLOT >> 20} MiB")
    if spec.journal_size is not None and spec.journal_size < MIN_JOURNAL:
        raise PoolError(f"the journal size must be at least {MIN_JOURNAL >> 10} KiB")


async def _check_blank(member: MemberSpec) -> None:
    if member.force:
        return
    found = await probe(member.backend)
    if found is not None:
        raise PoolError(
            f"{member.backend.url} is part of pool {found.pool_name!r} already: use another "
            "device, or --force to destroy what it holds"
        )


def _layout(spec: PoolSpec, member: MemberSpec, slot_bytes: int, journal_bytes: int) -> Layout:
    slot_blocks = slot_bytes // BLOCK_SIZE
    try:
        geometry(spec.data, spec.parity, slot_blocks)
    except ValueError:
        raise PoolError(
            f"slots of {slot_bytes >> 10} KiB are too small for {spec.data}+{spec.parity}: use a "
            "larger --slot-size"
        ) from None
    size = member.backend.size
    if not isinstance(member.backend, Device):
        return Layout(size, ROOT_SIZES[-1], 0, 0, 0, slot_blocks, size // slot_bytes)
    try:
        return layout(size, journal_bytes, slot_blocks)
    except ValueError:
        need = 4 * ROOT_SIZES[0] + journal_bytes + 16 * slot_bytes
        raise PoolError(
            f"{member.backend.url} is too small: {size} bytes, at least {need} are needed"
        ) from None


def _blank_state(
    spec: PoolSpec,
    pool: bytes,
    specs: Sequence[MemberSpec],
    layouts: Sequence[Layout],
    rng: random.Random,
    journal_bytes: int,
) -> State:
    members = {}
    for index, (item, where) in enumerate(zip(specs, layouts, strict=True)):
        member = Member(
            index, rng.randbytes(16), item.backend.url, where, MemberState.ACTIVE,
            FreeSlots(where.slots), dict(item.labels), item.journal, committed_slot=1,
        )  # fmt: skip
        member.attach(item.backend)
        members[index] = member
    state = State(
        pool, spec.name, spec.data, spec.parity, layouts[0].slot_blocks, members,
        StripeTable(spec.data + spec.parity), InlineMover(), rng, lambda: 0.0,
        journal_blocks=journal_bytes // BLOCK_SIZE, writer=rng.randbytes(16).hex(),
        catalog=Catalog(),
    )  # fmt: skip
    state.update_limit()
    if state.total_stripes() < 4 * RESERVE_STRIPES:
        raise PoolError(
            f"the devices are too small: they hold {state.total_stripes()} stripes, "
            f"{4 * RESERVE_STRIPES} are needed; use larger devices, a smaller --journal-size or a "
            "smaller --slot-size"
        )
    return state


def _first_replicas(state: State) -> list[int]:
    replicas: list[int] = []
    for _ in range(state.parity + 1):
        found = choose_journal(list(state.members.values()), set(replicas))
        assert found is not None
        replicas.append(found.index)
    return replicas


async def _wipe(state: State, progress: Callable[[int, int], None] | None) -> None:
    """Zero journal zones (they sync faster than unwritten ones), the first slots (`pool.slots`) and
    every place a superblock may be."""
    devices = [m for m in state.members.values() if isinstance(m.backend, Device)]
    total = sum(_front(member) for member in devices)
    done = 0
    for member in state.members.values():
        backend = member.backend
        if not isinstance(backend, Device):
            assert backend is not None
            for name in ROOT_NAMES:
                await backend.delete(name)
            continue
        front = _front(member)
        for start in range(0, front, ZERO_CHUNK):
            count = min(ZERO_CHUNK, front - start)
            await backend.write(start, [bytes(count)])
            done += count
            if progress is not None:
                progress(done, total)
        end = 2 * ROOT_SIZES[-1]
        if backend.size - end > member.layout.slots_offset:
            await backend.write(backend.size - end, [bytes(end)])
        else:
            end = 2 * member.layout.root_bytes
            await backend.write(backend.size - end, [bytes(end)])
        await backend.sync()


def _front(member: Member) -> int:
    """Bytes to zero at the beginning of a device."""
    where = member.layout
    return where.slot_offset(min(member.slots.reach, where.slots))
