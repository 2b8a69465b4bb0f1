"""The journal: a circular, replicated log that every change goes through first.

Way of a write: `stage` copies it into the ring (memory), `commit` puts headers in front and appends
everything staged to the primary replica in one call; that is when a write may be answered (P1). One
task per replica carries the ring on to its device and syncs it, in bulk and continuously (R7);
`flush` waits until every replica of the committed root is synced (P2, R5).

Invariants:
* `tail` ≤ `durable` ≤ `head` ≤ `_staged`, all in blocks, never reused (offset = position modulo
  size).
* The primary has everything up to `head` in its page cache (R3). What a following replica does not
  have yet is in the ring (R4); `room` keeps writers from overrunning it.
* A replica that failed counts as not synced until `replace` takes it out, which the engine does
  only after a root without it has been committed.

Called by the engine, in the event loop. `stage`, `commit` and `room` contain no await: atomic.
"""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from crc32c import crc32c

from backends.base import BLOCK_SIZE, Buffer, Device, DeviceError
from pool.errors import PoolStopped
from pool.failpoints import reached
from pool.format import record
from pool.format.record import EXTENT, KIND_CATALOG, KIND_DATA, ROOM
from pool.overdue import READ_SECONDS, WRITE_SECONDS, answer

#: The ring's size at most; unreplicated bytes never exceed it.
RING_BYTES = 32 << 20
#: A replica is sent off as soon as it is this far behind, and otherwise after `IDLE_SECONDS`.
LAG_BLOCKS = 256
IDLE_SECONDS = 0.05
#: Unsynced bytes after which a replica syncs by itself (R7).
UNSYNCED_BLOCKS = 2048
#: How long `close` waits for calls in flight.
CLOSE_SECONDS = 5.0
#: The most one write to a replica carries.
CHUNK_BLOCKS = 1024


@dataclass(slots=True)
class Replica:
    """One copy of the journal: `blocks` blocks at `offset` of a device."""

    member: int
    device: Device
    offset: int
    valid_from: int
    written: int
    synced: int
    failed: bool = False
    #: Whether what it lacks is in the ring; a replica that does not follow holds nobody up.
    follows: bool = True
    #: From where on a write in flight reads the ring; None without one.
    reading: int | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    wake_sync: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Committed:
    """One extent that a commit made part of its volume; `position` is that of its first block."""

    kind: int
    layer: int
    block: int
    count: int
    position: int
    version: int
    crcs: list[int]


class _Staged:
    """A record under construction."""

    __slots__ = ("crcs", "extents", "position", "room")

    def __init__(self, position: int) -> None:
        self.position = position
        self.extents: list[tuple[int, int, int, int]] = []
        self.crcs: list[int] = []
        self.room = ROOM


