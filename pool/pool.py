"""An open pool: opening, closing, volumes, status. What the daemon and the commands use."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.base import BLOCK_SIZE, Device, DeviceError, ObjectStore
from pool import recovery
from pool.absent import explain
from pool.check import Report, check_pool
from pool.engine import Engine
from pool.errors import BadSuperblock, FormatError, PoolError, PoolStopped
from pool.failpoints import reached
from pool.format.page import Pointer
from pool.format.record import FLAG_TERM_START, TERM_SHIFT, Record
from pool.format.superblock import Superblock
from pool.journal import Journal, Replica
from pool.loader import Loader
from pool.member import Member, MemberState, read_superblocks
from pool.membership import Membership, choose_journal
from pool.mover import Mover
from pool.overdue import READ_SECONDS
from pool.placement import NoSpace
from pool.reader import Reader
from pool.recovery import Chain, Source
from pool.replicas import Copy, forgetful, mapped
from pool.roots import Found, active, check_enough, choose_root
from pool.scrub import Scrubbed, scrub
from pool.state import LEAF_BUDGET, Committed, State
from pool.status import Health, describe, health
from pool.table import NOWHERE, Stripe, StripeTable
from pool.volume import Volume
from pool.words import line

Progress = Callable[[int, int], None]
READ_ONLY = "the pool is open for reading only"


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume as lists show it; sizes in bytes, `created` in seconds since the epoch."""

    name: str
    size: int
    used_bytes: int
    created: float
    state: str


