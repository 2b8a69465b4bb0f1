"""The devices, opened for reading only, and the superblocks on them.

A read never raises: what cannot be read is None, and the source keeps what its first error said.
One that once did not answer in time is not asked again. Called by `remains`, `stripes` and
`journal`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.base import Device, DeviceError, ObjectStore
from backends.in_use import in_use
from backends.open import open_backend
from stripewell.recover.damage import Damage
from stripewell.recover.root import BLOCK
from stripewell.recover.superblock import (
    HEAD_BYTES,
    ROOT_SIZES,
    Head,
    Newer,
    Superblock,
    parse_body,
    parse_head,
)

#: A read that takes longer is given up, and its device with it.
READ_SECONDS = 20.0
_STORE_ROOTS = ("root-a", "root-b")


@dataclass(slots=True, eq=False)
class Source:
    """A device or store that was named; `backend` is None if it could not be opened."""

    url: str
    backend: Device | ObjectStore | None = None
    #: What is wrong with it; "" as long as nothing is.
    trouble: str = ""
    hangs: bool = False
    #: Another process has it for writing: a daemon, or a mount.
    in_use: bool = False
    #: A root slot cannot be read at either end: a newer root than all others may have been there.
    hides_a_root: bool = False
    #: Something of a newer format is on it.
    newer: bool = False
    superblocks: list[Superblock] = field(default_factory=list)
    damage: Damage = field(default_factory=Damage)
    #: Bytes of a device, 0 for what is none.
    size: int = field(init=False, default=0)
    is_store: bool = field(init=False, default=False)
    _device: Device | None = field(init=False, default=None)
    _store: ObjectStore | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.backend, Device):
            self._device, self.size = self.backend, self.backend.size
        elif self.backend is not None:
            self._store, self.is_store = self.backend, True

    async def read(self, offset: int, length: int) -> bytes | None:
        """Bytes of a device, aligned to blocks; None if it does not have them."""
        if self._device is None or not 0 <= offset <= self.size - length:
            return None
        return await self._answer(self._device.read(offset, length))

    async def get(self, name: str, offset: int, length: int) -> bytes | None:
        """Bytes of an object; None if the store does not have them."""
        if self._store is None:
            return None
        return await self._answer(self._store.get(name, offset, length))

    async def close(self) -> None:
        """Let go of it; what hangs is left behind."""
        if self.backend is not None and not self.hangs:
            await self.backend.close()

    async def _answer(self, reading: Coroutine[Any, Any, bytes]) -> bytes | None:
        if self.hangs:
            reading.close()
            return None
        try:
            async with asyncio.timeout(READ_SECONDS):
                return await reading
        except TimeoutError:
            self.hangs = True
            self.trouble = f"it did not answer for {READ_SECONDS:.0f} s"
        except DeviceError as error:
            self.trouble = self.trouble or (error.strerror or str(error))
        return None


async def open_sources(urls: Sequence[str]) -> list[Source]:
    """Open everything that was named and read the superblocks. Changes nothing on them."""
    sources = await asyncio.gather(*(_open(url) for url in urls))
    await asyncio.gather(*(find_superblocks(source) for source in sources))
    return list(sources)


async def _open(url: str) -> Source:
    try:
        async with asyncio.timeout(READ_SECONDS):
            backend = await open_backend(url, writable=False)
            return Source(url, backend, in_use=await asyncio.to_thread(in_use, url))
    except TimeoutError:
        return Source(url, trouble=f"it did not open within {READ_SECONDS:.0f} s", hangs=True)
    except DeviceError as error:
        return Source(url, trouble=error.strerror or str(error))


async def find_superblocks(source: Source) -> None:
    """Fill in the source's superblocks, newest first; one of a newer format is its trouble."""
    found: dict[str, Superblock] = {}
    try:
        blocks = _of_store(source) if source.is_store else _of_device(source)
        for block in await blocks:
            found.setdefault(block.digest, block)
    except Newer as error:
        source.trouble, source.newer = str(error), True
        return
    source.superblocks = sorted(found.values(), key=lambda b: b.head.generation, reverse=True)
    if source.backend is not None and not found and not source.trouble:
        source.trouble = "no superblock of a pool is left on it"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a superblock may be: what is there. `blank` says that nothing ever was."""

    head: Head | None = None
    block: Superblock | None = None
    blank: bool = False


async def _of_device(source: Source) -> list[Superblock]:
    places = {at for r in ROOT_SIZES for at in (0, r, source.size - 2 * r, source.size - r)}
    found = await _at(source, places)
    # A device that grew, or was copied to a larger one, has its second end in the middle.
    heads = [place.head for place in found.values() if place.head is not None]
    ends = {_end(head) - n * head.root_bytes for head in heads for n in (1, 2)}
    found |= await _at(source, ends - places)
    blocks = [place.block for place in found.values() if place.block is not None]
    if blocks:
        newest = max(blocks, key=lambda block: block.head.generation)
        _judge(source, found, newest.head)
    return blocks


def _end(head: Head) -> int:
    return head.size // BLOCK * BLOCK


def _judge(source: Source, found: dict[int, _Place], head: Head) -> None:
    """Say which superblocks are not what they should be. Each of the two slots is at both ends; the
    second is blank until the pool has its second root."""
    for slot in (0, head.root_bytes):
        twins = [found[at] for at in (slot, _end(head) - 2 * head.root_bytes + slot)]
        bad = [twin for twin in twins if twin.block is None]
        if head.generation > 1 or len(bad) < 2 or not all(twin.blank for twin in twins):
            source.damage.superblocks += len(bad)
            source.hides_a_root |= len(bad) == 2


async def _at(source: Source, places: Iterable[int]) -> dict[int, _Place]:
    return {at: await _place(source, at) for at in sorted(places)}


async def _place(source: Source, at: int) -> _Place:
    first = await source.read(at, BLOCK)
    head = parse_head(first) if first is not None else None
    if head is None:
        return _Place(blank=first is not None and not any(first))
    whole = await source.read(at, -(-(HEAD_BYTES + head.length) // BLOCK) * BLOCK)
    body = (whole or b"")[HEAD_BYTES : HEAD_BYTES + head.length]
    return _Place(head, parse_body(head, body))


async def _of_store(source: Source) -> list[Superblock]:
    found = []
    for name in _STORE_ROOTS:
        first = await source.get(name, 0, HEAD_BYTES)
        head = parse_head(first) if first is not None else None
        body = await source.get(name, HEAD_BYTES, head.length) if head is not None else None
        block = parse_body(head, body) if head is not None and body is not None else None
        found += [block] if block is not None else []
        if first is not None and block is None:
            source.damage.superblocks += 1
            source.hides_a_root = True
    return found
