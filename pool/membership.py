"""Commits roots and changes who is a member: the only place that does either (R19).

A root is committed when it is synced on a quorum of the members that the previous root counted. A
member that cannot take it, or that failed anything else, is expelled by a further root; a journal
replica it held is first copied to another member (R4, R5). Flushes wait for that: they are answered
by replicas of the committed root only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from backends.base import Device, DeviceError
from pool.absent import ABSENT
from pool.errors import PoolError, PoolStopped
from pool.failpoints import reached
from pool.format import superblock
from pool.journal import Replica
from pool.member import Member, MemberState
from pool.overdue import WRITE_SECONDS, answer
from pool.roots import quorum
from pool.state import STRIPE_WINDOW, Committed, State
from pool.words import counted

#: Stripe ids left at which a root reserves the next window.
STRIPE_LOW = STRIPE_WINDOW // 2


class Membership:
    """Serialises root commits and expulsions."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._failed: dict[int, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._counted = {m.index for m in state.members.values() if m.state is MemberState.ACTIVE}
        self._replicas: list[int] = []
        self._wanted: Callable[[], int] = lambda: state.parity + 1

    # -- committing --------------------------------------------------------------------------

    @property
    def committing(self) -> bool:
        """Whether a root may be being written now."""
        return self._lock.locked()

    async def commit(self, committed: Committed) -> None:
        """Commit a root with this checkpoint. Raises PoolStopped if no quorum takes it; the pool
        then takes no more writes."""
        async with self._lock:
            await self._commit(committed, self._journal_members())

    def _journal_members(self) -> list[int]:
        journal = self._state._journal
        return [r.member for r in journal.replicas] if journal else self._replicas

    async def start_term(self, replicas: list[int], returned: set[int]) -> None:
        """Open for writing: commit a new term before the first append (R1). Members that are absent
        are gone from this root on; `returned` ones count again."""
        state = self._state
        for member in state.members.values():
            if member.backend is None and member.state is MemberState.ACTIVE:
                member.state = MemberState.GONE
                member.reason = member.reason or ABSENT
            elif member.index in returned:
                member.state = MemberState.ACTIVE
                member.reason = ""
        self._replicas = replicas
        state.term += 1
        reached("term_after_count_before_root")
        async with self._lock:
            await self._commit(state.committed, replicas)

    async def name_replicas(self, replicas: list[int]) -> None:
        """Commit a root with these journal replicas, all whole, before the journal runs; nothing if
        the last one says so already. Raises PoolStopped."""
        if sorted(replicas) != sorted(self._replicas) or self._state.behind:
            async with self._lock:
                self._replicas = replicas
                self._state.behind.clear()
                await self._commit(self._state.committed, replicas)

    async def _commit(self, committed: Committed, replicas: list[int]) -> None:
        state = self._state
        if state.stopped:
            raise PoolStopped(state.stopped)
        if state.next_stripe + STRIPE_LOW >= state.stripe_limit:
            state.stripe_limit = state.next_stripe + STRIPE_WINDOW
        limit = state.stripe_limit
        root = state.root(committed, replicas)
        taken = await self._write_all(root)
        reached("root_after_members_before_commit")
        now = {m.index for m in state.members.values() if m.state is MemberState.ACTIVE}
        for group in (self._counted, now):
            if len(taken.keys() & group) < quorum(len(group), state.parity):
                # The attempt may or may not become the pool's root: nobody may build on either.
                state.generation += 1
                self._stop(
                    f"a root could be written on {counted(len(taken), 'device')} only, "
                    f"{quorum(len(group), state.parity)} are needed"
                )
        for index, slot in taken.items():
            state.members[index].committed_slot = slot
        self._counted = now
        state.generation += 1
        state.parent = superblock.digest(superblock.encode_root(root))
        state.committed = committed
        state.stripe_limit = limit
        state.counters["roots"] += 1
        state.forget_places()
        if self._failed:
            self._wake()

    async def _write_all(self, root: dict[str, object]) -> dict[int, int]:
        """Write a root to every member that works; member index → slot that took it."""
        targets = [m for m in self._state.active() if m.index not in self._failed]
        results = await asyncio.gather(
            *(self._write(member, root) for member in targets), return_exceptions=True
        )
        taken: dict[int, int] = {}
        for member, result in zip(targets, results, strict=True):
            if isinstance(result, int):
                taken[member.index] = result
            elif isinstance(result, DeviceError):
                self._failed[member.index] = str(result)
            else:
                raise result
        return taken

    async def _write(self, member: Member, root: dict[str, object]) -> int:
        write = member.write_root(root, self._state.uuid)
        slot = await answer(write, WRITE_SECONDS, member.url)
        reached("root_after_member_before_next")
        return slot

    def _stop(self, why: str) -> None:
        self._state.stop(why)
        raise PoolStopped(why)

    # -- expelling ---------------------------------------------------------------------------

    def report(self, index: int, error: DeviceError) -> None:
        """A member failed a write or sync: expel it, in the background. No await: callable
        anywhere."""
        self._failed.setdefault(index, str(error))
        self._wake()

    async def expel(self, failed: dict[int, str]) -> None:
        """Expel members and return when the root says so. Raises PoolStopped."""
        for index, why in failed.items():
            self._failed.setdefault(index, why)
        self._wake()
        while self._task is not None:
            await asyncio.shield(self._task)
        if self._state.stopped:
            raise PoolStopped(self._state.stopped)

    def _wake(self) -> None:
        if self._task is None and not self._state.stopped:
            self._task = asyncio.get_running_loop().create_task(self._expel_all())

    async def _expel_all(self) -> None:
        try:
            while self._failed and not self._state.stopped:
                async with self._lock:
                    await self._expel_some()
        except (PoolStopped, PoolError) as error:
            self._state.stop(str(error))
        finally:
            self._task = None

    async def _expel_some(self) -> None:
        state = self._state
        gone: set[int] = set()
        for index, why in list(self._failed.items()):
            member = state.members[index]
            if member.state is MemberState.ACTIVE:
                member.state = MemberState.GONE
                member.reason = why
                gone.add(index)
                state.counters["members_expelled"] += 1
        state.forget_places()
        state.update_limit()
        if not gone:
            self._failed.clear()
            return
        if len(state.active()) <= state.parity:
            self._stop(
                f"{counted(len(state.active()), 'device')} left, more than {state.parity} are "
                "needed to write: bring devices back and restart"
            )
        reached("expulsion_after_report_before_replicas")
        journal = state._journal
        come: list[Replica] = []
        if journal is not None:
            come = await self._new_replicas(gone)
            kept = [r.member for r in journal.replicas if r.member not in gone]
            replicas = kept + [r.member for r in come]
        else:
            replicas = [index for index in self._replicas if index not in gone]
        if not replicas:
            self._stop("no journal device is left: bring devices back and restart")
        reached("expulsion_after_replicas_before_root")
        await self._commit(state.committed, replicas)
        reached("expulsion_after_root_before_replace")
        self._replicas = replicas
        for index in gone:
            self._failed.pop(index, None)
        if journal is not None:
            journal.replace(gone, come)
        reached("expulsion_after_replace_before_close")
        for index in gone:
            await self._let_go(state.members[index])

    async def _new_replicas(self, gone: set[int]) -> list[Replica]:
        """Bring as many new journal replicas up to date as are missing, if there are members for
        it."""
        state = self._state
        journal = state.journal
        kept = {r.member for r in journal.replicas if r.member not in gone}
        come: list[Replica] = []
        tried = set(kept)
        while len(kept) + len(come) < state.parity + 1:
            spare = choose_journal(state.active(), tried | self._failed.keys())
            if spare is None:
                break
            tried.add(spare.index)
            assert isinstance(spare.backend, Device)
            tail = journal.tail
            replica = Replica(
                spare.index, spare.backend, spare.layout.journal_offset, tail, tail, tail
            )
            journal.add(replica)
            if await journal.joined(replica):
                come.append(replica)
                state.counters["replicas_replaced"] += 1
        return come

    async def _let_go(self, member: Member) -> None:
        backend, member.backend, member.shards = member.backend, None, None
        await self._state.mover.remove_member(member.index)
        if backend is not None:
            await backend.close()

    async def settled(self) -> None:
        """Return when no expulsion is under way."""
        while self._task is not None:
            await asyncio.shield(self._task)


def choose_journal(members: list[Member], taken: set[int]) -> Member | None:
    """The next member to hold a journal replica: named ones first, then the others in order."""
    capable = [m for m in members if m.journal_capable and m.index not in taken]
    return min(capable, key=lambda m: (not m.journal, m.index), default=None)
