"""Makes golden pool images: `python -m tests.vectors.make DIRECTORY`.

The images stored here were made once, by the first code that wrote revision 1, and stay as they
are: today's code must read them (`test_vectors.py`). A new revision gets new images beside the old
ones; this script refuses to replace any. Everything is seeded and runs in virtual time, so the
same code makes the same bytes.

Each image is what a crash right after a flush leaves: a checkpoint, and a journal that goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from backends.base import BLOCK_SIZE, Device, ObjectStore
from backends.memory import MemoryDevice, MemoryStore
from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.mover import InlineMover
from pool.volume import Volume
from tests.sim.loop import run

SEED = 20240229
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Vector:
    """How an image is made: the pool's shape, and what happens to it before the crash."""

    name: str
    spec: PoolSpec
    device_bytes: int
    devices: int
    stores: int
    script: Callable[[Workshop], Awaitable[Pool]]


class _KeptStore(MemoryStore):
    """An object store that outlives the pool that uses it."""

    async def close(self) -> None:
        return

    def content(self, name: str) -> bytes:
        """All of an object."""
        return self._objects[name]


class Workshop:
    """The members of one pool, in memory, as they are between two openings."""

    def __init__(self, vector: Vector) -> None:
        self.vector = vector
        self.rng = random.Random(SEED)
        self._files = {f"device-{i}.img": _memory_file(vector) for i in range(vector.devices)}
        first = vector.devices
        self._stores = {
            f"store-{i}": _KeptStore(vector.device_bytes, url=f"dir:store-{i}")
            for i in range(first, first + vector.stores)
        }

    def names(self) -> list[str]:
        """Names of all members, in the order of their indices."""
        return [*self._files, *self._stores]

    def member(self, name: str) -> Device | ObjectStore:
        """One member, opened."""
        if name in self._stores:
            return self._stores[name]
        size, fd = self.vector.device_bytes, os.dup(self._files[name])
        return MemoryDevice(size, url=f"file:{name}", fd=fd)

    async def create(self) -> None:
        """Make the pool."""
        members = [MemberSpec(self.member(name)) for name in self.names()]
        await create_pool(self.vector.spec, members, rng=self.rng)
        for member in members:
            await member.backend.close()

    async def open(self, *, without: int = -1) -> Pool:
        """Open the pool, perhaps without one member."""
        backends = [self.member(name) for i, name in enumerate(self.names()) if i != without]
        return await Pool.open(
            backends, mover=InlineMover(), rng=self.rng, now=lambda: 1709164800.0
        )

    async def pack(self, archive: Path) -> None:
        """Store what the members hold now: a file per device, a file per object."""
        files = {
            name: os.pread(fd, self.vector.device_bytes, 0) for name, fd in self._files.items()
        }
        for name, store in self._stores.items():
            for key in await store.list():
                files[f"{name}/{key}"] = store.content(key)
        with tarfile.open(archive, "x:xz", format=tarfile.USTAR_FORMAT) as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _memory_file(vector: Vector) -> int:
    fd = os.memfd_create(vector.name)
    os.ftruncate(fd, vector.device_bytes)
    return fd