class Pool:
    """See the module. Open it with `Pool.open`."""

    def __init__(self, engine: Engine, *, read_only: bool) -> None:
        self.engine = engine
        self._state = engine.state
        self._read_only = engine.read_only = read_only
        self._volumes: dict[str, Volume] = {}
        self._closed = False
        #: One new volume at a time: each takes its ids before it waits for the journal.
        self._changing = asyncio.Lock()
        for name, entry in self._state.catalog.volumes.items():
            self._volumes[name] = Volume(engine, entry)

    # -- opening and closing -----------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        backends: Sequence[Device | ObjectStore],
        *,
        mover: Mover,
        rng: random.Random,
        read_only: bool = False,
        expect_pool: str | None = None,
        absent: Mapping[str, str] | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] | None = None,
        leaf_budget: int = LEAF_BUDGET,
    ) -> Pool:
        """Open the pool that these backends belong to, and recover it. Raises PoolError (too few,
        of several pools, newer revision, damaged), DataLost, DeviceError.

        `absent` says why there is no backend for a URL, for people who look for a member there."""
        root, found, useless = await _find(backends, expect_pool)
        state = _state(root, mover, rng, now)
        present, returned, unfit = _attach(state, backends, found, root)
        remarks = [*useless.values(), *unfit]
        check_enough(root.root, present, writable=not read_only, remarks=remarks)
        explain(state.members.values(), {**(absent or {}), **useless})
        reader = Reader(state, repair=not read_only)
        loader = Loader(state, reader, leaf_budget)
        for member in state.members.values():
            if member.present and not read_only:
                assert member.backend is not None
                await mover.add_member(member.index, member.backend, member.layout)
        membership = Membership(state)
        engine = Engine(state, reader, loader, membership, clock or asyncio.get_running_loop().time)
        reached("opening_after_root_before_checkpoint")
        await recovery.load_checkpoint(state, reader, root.root)
        reached("opening_after_checkpoint_before_journal")
        _occupy(state)
        await _recover(engine, root.root, returned, read_only=read_only)
        return cls(engine, read_only=read_only)

    async def close(self) -> None:
        """Write a checkpoint if the pool still takes writes, then release everything.
        Idempotent."""
        if self._closed:
            return
        self._closed = True
        engine, state = self.engine, self._state
        for volume in self._volumes.values():
            volume.closed = True
        if engine.maintenance is not None:
            await engine.maintenance.stop()
            await engine.membership.settled()
            if not state.stopped:
                try:
                    await engine.checkpoint.write()
                except (OSError, PoolError, NoSpace) as error:
                    # The journal has everything; the next open replays it.
                    state.problems["close"] = str(error)
            await engine.membership.settled()
        reached("close_after_checkpoint_before_unlock")
        await engine.journal.close()
        await state.mover.close()
        for member in state.members.values():
            if member.backend is not None:
                await member.backend.close()

    # -- volumes -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._state.name

    @property
    def uuid(self) -> str:
        return self._state.uuid.hex()

    def volume(self, name: str) -> Volume:
        """The volume of that name. Raises KeyError."""
        return self._volumes[name]

    def volumes(self) -> list[VolumeInfo]:
        """All volumes, by name."""
        infos = []
        for name, volume in sorted(self._volumes.items()):
            entry = self._state.catalog.volumes[name]
            layer_map = self._state.maps[entry.layer]
            blocks = sum(leaf.count for leaf in layer_map.leaves.values())
            paged = [p for n, p in layer_map.pointers.items() if n not in layer_map.leaves]
            # A paged-out leaf is counted by the size of its page.
            blocks += sum(min(512, max(0, p.length - 40) // 12) for p in paged)
            infos.append(
                VolumeInfo(name, volume.size, blocks * BLOCK_SIZE, entry.created, "online")
            )
        return infos

    async def create_volume(self, name: str, size: int) -> None:
        """Create a thin volume. Raises PoolError, PoolStopped."""
        async with self._changing:
            await self._create_volume(name, size)

    async def _create_volume(self, name: str, size: int) -> None:
        self._writable()
        catalog = self._state.catalog
        catalog.check_new(name, size)
        self._state.check_new_volume()
        change = {
            "do": "create",
            "name": name,
            "size": size,
            "volume": catalog.next_volume,
            "layer": catalog.next_layer,
            "created": self._state.now(),
        }
        await self.engine.change_catalog(change)
        self._volumes[name] = Volume(self.engine, catalog.volumes[name])
        self._state.update_limit()

    async def delete_volume(self, name: str) -> None:
        """Delete a volume: durable first, then its exports end, then its space is freed (R23)."""
        self._writable()
        volume = self._volumes.get(name)
        if volume is None:
            raise PoolError(f"there is no volume {name!r} in pool {self.name!r}")
        # No new client finds it; connected ones go on until the change cannot be lost any more.
        del self._volumes[name]
        layer = self._state.catalog.volumes[name].layer
        self._state.leaving.add(layer)
        reached("delete_after_hiding_before_journal")
        try:
            # It takes no ids, and must not wait behind changes that wait for room (P5).
            await self.engine.change_catalog({"do": "delete", "name": name})
        finally:
            if name in self._state.catalog.volumes:
                # Refused before it was journaled: nothing has happened.
                self._volumes[name] = volume
                self._state.leaving.discard(layer)
        reached("delete_after_flush_before_closing")
        volume.closed = True
        self._state.leaving.discard(layer)
        reached("delete_after_closing_before_space")
        self.engine.kick()

    def _writable(self) -> None:
        if self._read_only:
            raise PoolError(READ_ONLY)
        if self._state.stopped:
            raise PoolError(f"the pool takes no writes: {self._state.stopped}")

    # -- looking -----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `pool status --json` prints."""
        return describe(self._state, volumes=len(self._volumes), stopped=self._stopped)

    def health(self) -> Health:
        """The state and the problems alone; cheap enough to be asked for all the time."""
        return health(self._state, stopped=self._stopped)

    @property
    def _stopped(self) -> str | None:
        """Why writes are refused, if they should not be."""
        return None if self._read_only else self._state.stopped

    async def check(self, progress: Progress | None = None) -> list[str]:
        """Verify everything against everything; returns one line per fault."""
        return (await self.check_report(progress)).lines()

    async def check_report(self, progress: Progress | None = None) -> Report:
        """As `check`, with all that is known of each fault, remarks, and what was looked at."""
        return await check_pool(self.engine, progress or (lambda done, total: None))

    async def scrub(self, progress: Progress | None = None) -> Scrubbed:
        """Verify every shard and rebuild those that are wrong. Raises PoolStopped."""
        self._writable()
        state, reader = self._state, self.engine.reader
        return await scrub(state, reader, progress or (lambda done, total: None))

    async def checkpoint(self) -> None:
        """Write a checkpoint now. Raises PoolStopped."""
        self._writable()
        assert self.engine.maintenance is not None
        await self.engine.maintenance.request_checkpoint()


# -- parts of opening ------------------------------------------------------------------------


async def _find(
    backends: Sequence[Device | ObjectStore], expect_pool: str | None
) -> tuple[Superblock, list[Found], dict[str, str]]:
    """Read all superblocks and choose the root. Also returns, by URL, why backends are of no
    use."""
    results = await asyncio.gather(
        *(_superblocks(backend) for backend in backends), return_exceptions=True
    )
    found: list[Found] = []
    refused: list[BadSuperblock] = []
    useless: dict[str, str] = {}
    for number, result in enumerate(results):
        if isinstance(result, BadSuperblock):
            refused.append(result)
        if isinstance(result, BaseException):
            useless[backends[number].url] = _useless(backends[number].url, result)
        elif result:
            slot, block = result[0]
            found.append(Found(number, slot, block))
        else:
            url = backends[number].url
            useless[url] = f"{url} holds nothing of a pool: put the right device there"
    _refuse_several(backends, found)
    root = _choose(found, refused)
    if expect_pool is not None and root.root["name"] != expect_pool:
        raise PoolError(f"the devices belong to pool {root.root['name']!r}, not to {expect_pool!r}")
    devices = [item.block.device for item in found]
    if len(set(devices)) < len(devices):
        raise PoolError("a device was given twice, or a copy of one: name each device once")
    return root, found, useless


def _useless(url: str, error: BaseException) -> str:
    """Why a backend whose superblocks could not be read is as good as absent. Raises what is
    neither damage nor a failure of the device."""
    if isinstance(error, TimeoutError):
        return f"{url} does not answer: check it and its cables"
    if not isinstance(error, DeviceError | BadSuperblock):
        raise error
    return line(str(error))


def _refuse_several(backends: Sequence[Device | ObjectStore], found: Sequence[Found]) -> None:
    """Raise PoolError, naming the devices, if they are of several pools."""
    pools: dict[bytes, list[Found]] = {}
    for item in found:
        pools.setdefault(item.block.pool, []).append(item)
    if len(pools) > 1:
        each = "; ".join(
            f"{items[0].block.root['name']} on {', '.join(backends[i.backend].url for i in items)}"
            for items in pools.values()
        )
        raise PoolError(f"the devices belong to different pools ({line(each)}): name one's")


def _choose(found: list[Found], refused: list[BadSuperblock]) -> Superblock:
    """The root to open. A device without a superblock that can be believed is as good as absent,
    unless its root may have been newer than all others."""
    if refused and not found:
        raise refused[0]
    root = choose_root(found)
    for error in refused:
        if error.generation > root.generation:
            raise error
    return root


async def _superblocks(backend: Device | ObjectStore) -> list[tuple[int, Superblock]]:
    """A backend that does not answer is as good as absent: it must not hold up the others."""
    async with asyncio.timeout(READ_SECONDS):
        return await read_superblocks(backend)


def _state(root: Superblock, mover: Mover, rng: random.Random, now: Callable[[], float]) -> State:
    """The state that a root describes, before its checkpoint is loaded."""
    body = root.root
    try:
        stream = body["streams"][0]
        checkpoint = body["checkpoint"]
        anchors = [Stripe.from_json(row) for row in checkpoint["anchors"]]
        committed = Committed(
            {stripe.id: stripe for stripe in anchors},
            tuple(Pointer(*pointer) for pointer in checkpoint["top"]),
            stream["replay"], stream["version"], stream["previous"], stream["tail"],
            stream["durable"],
        )  # fmt: skip
        code = body["code"]
        return State(
            root.pool, body["name"], code["data"], code["parity"], code["slot_blocks"],
            {row["index"]: Member.from_json(row) for row in body["members"]},
            StripeTable(checkpoint["width"]), mover, rng, now,
            journal_blocks=stream["blocks"], generation=body["generation"], parent=root.digest,
            writer=rng.randbytes(16).hex(), term=body["term"],
            next_stripe=body["next"]["stripe"], stripe_limit=body["next"]["stripe"],
            committed=committed,
            behind={row["member"] for row in stream["replicas"] if row.get("behind")},
        )  # fmt: skip
    except (KeyError, IndexError, TypeError, ValueError, FormatError) as error:
        raise PoolError(f"the pool's root is damaged: {error!r}") from None


def _attach(
    state: State,
    backends: Sequence[Device | ObjectStore],
    found: Sequence[Found],
    root: Superblock,
) -> tuple[set[int], set[int], list[str]]:
    """Give members their backends; returns (present active ones, ones that returned, why others
    cannot be used)."""
    by_uuid = {member.uuid: member for member in state.members.values()}
    present: set[int] = set()
    returned: set[int] = set()
    unfit: list[str] = []
    for item in found:
        member = by_uuid.get(item.block.device)
        backend = backends[item.backend]
        if member is None:
            raise PoolError(f"{backend.url} was removed from pool {state.name!r}: leave it out")
        if isinstance(backend, Device) != member.layout.addressable:
            raise PoolError(f"{backend.url} is of another kind than the pool's root says")
        if backend.size < member.layout.size:
            # As good as absent: the pool does not wait for it, nor write to it.
            member.finding = (
                f"{backend.url} has shrunk from {member.layout.size} to {backend.size} bytes, "
                "restore its size"
            )
            unfit.append(member.finding)
            continue
        member.attach(backend)
        member.committed_slot = item.slot
        if member.state is MemberState.ACTIVE:
            present.add(member.index)
            if item.block.digest != root.digest:
                # It missed a commit at least; it may be an old copy of the device (R24).
                state.behind.add(member.index)
        else:
            # Shards never change once written, so whatever the table still names on it is good, and
            # is verified as it is read; what it missed was never placed on it (R24).
            returned.add(member.index)
            member.state = MemberState.ACTIVE
            member.reason = ""
    assert present <= active(root.root)
    return present, returned, unfit


def _occupy(state: State) -> None:
    """Mark the slots of all stripes as used."""
    taken: dict[int, set[int]] = {index: set() for index in state.members}
    devices, slots = state.table.places()
    for device, slot in zip(devices.tolist(), slots.tolist(), strict=True):
        if device in taken:
            taken[device].add(slot)
    for anchor in state.committed.anchors.values():
        for device, slot in anchor.places:
            if device != NOWHERE and device in taken:
                taken[device].add(slot)
    for index, used in taken.items():
        state.members[index].slots.occupy(used)


async def _recover(
    engine: Engine, root: dict[str, Any], returned: set[int], *, read_only: bool
) -> None:
    """Replay the journal; if writable, start a term and make the journal whole on its replicas
    first."""
    state = engine.state
    listed = [row["member"] for row in root["streams"][0]["replicas"]]
    sources = _sources(state, listed, returned)
    # One that may be an old copy is asked last, for what the others don't have (R24).
    sources.sort(key=lambda source: source.member in state.behind)
    committed = state.committed
    backlog = await recovery.backlog(sources, committed.tail, committed.replay)
    chain = await recovery.follow(sources, committed, state.term)
    records = [*backlog, *chain.records]
    lost: set[int] = set()
    missed: set[int] = set()
    recovery.refill(state, backlog)
    # Before anything is written: what cannot be replayed is refused.
    await recovery.preload(state, engine.loader, chain)
    await recovery.replay(state, engine.loader, chain)
    if state.stopped and not read_only:
        raise PoolError(state.stopped)
    if read_only:
        # What was never packed is read from the replicas as they are.
        state.stopped = READ_ONLY
        durable = min(chain.durable, chain.end)
        replicas = [
            Replica(s.member, s.device, s.offset, committed.tail, chain.end, durable)
            for s in sources
        ]
    else:
        replicas, lost, missed = await _take_over(engine, sources, chain, backlog, returned)
        records = [header for header in records if header.position < chain.end]
        reached("recovery_after_naming_before_serving")
    unreadable = await mapped(state, engine.loader, records, lost)
    if unreadable:
        state.problems["journal"] = (
            f"{unreadable} blocks of the journal cannot be read from any device that is present: "
            "reading them gives errors until they are overwritten"
        )
    state.update_limit()
    journal = Journal(
        stream=1,
        size=state.journal_blocks,
        replicas=replicas,
        head=chain.end,
        tail=committed.tail,
        version=chain.version if read_only else state.term << TERM_SHIFT,
        previous=chain.previous,
        on_failure=engine.member_failed,
    )
    journal.starts.extend(header.position for header in records)
    state._journal = journal
    if read_only:
        return
    reached("recovery_after_replay_before_mark")
    engine.start(catch_up=missed)
    journal.stage_mark()
    journal.commit(flags=FLAG_TERM_START)
    reached("recovery_after_mark_before_flush")
    await journal.flush()
    reached("recovery_after_flush_before_serving")


async def _take_over(
    engine: Engine,
    sources: list[Source],
    chain: Chain,
    backlog: list[Record],
    returned: set[int],
) -> tuple[list[Replica], set[int], set[int]]:
    """Start a term and make the journal whole on its replicas. Returns them, the positions that no
    source had right, and the members that may have missed something."""
    state = engine.state
    committed, records = state.committed, [*backlog, *chain.records]
    state.behind |= await forgetful(sources, records, chain.durable)
    sources.sort(key=lambda source: source.member in state.behind)
    missed = returned | state.behind | {m.index for m in state.active() if m.missed}
    for index in missed:
        # Every root says so until it has caught up: a crash must not make it look whole.
        state.members[index].missed = True
    state.returned = set(returned)
    mark = recovery.ending_mark(backlog, chain)
    state.committed = recovery.at_term(committed, chain, mark)
    copy = Copy(sources, chain, records, committed.tail)
    replicas = await _start_term(engine, copy, returned)
    if mark is not None:
        # Every replica has it now: what an old copy had there instead cannot come back.
        chain.end, chain.previous = mark.position, mark.previous
        for replica in replicas:
            replica.written = replica.synced = mark.position
    return replicas, copy.lost, missed


def _sources(state: State, listed: list[int], returned: set[int]) -> list[Source]:
    """The journal replicas that may be read. Raises PoolError if there are none."""
    sources = [
        Source(index, member.backend, member.layout.journal_offset, state.journal_blocks)
        for index in listed
        if (member := state.members[index]).backend is not None
        and index not in returned
        and isinstance(member.backend, Device)
    ]
    if not sources:
        missing = line(", ".join(state.members[index].url for index in listed))
        raise PoolError(f"no journal replica is present; missing: {missing}")
    return sources


async def _start_term(engine: Engine, copy: Copy, returned: set[int]) -> list[Replica]:
    """Commit the new term, then write the recovered journal to every replica of it (R1, R6)."""
    state, membership = engine.state, engine.membership
    old = copy.members
    # The root names a new replica only when it holds the journal: a crash may come before.
    reached("recovery_after_chain_before_term")
    await membership.start_term(sorted(old), returned)
    reached("term_after_root_before_copy")
    whole: list[Member] = []
    while True:
        await membership.settled()
        if state.stopped:
            raise PoolStopped(state.stopped)
        whole = [member for member in whole if member.present]
        target = _next_replica(state, old, whole)
        if target is None and not whole:
            raise PoolStopped("no journal device takes writes: bring devices back and restart")
        if target is None:
            reached("recovery_after_copies_before_naming")
            await membership.name_replicas([member.index for member in whole])
            await membership.settled()
            if all(member.present for member in whole):
                break
            continue
        try:
            assert isinstance(target.backend, Device)
            offset = target.layout.journal_offset
            await copy.to(
                Source(target.index, target.backend, offset, state.journal_blocks),
                whole=target.index in old - state.behind,
            )
            whole.append(target)
            reached("recovery_after_copy_before_next")
        except DeviceError as error:
            engine.member_failed(target.index, error)
    return [_replica(member, state.committed.tail, copy.end) for member in whole]


def _next_replica(state: State, old: set[int], whole: list[Member]) -> Member | None:
    """The member that the recovered journal is to be written to next: those that the root names
    come first, then others until there are enough (R5)."""
    done = {member.index for member in whole}
    for index in sorted(old - done):
        if state.members[index].present:
            return state.members[index]
    if len(whole) > state.parity:
        return None
    return choose_journal(state.active(), done)


def _replica(member: Member, tail: int, end: int) -> Replica:
    assert isinstance(member.backend, Device)
    return Replica(member.index, member.backend, member.layout.journal_offset, tail, end, end)