class Journal:
    """The pool's journal stream; see the module."""

    def __init__(
        self,
        *,
        stream: int,
        size: int,
        replicas: list[Replica],
        head: int,
        tail: int,
        version: int,
        previous: int,
        on_failure: Callable[[int, DeviceError], None],
    ) -> None:
        self.stream = stream
        self.size = size
        self.replicas = replicas
        #: Replicas that are being brought up to date; `replace` makes them count.
        self.joining: list[Replica] = []
        self.head = head
        self.tail = tail
        self.version = version
        self.previous = previous
        #: Positions of the records from the tail on, ascending.
        self.starts: list[int] = []
        self._on_failure = on_failure
        self._ring_blocks = min(size, RING_BYTES // BLOCK_SIZE)
        self._ring = memoryview(bytearray(self._ring_blocks * BLOCK_SIZE))
        self._ring_from = head
        self._staged = head
        self._records: list[_Staged] = []
        self._sync_to = head
        self._limit = head
        self._flushes: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        #: Why nobody may wait any more; empty while the journal runs.
        self._stopped = ""
        self.appends = 0
        for replica in replicas:
            self._start(replica)

    # -- what a caller may ask ---------------------------------------------------------------

    @property
    def durable(self) -> int:
        """The position up to which every replica is synced."""
        return min((replica.synced for replica in self.replicas), default=self.head)

    @property
    def used(self) -> int:
        return self.head - self.tail

    def wake_writers(self) -> None:
        """Let everybody who waits for room look again."""
        self._progress()

    def room(self, blocks: int) -> bool:
        """Whether `blocks` payload blocks (with their headers) can be staged now."""
        end = self._staged + blocks + 2 + (blocks >> 7)
        if end <= self._limit:
            return True
        self._limit = self._find_limit()
        return end <= self._limit

    def _find_limit(self) -> int:
        """The position that staging must not pass: live journal on the devices, unread ring
        (R4)."""
        limit = self.tail + self.size
        for replica in (*self.replicas, *self.joining):
            if replica.reading is not None:
                limit = min(limit, replica.reading + self._ring_blocks)
            elif replica.follows and not replica.failed:
                limit = min(limit, replica.written + self._ring_blocks)
        return limit

    @property
    def staged(self) -> bool:
        """Whether anything waits for `commit`."""
        return bool(self._records)

    async def wait_room(self) -> None:
        """Return after the next step of a replica or of the tail. Raises PoolStopped."""
        if self._stopped:
            raise PoolStopped(self._stopped)
        self._kick(0)
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def peek(self, position: int, count: int = 1) -> memoryview | None:
        """`count` blocks from the ring if they are still in it and contiguous there."""
        if position < self._staged - self._ring_blocks or position < self._ring_from:
            return None
        at = position % self._ring_blocks
        if at + count > self._ring_blocks or position + count > self.head:
            return None
        return self._ring[at * BLOCK_SIZE : (at + count) * BLOCK_SIZE]

    def sources(self, position: int) -> list[Replica]:
        """Replicas that hold a position, the primary first."""
        return [r for r in self.replicas if not r.failed and r.valid_from <= position < r.written]

    def offset(self, replica: Replica, position: int) -> int:
        """The device offset of a position on a replica."""
        return replica.offset + position % self.size * BLOCK_SIZE

    # -- staging and committing: no await here, atomic ---------------------------------------

    def stage_data(self, layer: int, block: int, data: memoryview) -> None:
        """Copy whole blocks into the ring. The caller has checked `room`."""
        count = len(data) >> 12
        if count == 1:
            current = self._record(EXTENT.size + 4)
            position = self._staged
            at = position % self._ring_blocks * BLOCK_SIZE
            self._ring[at : at + BLOCK_SIZE] = data
            self._staged = position + 1
            current.extents.append((KIND_DATA, layer, block, 1))
            current.crcs.append(crc32c(data))
            return
        while count:
            current = self._record(EXTENT.size + 4)
            now = min(count, (current.room + 4) // 4)
            current.room -= 4 * (now - 1)
            part = data[: now * BLOCK_SIZE]
            self._copy(part)
            current.extents.append((KIND_DATA, layer, block, now))
            current.crcs += [
                crc32c(part[i : i + BLOCK_SIZE]) for i in range(0, len(part), BLOCK_SIZE)
            ]
            data = data[now * BLOCK_SIZE :]
            block += now
            count -= now

    def stage_range(self, kind: int, layer: int, block: int, count: int) -> None:
        """Stage a tombstone or provisioned zeros; no payload."""
        self._record(EXTENT.size).extents.append((kind, layer, block, count))

    def stage_mark(self) -> None:
        """Stage a record without extents: the start of a term. Whatever else was staged has left
        room for it, or it takes the place of one that ended the journal."""
        assert self._staged < self.tail + self.size
        self._record(0)

    def stage_catalog(self, text: bytes) -> None:
        """Stage a catalog change."""
        padded = text + bytes(-len(text) % BLOCK_SIZE)
        count = len(padded) // BLOCK_SIZE
        current = self._record(EXTENT.size + 4 * count)
        self._copy(memoryview(padded))
        current.extents.append((KIND_CATALOG, 0, len(text), count))
        current.crcs += [
            crc32c(padded[i : i + BLOCK_SIZE]) for i in range(0, len(padded), BLOCK_SIZE)
        ]

    def _record(self, need: int) -> _Staged:
        """The record under construction, or a new one if it has not `need` bytes of header left."""
        records = self._records
        if not records or records[-1].room < need:
            records.append(_Staged(self._staged))
            self._staged += 1
        current = records[-1]
        current.room -= need
        return current

    def _copy(self, data: memoryview) -> None:
        ring_blocks = self._ring_blocks
        while data:
            at = self._staged % ring_blocks
            now = min(len(data) >> 12, ring_blocks - at)
            self._ring[at * BLOCK_SIZE : (at + now) * BLOCK_SIZE] = data[: now << 12]
            self._staged += now
            data = data[now << 12 :]

    def commit(self, *, flags: int = 0) -> list[Committed]:
        """Append everything staged to the primary. Raises PoolStopped if no replica takes it; then
        nothing of it happened."""
        records = self._records
        if not records:
            return []
        self._records = []
        previous = self.previous
        durable, tail = self.durable, self.tail
        committed: list[Committed] = []
        last = records[-1]
        for item in records:
            self.version += 1
            at = item.position % self._ring_blocks * BLOCK_SIZE
            previous = record.encode_into(
                self._ring[at : at + BLOCK_SIZE],
                flags=flags | (record.FLAG_MORE if item is not last else 0),
                stream=self.stream,
                previous=previous,
                version=self.version,
                position=item.position,
                tail=tail,
                durable=durable,
                extents=item.extents,
                crcs=item.crcs,
            )
            self._collect(item, committed)
        reached("append_after_headers_before_primary")
        self._append()
        self.previous = previous
        self.head = self._staged
        self.starts.extend(item.position for item in records)
        self._after_append()
        return committed

    def _collect(self, item: _Staged, committed: list[Committed]) -> None:
        position, used = item.position + 1, 0
        crcs = item.crcs
        for kind, layer, block, count in item.extents:
            payload = count if kind in (KIND_DATA, KIND_CATALOG) else 0
            committed.append(
                Committed(
                    kind, layer, block, count, position, self.version, crcs[used : used + payload]
                )
            )
            position += payload
            used += payload

    def _append(self) -> None:
        """Bring the first replica that takes it up to `_staged`; it becomes the primary (R3)."""
        failures: list[tuple[int, DeviceError]] = []
        for replica in [r for r in self.replicas if not r.failed and r.follows]:
            try:
                for offset, views in self._segments(replica, replica.written, self._staged):
                    replica.device.append(offset, views)
            except DeviceError as error:
                replica.failed = True
                failures.append((replica.member, error))
                continue
            replica.written = self._staged
            self.appends += 1
            if replica is not self.replicas[0]:
                self.replicas.remove(replica)
                self.replicas.insert(0, replica)
            break
        else:
            self._staged = self.head
            self._report(failures)
            raise PoolStopped("no journal device takes writes: bring devices back and restart")
        self._report(failures)

    def _report(self, failures: list[tuple[int, DeviceError]]) -> None:
        for member, error in failures:
            self._on_failure(member, error)

    def _after_append(self) -> None:
        primary = self.replicas[0]
        if self.head - primary.synced > UNSYNCED_BLOCKS:
            primary.wake_sync.set()
        for replica in self.replicas:
            if self.head - replica.written > LAG_BLOCKS:
                replica.wake.set()
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE_SECONDS, self._idle)

    def _idle(self) -> None:
        self._timer = None
        self._kick(0)

    def _kick(self, sync_to: int) -> None:
        if sync_to > self._sync_to:
            self._sync_to = sync_to
        for replica in (*self.replicas, *self.joining):
            if replica.written < self.head:
                replica.wake.set()
            if replica.synced < self._sync_to <= replica.written:
                replica.wake_sync.set()

    def _segments(
        self, replica: Replica, start: int, end: int
    ) -> Iterator[tuple[int, list[Buffer]]]:
        """Ring content from `start` to `end` as writes: cut where ring or journal wrap."""
        ring_blocks, size = self._ring_blocks, self.size
        while start < end:
            at = start % ring_blocks
            now = min(end - start, ring_blocks - at, size - start % size)
            yield (
                self.offset(replica, start),
                [self._ring[at * BLOCK_SIZE : (at + now) * BLOCK_SIZE]],
            )
            start += now

    # -- durability --------------------------------------------------------------------------

    def flush(self, position: int | None = None) -> asyncio.Future[None]:
        """A future that is done when everything below `position` (default: the head) is durable on
        all replicas. It fails with PoolStopped when the journal is closed before."""
        target = self.head if position is None else position
        waiter = self._loop.create_future()
        if self.durable >= target:
            waiter.set_result(None)
            return waiter
        if self._stopped:
            waiter.set_exception(PoolStopped(self._stopped))
            return waiter
        self._flushes.append((target, waiter))
        self._kick(target)
        return waiter

    def _progress(self) -> None:
        """Answer flushes and wake writers. No await here: atomic."""
        durable = self.durable
        flushes = self._flushes
        if flushes:
            kept: deque[tuple[int, asyncio.Future[None]]] = deque()
            for target, waiter in flushes:
                if target > durable:
                    kept.append((target, waiter))
                elif not waiter.done():
                    reached("flush_after_durable_before_answer")
                    waiter.set_result(None)
            self._flushes = kept
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _start(self, replica: Replica) -> None:
        replica.tasks = [
            self._loop.create_task(self._keep(replica, replica.wake, self._write_some)),
            self._loop.create_task(self._keep(replica, replica.wake_sync, self._sync_some)),
        ]

    async def _keep(
        self,
        replica: Replica,
        wake: asyncio.Event,
        step: Callable[[Replica], Coroutine[None, None, bool]],
    ) -> None:
        """Repeat a step whenever there is something for it, until the replica fails or the journal
        closes. Writing and syncing are two such loops, so that neither waits for the other."""
        try:
            while not replica.failed:
                await wake.wait()
                wake.clear()
                while not replica.failed and await step(replica):
                    self._progress()
        except DeviceError as error:
            self._fail(replica, error)
        finally:
            replica.reading = None
        self._progress()

    def _fail(self, replica: Replica, error: DeviceError) -> None:
        if not replica.failed:
            replica.failed = True
            replica.wake.set()
            replica.wake_sync.set()
            reached("failure_after_mark_before_report")
            self._on_failure(replica.member, error)

    @contextmanager
    def _in_time(self, replica: Replica) -> Iterator[None]:
        """Fail the replica if what is awaited inside takes too long; the loop that awaits it is
        left behind (R4). Cheaper than a task of its own: flushes wait for this."""

        def expired() -> None:
            text = f"{replica.device.url}: no answer for {WRITE_SECONDS:.0f} s: check its cables"
            self._fail(replica, DeviceError(errno.ETIMEDOUT, text))
            replica.reading = None
            self._progress()

        timer = self._loop.call_later(WRITE_SECONDS, expired)
        try:
            yield
        finally:
            timer.cancel()

    async def _write_some(self, replica: Replica) -> bool:
        """One write. Returns False when the replica has everything."""
        start = replica.written
        end = min(self.head, start + CHUNK_BLOCKS)
        if start >= end:
            return False
        if start < max(self._ring_from, self._staged - self._ring_blocks):
            await self._catch_up(replica, end)
            return True
        sync_to = self._sync_to
        must_sync = replica.synced < sync_to and end >= sync_to
        segments = list(self._segments(replica, start, end))
        # A write that syncs itself saves a call, but covers no write before it.
        at_once = must_sync and end == self.head and len(segments) == 1 and replica.synced == start
        replica.reading = start
        with self._in_time(replica):
            for offset, views in segments:
                await replica.device.write(offset, views, sync=at_once)
        replica.reading = None
        # An append may have brought it further meanwhile.
        replica.written = max(replica.written, end)
        replica.follows = True
        if at_once:
            replica.synced = max(replica.synced, end)
        # A flush may have come while the write was under way.
        unsynced = replica.written - replica.synced
        if replica.synced < self._sync_to <= replica.written or unsynced > UNSYNCED_BLOCKS:
            replica.wake_sync.set()
        return True

    async def _sync_some(self, replica: Replica) -> bool:
        """One sync. Returns False when there is nothing that must be synced."""
        written, sync_to = replica.written, self._sync_to
        must_sync = replica.synced < sync_to <= written
        if not must_sync and written - replica.synced <= UNSYNCED_BLOCKS:
            return False
        with self._in_time(replica):
            await replica.device.sync()
        reached("sync_after_device_before_durable")
        replica.synced = max(replica.synced, written)
        return True

    async def _catch_up(self, replica: Replica, end: int) -> None:
        """Copy what the ring no longer has from a replica that has it (R5)."""
        start = replica.written
        end = min(end, start + self.size - start % self.size)
        for source in self.sources(start):
            if source is replica:
                continue
            end = min(end, source.written)
            try:
                read = source.device.read(self.offset(source, start), (end - start) * BLOCK_SIZE)
                data = await answer(read, READ_SECONDS, source.device.url)
            except DeviceError as error:
                source.failed = True
                self._on_failure(source.member, error)
                continue
            write = replica.device.write(self.offset(replica, start), [data])
            await answer(write, WRITE_SECONDS, replica.device.url)
            replica.written = max(replica.written, end)
            if replica.written >= self._staged - self._ring_blocks:
                replica.follows = True
            return
        raise DeviceError(5, f"no other journal replica can bring {replica.device.url} up to date")

    # -- changes from outside ----------------------------------------------------------------

    def add(self, replica: Replica) -> None:
        """Start to bring a new replica up to date. It does not count for `flush` before
        `replace`."""
        replica.follows = replica.written >= max(self._ring_from, self._staged - self._ring_blocks)
        self.joining.append(replica)
        self._start(replica)
        replica.wake.set()

    async def joined(self, replica: Replica) -> bool:
        """Wait until a new replica is synced through everything that a flush was answered for and
        has nearly all the rest. False if it failed."""
        target = self.head
        while not replica.failed and (replica.synced < target or not replica.follows):
            self._kick(target)
            replica.wake.set()
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter
        return not replica.failed

    def replace(self, gone: set[int], come: list[Replica]) -> None:
        """Change the replica set, after a root that says so was committed. Replicas in `come` are
        synced through everything that a flush has been answered for."""
        for replica in self.replicas:
            if replica.member in gone:
                replica.failed = True
                replica.wake.set()
                replica.wake_sync.set()
        self.replicas = [r for r in self.replicas if r.member not in gone] + come
        self.joining = [r for r in self.joining if r not in come and r.member not in gone]
        self._kick(0)
        self._progress()

    def release(self, tail: int) -> None:
        """The committed root needs nothing below `tail` any more (R21)."""
        assert self.tail <= tail <= self.head
        self.tail = tail
        del self.starts[: bisect_left(self.starts, tail)]
        self._progress()

    def start_of(self, position: int) -> int:
        """The start of the record that holds a position not below the tail."""
        at = bisect_right(self.starts, position)
        return self.starts[at - 1] if at else self.tail

    async def close(self) -> None:
        """Stop all tasks. What is not synced stays so; whoever needs it flushes before."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for r in (*self.replicas, *self.joining) for task in r.tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            # One that hangs in a device is left behind.
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        self.stop("the pool is closed")

    def stop(self, why: str) -> None:
        """Let nobody wait for what will not come: flushes and writers get PoolStopped from now on.
        Replicas go on with what they have."""
        self._stopped = self._stopped or why
        waiters = [*(waiter for _, waiter in self._flushes), *self._waiters]
        self._flushes.clear()
        self._waiters.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(PoolStopped(self._stopped))
