"""Decorators that make a backend fail by a script: for tests, the simulation, failure drills.

Same interface as what they wrap. A quiet script costs one attribute look-up per call. Faults
stay in this process: a worker that attaches gets the device underneath.
"""

from __future__ import annotations

from collections.abc import Sequence

from .base import Buffer, Device, ObjectStore, WorkerSpec
from .fault_script import Action, Script, raise_after, raise_before


class FaultyDevice:
    """A `Device` whose operations meet what `script` has for them."""

    def __init__(self, inner: Device, script: Script) -> None:
        self.inner = inner
        self.script = script

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def size(self) -> int:
        return self.inner.size

    async def read(self, offset: int, length: int) -> bytes:
        action = await _before(self.script, self.url, "read", offset, length)
        data = await self.inner.read(offset, length)
        raise_after(self.url, "read", action)
        return self.script.damage(data, action)

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        length = sum(map(len, buffers))
        action = await _before(self.script, self.url, "write", offset, length)
        await self.inner.write(offset, buffers, sync=sync)
        raise_after(self.url, "write", action)

    async def sync(self) -> None:
        action = await _before(self.script, self.url, "sync")
        await self.inner.sync()
        raise_after(self.url, "sync", action)

    def try_read(self, offset: int, into: memoryview) -> bool:
        if self.script.quiet:
            return self.inner.try_read(offset, into)
        length = len(into)
        if self.script.would_wait("try_read", offset, length):
            return False
        action = self.script.draw("try_read", offset, length)
        raise_before(self.url, "try_read", action)
        done = self.inner.try_read(offset, into)
        raise_after(self.url, "try_read", action)
        if done and action is not None:
            into[:] = self.script.damage(bytes(into), action)
        return done

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.script.quiet:
            return self.inner.append(offset, buffers)
        action = self.script.draw("append", offset, sum(map(len, buffers)))
        raise_before(self.url, "append", action)
        self.inner.append(offset, buffers)
        raise_after(self.url, "append", action)

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        return self.inner.worker_spec()

    async def close(self) -> None:
        await self.inner.close()


class FaultyStore:
    """An `ObjectStore` whose operations meet what `script` has for them."""

    def __init__(self, inner: ObjectStore, script: Script) -> None:
        self.inner = inner
        self.script = script

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def size(self) -> int:
        return self.inner.size

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        action = await _before(self.script, self.url, "put")
        await self.inner.put(name, buffers)
        raise_after(self.url, "put", action)

    async def get(self, name: str, offset: int, length: int) -> bytes:
        action = await _before(self.script, self.url, "get", offset, length)
        data = await self.inner.get(name, offset, length)
        raise_after(self.url, "get", action)
        return self.script.damage(data, action)

    async def delete(self, name: str) -> None:
        action = await _before(self.script, self.url, "delete")
        await self.inner.delete(name)
        raise_after(self.url, "delete", action)

    async def list(self, prefix: str = "") -> list[str]:
        action = await _before(self.script, self.url, "list")
        names = await self.inner.list(prefix)
        raise_after(self.url, "list", action)
        return names

    def worker_spec(self) -> WorkerSpec:
        """As `Device.worker_spec`. Raises `DeviceError` when the store is of this process only."""
        return self.inner.worker_spec()

    async def close(self) -> None:
        await self.inner.close()


async def _before(
    script: Script, url: str, op: str, offset: int = 0, length: int = 0
) -> Action | None:
    """Wait or raise as the script says; return what is still to be done to the result."""
    if script.quiet:
        return None
    action = script.draw(op, offset, length)
    await script.wait(action)
    raise_before(url, op, action)
    return action
