"""Simulated devices, and the world whose power fails.

A `World` owns the media (`tests.sim.image`), the only random generator and the operation counter.
A `SimDevice` is a handle on one medium, as a process has it. When the world dies (`Crash` at the
Nth operation, `crash()` or `kill()`), every handle is dead: later operations raise `Crash`
and change nothing. `reopen()` gives new handles over what survived.

    world = World(seed, crash_at=17)
    devices = world.create({"a": 1 << 20, "b": 1 << 20})
    try:
        await world.run(workload(devices))
    except Crash:
        world.crash()            # power loss; or world.kill(): only the process died
    devices = world.reopen()     # the next life: open, check
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Mapping, Sequence
from random import Random
from typing import Any, Protocol, TypeVar

from backends.base import Buffer
from backends.failures import check_buffers, check_range, gone
from backends.fault_script import (
    READS,
    Action,
    ApplyThenFail,
    Fail,
    Script,
    raise_after,
    raise_before,
)

from .image import Image, Write, split
from .loop import VirtualLoop
from .stores import Objects, SimStore

T = TypeVar("T")


class Crash(BaseException):
    """The simulated process is dead. No handler for errors of devices catches it."""


class Tap(Protocol):
    """Who watches the writes of a world."""

    def write(self, name: str, offset: int, data: bytes) -> None:
        """A device will be written."""

    def put(self, name: str, object_name: str, data: bytes) -> None:
        """An object will be stored."""


class World:
    """The media, the randomness and the moment of death of one simulation.

    `latency` is the longest time in virtual seconds that an operation takes, `cached` the chance
    that `try_read` finds its data in memory. With `crash_at`, the operation of that number
    (from 1, counted over all devices) is the last: it is in flight when the process dies, or, with
    `crash_after`, it took effect but was not answered.
    """

    def __init__(
        self,
        seed: int,
        *,
        latency: float = 0.001,
        cached: float = 0.5,
        crash_at: int | None = None,
        crash_after: bool = False,
    ) -> None:
        self.rng = Random(seed)
        self.latency = latency
        self.cached = cached
        self.crash_at = crash_at
        self.crash_after = crash_after
        self.operations = 0
        #: Those of them that change a medium.
        self.changes = 0
        self.images: dict[str, Image | Objects] = {}
        #: Told of every write before it happens.
        self.tap: Tap | None = None
        self.scripts: dict[str, Script] = {}
        self.life = 0
        self.dead = False
        self.epitaph = ""
        self._decided = False
        self._death = asyncio.Event()
        self._trace = hashlib.sha256()

    def create(self, sizes: Mapping[str, int]) -> dict[str, SimDevice]:
        """Add media of so many bytes of zeros and return handles on them, by name."""
        return {name: SimDevice(name, size, self) for name, size in sizes.items()}

    def create_stores(self, sizes: Mapping[str, int]) -> dict[str, SimStore]:
        """Add empty object stores of so many bytes and return handles on them, by name."""
        made = {}
        for name, size in sizes.items():
            self.images[name] = medium = Objects(size)
            made[name] = SimStore(name, self, medium)
        return made

    def start(
        self, device: SimDevice | SimStore, op: str, offset: int, length: int
    ) -> tuple[Action | None, int, float, float]:
        """Begin an operation that takes time: its fate, its number, the time until it takes effect
        and the time left after that. Raises `Crash`."""
        action = self.step(device, op, offset, length)
        whole = self.rng.random() * self.latency
        part = self.rng.random() * whole
        return action, self.operations, part, whole - part

    def step(
        self, device: SimDevice | SimStore, op: str, offset: int = 0, length: int = 0
    ) -> Action | None:
        """Count an operation and return what happens to it. Raises `Crash`. Atomic."""
        self.check_alive(device)
        self.operations += 1
        self.changes += op not in READS and op != "list"
        self._trace.update(f"{self.life} {device.name} {op} {offset} {length}\n".encode())
        if self.operations == self.crash_at and not self.crash_after:
            self.die(f"during operation {self.operations}, {op} of {device.name}")
            raise Crash(self.epitaph)
        return self.scripts[device.name].draw(op, offset, length)

    def finish(self, device: SimDevice | SimStore, number: int) -> None:
        """The operation took effect and is about to be answered. Raises `Crash`."""
        self.check_alive(device)
        if number == self.crash_at:
            self.die(f"after operation {number} of {device.name} took effect")
            raise Crash(self.epitaph)

    def check_alive(self, device: SimDevice | SimStore) -> None:
        """Raise `Crash` when the process that holds this handle is dead."""
        if self.dead or device.life != self.life:
            raise Crash(f"{device.name}: the process that held it is dead")

    def die(self, epitaph: str = "ended from outside") -> None:
        """End this life; `crash` or `kill` then decide what the media remember."""
        self.epitaph = self.epitaph if self.dead else epitaph
        self.dead = True
        self._death.set()
        for script in self.scripts.values():
            script.release()

    def crash(self, fate: str | None = None) -> None:
        """Power loss: every unsynced write is kept, lost or torn (`fate`: the same for all)."""
        self.die()
        for image in self.images.values():
            image.lose_power(self.rng, fate)
        self._decided = True

    def kill(self) -> None:
        """Only the process dies: everything written stays in the page cache, not yet durable."""
        self.die()
        for image in self.images.values():
            image.kill(self.rng)
        self._decided = True

    def reopen(
        self, *, crash_at: int | None = None, crash_after: bool = False
    ) -> dict[str, SimDevice | SimStore]:
        """Begin the next life and return handles on all media that have not vanished, by name.

        `crash_at` counts the operations of the new life only.
        """
        if not self._decided:
            raise RuntimeError("decide first what survived: call crash() or kill()")
        self.life += 1
        self.dead = self._decided = False
        self._death = asyncio.Event()
        self.crash_at = None if crash_at is None else self.operations + crash_at
        self.crash_after = crash_after
        present = [name for name in self.images if not self.scripts[name].vanished]
        return {name: self._handle(name) for name in present}

    def _handle(self, name: str) -> SimDevice | SimStore:
        medium = self.images[name]
        if isinstance(medium, Objects):
            return SimStore(name, self, medium)
        return SimDevice(name, medium.size, self)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`; raises `Crash` when the world dies before, and then ends
        every task that was started meanwhile, as the end of a process would."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        before = set(loop.live_tasks())
        task = loop.create_task(work)
        death = loop.create_task(self._death.wait())
        await asyncio.wait((task, death), return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if not self.dead:
            return await task
        orphans = [orphan for orphan in loop.live_tasks() if orphan not in before]
        for orphan in orphans:
            orphan.cancel()
        await asyncio.gather(task, *orphans, return_exceptions=True)
        raise Crash(self.epitaph)

    def digest(self) -> str:
        """Return a fingerprint of all media and of every operation so far."""
        digest = self._trace.copy()
        for name in sorted(self.images):
            self.images[name].add_to(digest)
        return digest.hexdigest()


class SimDevice:
    """A `Device` over a medium of `world`, which is made when there is none of that name.

    An operation takes effect at a random moment inside the call, so overlapping ones reorder.
    """

    def __init__(self, name: str, size: int, world: World) -> None:
        self.name = name
        self.life = world.life
        self._world = world
        image = world.images.setdefault(name, Image(size))
        assert isinstance(image, Image)
        self._image = image
        self._script = world.scripts.setdefault(name, Script(world.rng))
        self._closed = False
        #: A sync of a journal replica failed here: no flush may count on it in this life (R4).
        self.distrusted = False

    @property
    def url(self) -> str:
        return f"sim:{self.name}"

    @property
    def size(self) -> int:
        return self._image.size

    @property
    def script(self) -> Script:
        """The faults of this device; they outlive the process. A failed sync may drop writes."""
        return self._script

    async def read(self, offset: int, length: int) -> bytes:
        self._check_open()
        check_range(self.url, self.size, offset, length)
        action, number, rest = await self._begin("read", offset, length)
        data = self._script.damage(self._image.read(offset, length), action)
        await self._end("read", action, number, rest)
        return data

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        self._check_open()
        check_buffers(self.url, self.size, offset, buffers)
        write = split(offset, buffers)
        if self._world.tap is not None:
            self._world.tap.write(self.name, offset, b"".join(buffers))
        self._image.inflight.append(write)
        try:
            action, number, rest = await self._begin("write", offset, sum(map(len, buffers)))
        except asyncio.CancelledError:
            if not self._world.dead and self._world.rng.random() < 0.5:
                self._image.apply(write)  # the thread that writes cannot be stopped
            raise
        finally:
            self._land(write)
        self._image.apply(write)
        if sync and not isinstance(action, ApplyThenFail):
            self._image.make_block_durable(write)
        await self._end("write", action, number, rest)

    async def sync(self) -> None:
        self._check_open()
        covered = self._image.unsynced.copy()
        action, number, rest = await self._begin("sync")
        self._image.make_durable(covered)
        await self._end("sync", action, number, rest)

    def try_read(self, offset: int, into: memoryview) -> bool:
        self._check_open()
        length = len(into)
        check_range(self.url, self.size, offset, length)
        self._world.check_alive(self)
        waits = self._script.would_wait("try_read", offset, length)
        if waits or self._world.rng.random() >= self._world.cached:
            return False
        action = self._world.step(self, "try_read", offset, length)
        number = self._world.operations
        raise_before(self.url, "try_read", action)
        into[:] = self._script.damage(self._image.read(offset, length), action)
        raise_after(self.url, "try_read", action)
        self._world.finish(self, number)
        return True

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        check_buffers(self.url, self.size, offset, buffers)
        write = split(offset, buffers)
        if self._world.tap is not None:
            self._world.tap.write(self.name, offset, b"".join(buffers))
        self._image.inflight.append(write)
        try:
            action = self._world.step(self, "append", offset, sum(map(len, buffers)))
            raise_before(self.url, "append", action)
        finally:
            self._land(write)
        number = self._world.operations
        self._image.apply(write)
        raise_after(self.url, "append", action)
        self._world.finish(self, number)

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        return {"scheme": "sim", "url": self.url, "size": self.size}, []

    async def close(self) -> None:
        self._closed = True

    def snapshot(self) -> Image:
        """Return a copy of the medium as it is now."""
        return self._image.copy()

    def restore(self, snapshot: Image) -> None:
        """Put an old copy back, as when a disk returns from a shelf."""
        copy = snapshot.copy()
        self._image.written, self._image.synced = copy.written, copy.synced
        self._image.unsynced = copy.unsynced

    def rot(self, offset: int, mask: int = 1) -> None:
        """Flip the bits of `mask` in the byte at `offset` of the medium, for good."""
        self._image.flip(offset, mask)

    async def _begin(
        self, op: str, offset: int = 0, length: int = 0
    ) -> tuple[Action | None, int, float]:
        """Wait until the operation takes effect. Returns its fate, its number, its time left."""
        world = self._world
        action, number, part, rest = world.start(self, op, offset, length)
        await self._script.wait(action)
        await asyncio.sleep(part)
        world.check_alive(self)
        if op == "sync" and isinstance(action, Fail | ApplyThenFail):
            self._image.fail_sync(world.rng)
            if _asked_by_the_journal():
                self.distrusted = True
        raise_before(self.url, op, action)
        return action, number, rest

    async def _end(self, op: str, action: Action | None, number: int, rest: float) -> None:
        self._world.finish(self, number)
        # What was read is the same a moment later.
        if op != "read" and self._world.rng.random() < 0.5:
            await asyncio.sleep(rest)
            self._world.check_alive(self)
        raise_after(self.url, op, action)

    def _land(self, write: Write) -> None:
        """The write is no longer in flight, unless the world died under it: then that decides."""
        if self._world.dead or self.life != self._world.life:
            return
        self._image.inflight = [other for other in self._image.inflight if other is not write]

    def _check_open(self) -> None:
        self._world.check_alive(self)
        if self._closed:
            raise gone(self.url, "it was closed here")


def _asked_by_the_journal() -> bool:
    """Whether the running task is one that keeps a journal replica."""
    task = asyncio.current_task()
    return task is not None and "Journal._keep" in repr(task.get_coro())
