"""A simulated object store: puts are atomic and durable, everything else may go wrong.

A put or delete in flight when the process dies took effect or did not. A store can vanish, answer
late, fail, apply and then report failure, return other bits; objects rot like blocks do.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from backends.base import Buffer, DeviceError, DeviceFull
from backends.fault_script import Action, Script, raise_after, raise_before
from backends.names import check_name

if TYPE_CHECKING:
    from .devices import World


@dataclass(slots=True)
class Objects:
    """The medium: what is stored, and the changes under way (None deletes)."""

    size: int
    objects: dict[str, bytes] = field(default_factory=dict)
    inflight: list[tuple[str, bytes | None]] = field(default_factory=list)

    def apply(self, name: str, data: bytes | None) -> None:
        """The change takes effect, whole and for good."""
        if data is None:
            self.objects.pop(name, None)
        else:
            self.objects[name] = data

    def kill(self, rng: Random) -> None:
        """The process dies: each change under way happens or does not."""
        for name, data in self.inflight:
            if rng.random() < 0.5:
                self.apply(name, data)
        self.inflight.clear()

    def lose_power(self, rng: Random, fate: str | None = None) -> None:
        """The same: the store has its own power."""
        self.kill(rng)

    def copy(self) -> Objects:
        """An independent copy with nothing under way."""
        return Objects(self.size, self.objects.copy())

    def add_to(self, digest: hashlib._Hash) -> None:
        """Add all of it to a fingerprint."""
        for name in sorted(self.objects):
            digest.update(name.encode() + self.objects[name])


class SimStore:
    """An `ObjectStore` over a medium of `world`."""

    def __init__(self, name: str, world: World, medium: Objects) -> None:
        self.name = name
        self.life = world.life
        self._world = world
        self._medium = medium
        self._script = world.scripts.setdefault(name, Script(world.rng))

    @property
    def url(self) -> str:
        return f"sim:{self.name}"

    @property
    def size(self) -> int:
        return self._medium.size

    @property
    def script(self) -> Script:
        """The faults of this store; they outlive the process."""
        return self._script

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        check_name(self.url, name)
        data = b"".join(buffers)
        others = sum(len(one) for key, one in self._medium.objects.items() if key != name)
        if others + len(data) > self.size:
            raise DeviceFull(f"{self.url}: {name} does not fit: delete objects")
        if self._world.tap is not None:
            self._world.tap.put(self.name, name, data)
        await self._change("put", name, data)

    async def delete(self, name: str) -> None:
        await self._change("delete", name, None)

    async def get(self, name: str, offset: int, length: int) -> bytes:
        action, number, rest = await self._begin("get", offset, length)
        data = self._medium.objects.get(name)
        if data is None:
            raise DeviceError(errno.ENOENT, f"{self.url} has no object {name}: look at its list")
        if not 0 <= offset <= len(data) - length or length < 0:
            raise DeviceError(errno.EINVAL, f"{self.url}: {name} is shorter: ask for less")
        await self._end("get", action, number, rest)
        return self._script.damage(data[offset : offset + length], action)

    async def list(self, prefix: str = "") -> list[str]:
        action, number, rest = await self._begin("list")
        found = sorted(name for name in self._medium.objects if name.startswith(prefix))
        await self._end("list", action, number, rest)
        return found

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        raise DeviceError(errno.EOPNOTSUPP, f"{self.url} is of this process only: use a directory")

    async def close(self) -> None:
        return

    def snapshot(self) -> Objects:
        """A copy of what is stored now."""
        return self._medium.copy()

    def restore(self, snapshot: Objects) -> None:
        """Put an old copy back."""
        self._medium.objects = snapshot.objects.copy()

    def spoil(self, name: str, offset: int, mask: int = 1) -> None:
        """Flip bits of an object, for good."""
        data = bytearray(self._medium.objects[name])
        data[offset] ^= mask
        self._medium.objects[name] = bytes(data)

    async def _change(self, op: str, name: str, data: bytes | None) -> None:
        change = (name, data)
        self._medium.inflight.append(change)
        try:
            action, number, rest = await self._begin(op, 0, len(data or b""))
        except asyncio.CancelledError:
            if not self._world.dead and self._world.rng.random() < 0.5:
                self._medium.apply(name, data)
            raise
        finally:
            if not self._world.dead and self.life == self._world.life:
                self._medium.inflight = [one for one in self._medium.inflight if one is not change]
        self._medium.apply(name, data)
        await self._end(op, action, number, rest)

    async def _begin(
        self, op: str, offset: int = 0, length: int = 0
    ) -> tuple[Action | None, int, float]:
        action, number, part, rest = self._world.start(self, op, offset, length)
        await self._script.wait(action)
        await asyncio.sleep(part)
        self._world.check_alive(self)
        raise_before(self.url, op, action)
        return action, number, rest

    async def _end(self, op: str, action: Action | None, number: int, rest: float) -> None:
        self._world.finish(self, number)
        await asyncio.sleep(rest)
        self._world.check_alive(self)
        raise_after(self.url, op, action)
