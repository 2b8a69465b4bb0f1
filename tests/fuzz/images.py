"""Small pools as device images in memory, made by the real engine and left as a crash leaves them.

`build` gives a `Sample`: the images, the same devices some time before (for old copies), and what
each volume must read as. `copied` before each mutation (`tests.fuzz.mutations`); `disks` opens the
images for the engine, `write_files` puts them where commands find them.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from backends.base import BLOCK_SIZE
from pool import Pool
from pool.destage import destage
from pool.volume import Volume
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, make_pool, open_pool

#: A pool's devices by name, in the order of their indices.
Images = dict[str, bytearray]


@dataclass(frozen=True, slots=True)
class Sample:
    """A pool that crashed. `older` is it some time before, `volumes` what it holds now, `history`
    what it held after each operation since the checkpoint; the last of it is `volumes`."""

    images: Images
    older: Images
    history: list[dict[str, bytes]]

    @property
    def volumes(self) -> dict[str, bytes]:
        return self.history[-1]


def copied(images: Images) -> Images:
    """Images that may be spoilt."""
    return {name: bytearray(image) for name, image in images.items()}


def disks(images: Images) -> list[Disk]:
    """The images as media for the engine, which share their bytes."""
    media = []
    for name, image in images.items():
        disk = Disk(name, 0)
        disk.data = image
        media.append(disk)
    return media


def write_files(images: Images, directory: Path) -> list[str]:
    """Store the images as files; returns their URLs."""
    paths = [directory / f"{name}.img" for name in images]
    for path, image in zip(paths, images.values(), strict=True):
        path.write_bytes(image)
    return [f"file://{path}" for path in paths]


async def contents(pool: Pool) -> dict[str, bytes]:
    """What every volume reads as."""
    found = {}
    for info in pool.volumes():
        whole = bytearray(info.size)
        await pool.volume(info.name).read(0, memoryview(whole))
        found[info.name] = bytes(whole)
    return found


async def build(
    rng: random.Random,
    *,
    devices: int = 4,
    data: int = 2,
    parity: int = 1,
    device_bytes: int = 3 * MIB // 2,
    steps: int = 40,
    flushed: bool = True,
) -> Sample:
    """A pool after a random life: several volumes, trims, zeroes, deletes, checkpoints, a reopening
    and a crash with a full journal. All of its structures are there. Without `flushed` the end of
    the journal may be on one replica only."""
    media = make_disks(devices, device_bytes)
    await make_pool(media, data, parity, journal=256 * KIB)
    pool = await open_pool(media, seed=rng.getrandbits(32))
    for name in ("alpha", "beta", "gone"):
        await pool.create_volume(name, rng.choice((MIB, 3 * MIB)))
    await _live(pool, rng, steps)
    await pool.delete_volume("gone")
    await pool.checkpoint()
    older = _snapshot(media)
    await _live(pool, rng, steps)
    await pool.close()
    pool = await open_pool(media, seed=rng.getrandbits(32))
    await _live(pool, rng, steps // 2)
    await pool.checkpoint()
    history = [await contents(pool)]
    history += [await contents(pool) async for _ in _fill_journal(pool, rng)]
    if flushed:
        await pool.volume("alpha").flush()
    sample = Sample(_snapshot(media), older, history)
    await pool.close()
    return sample


def _snapshot(media: list[Disk]) -> Images:
    return {disk.name: bytearray(disk.data) for disk in media}


async def _live(pool: Pool, rng: random.Random, steps: int) -> None:
    """Random operations on random volumes."""
    for _ in range(steps):
        volume = pool.volume(rng.choice(pool.volumes()).name)
        await _operate(volume, rng)


async def _operate(volume: Volume, rng: random.Random) -> None:
    blocks = volume.size // BLOCK_SIZE
    first = rng.choice((0, blocks - 24)) + rng.randrange(20)
    count = rng.randint(1, 4)
    match rng.choices(("write", "trim", "zero", "flush"), (8, 1, 1, 1))[0]:
        case "write":
            await volume.write(first * BLOCK_SIZE, memoryview(_blocks(rng, count)))
        case "trim":
            await volume.trim(first * BLOCK_SIZE, count * BLOCK_SIZE)
        case "zero":
            await volume.write_zeroes(first * BLOCK_SIZE, count * BLOCK_SIZE, no_hole=True)
        case "flush":
            await volume.flush()


def _blocks(rng: random.Random, count: int) -> bytes:
    """Blocks unlike any others, as a rule."""
    return b"".join(rng.randbytes(16) * (BLOCK_SIZE // 16) for _ in range(count))


#: More than what follows takes, with what the journal keeps for deletes.
ROOM_BLOCKS = 24


async def _fill_journal(pool: Pool, rng: random.Random) -> AsyncIterator[None]:
    """Every kind of extent behind the last checkpoint, with nobody to pack them. Yields after each
    record."""
    assert pool.engine.maintenance is not None
    await pool.engine.maintenance.stop()
    if not pool.engine.journal.room(ROOM_BLOCKS):
        await destage(pool.engine.moving, 8, force=True)
        await pool.engine.checkpoint.write()
    await pool.create_volume("late", MIB)
    yield
    alpha, late = pool.volume("alpha"), pool.volume("late")
    await late.write(8 * BLOCK_SIZE, memoryview(_blocks(rng, 1)))
    yield
    await alpha.flush()
    await alpha.trim(2 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    yield
    await alpha.write(5 * BLOCK_SIZE, memoryview(_blocks(rng, 2)))
    yield
    await late.write_zeroes(8 * BLOCK_SIZE, BLOCK_SIZE, no_hole=True)
    yield
    await late.write(0, memoryview(_blocks(rng, 1)))
    yield