def content(tag: str, block: int) -> bytes:
    """A block that differs from all others and compresses well."""
    return hashlib.blake2b(f"{tag}/{block}".encode(), digest_size=16).digest() * (BLOCK_SIZE // 16)


async def fill(volume: Volume, tag: str, first: int, count: int) -> None:
    """Write blocks one by one, so that each is an extent of its own."""
    for block in range(first, first + count):
        await volume.write(block * BLOCK_SIZE, memoryview(content(tag, block)))


async def small(shop: Workshop) -> Pool:
    """Both forms of leaves, holes, provisioned zeros, a deleted volume, a live journal."""
    pool = await shop.open()
    for name, size in (("alpha", 8 * MIB), ("beta", 4 * MIB), ("gone", MIB)):
        await pool.create_volume(name, size)
    alpha, beta = pool.volume("alpha"), pool.volume("beta")
    await fill(pool.volume("gone"), "gone", 0, 20)
    await fill(alpha, "first", 0, 60)
    await fill(alpha, "second", 10, 10)
    await alpha.write(12345, memoryview(b"unaligned" * 600))
    await fill(alpha, "far", 700, 20)
    await beta.write_zeroes(0, 400 * BLOCK_SIZE, no_hole=True)
    await fill(beta, "beta", 5, 3)
    await alpha.trim(30 * BLOCK_SIZE, 8 * BLOCK_SIZE)
    await pool.delete_volume("gone")
    await pool.checkpoint()
    await pool.checkpoint()
    await pool.create_volume("late", MIB)
    await alpha.write(50 * BLOCK_SIZE, memoryview(content("journal", 50)))
    await alpha.trim(52 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    await beta.write_zeroes(6 * BLOCK_SIZE, BLOCK_SIZE, no_hole=True)
    return pool


async def store(shop: Workshop) -> Pool:
    """Shards in an object store, and a batch of records that belong together."""
    pool = await shop.open()
    await pool.create_volume("alpha", 16 * MIB)
    alpha = pool.volume("alpha")
    await fill(alpha, "first", 0, 300)
    await pool.checkpoint()
    for block in range(150):
        assert alpha.try_write(2 * block * BLOCK_SIZE, memoryview(content("batch", block)))
    alpha.commit()
    return pool


async def narrow(shop: Workshop) -> Pool:
    """A device was away for a while: narrow stripes, a member that returned, three terms."""
    pool = await shop.open()
    await pool.create_volume("alpha", 8 * MIB)
    await fill(pool.volume("alpha"), "wide", 0, 40)
    await pool.close()
    pool = await shop.open(without=1)
    await fill(pool.volume("alpha"), "narrow", 20, 40)
    await pool.close()
    pool = await shop.open()
    await fill(pool.volume("alpha"), "again", 50, 4)
    return pool


async def many(shop: Workshop) -> Pool:
    """So many volumes that the top page has two parts."""
    pool = await shop.open()
    await pool.create_volume("alpha", MIB)
    for number in range(140):
        await pool.create_volume(f"{number:03}".ljust(64, "-"), BLOCK_SIZE)
    await fill(pool.volume("alpha"), "many", 0, 10)
    await pool.checkpoint()
    return pool


VECTORS = [
    Vector("small", PoolSpec("small", 2, 1, 16 * KIB, 64 * KIB), 3 * MIB, 3, 0, small),
    Vector("store", PoolSpec("store", 2, 1, 64 * KIB, 2 * MIB), 6 * MIB, 3, 1, store),
    Vector("narrow", PoolSpec("narrow", 2, 1, 16 * KIB, 64 * KIB), 2 * MIB, 3, 0, narrow),
    Vector("many", PoolSpec("many", 2, 1, 16 * KIB, 64 * KIB), 2 * MIB, 3, 0, many),
]


async def make(vector: Vector, archive: Path) -> None:
    """Run a vector's script, then store what its members hold and what its volumes are."""
    shop = Workshop(vector)
    await shop.create()
    pool = await vector.script(shop)
    await pool.volume("alpha").flush()
    await shop.pack(archive)
    volumes = {}
    for info in pool.volumes():
        whole = bytearray(info.size)
        await pool.volume(info.name).read(0, memoryview(whole))
        volumes[info.name] = {"size": info.size, "sha256": hashlib.sha256(whole).hexdigest()}
    manifest = {"members": shop.names(), "volumes": volumes}
    archive.with_suffix("").with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")
    await pool.close()


def main() -> None:
    """Make all vectors that are not there yet."""
    target = Path(sys.argv[1])
    for vector in VECTORS:
        archive = target / f"revision-1-{vector.name}.tar.xz"
        if archive.exists():
            print(f"{archive} exists: golden images are never replaced")
            continue
        run(make(vector, archive))
        print(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
