"""One trial of the engine on spoilt images: what it may do, and what it must not.

It opens and serves right bytes or EIO, or it refuses with one line. It never raises anything else,
never changes a device that it refuses or only reads, and needs little memory and time. Wrong bytes
are judged for damage only: a forged structure may say what it likes about the data.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.base import BLOCK_SIZE
from pool import Pool, PoolError
from pool.placement import NoSpace
from pool.volume import Volume
from tests.fuzz.images import Images, Sample, copied, disks
from tests.fuzz.mutations import damage, forge
from tests.sim.loop import run
from tests.unit.pool.support import MIB, open_pool

#: More than any of the small pools may need on top of what the process has.
MEMORY = 192 * MIB
#: Seconds of the processor for one trial. Usual is a tenth.
SECONDS = 20.0
#: Of a journal that lost its last records nobody can tell, if all its replicas did.
JOURNAL = "journal"
PIECE = 64 << 10


Work = Callable[[Sample, "Spoilt"], Coroutine[Any, Any, str]]


@dataclass(slots=True)
class Spoilt:
    """Images after a mutation, and what it was."""

    images: Images
    what: str
    forged: bool
    #: Devices that are not as they were.
    hit: set[str]

    @property
    def within_budget(self) -> bool:
        """Damage that parity makes good: nothing may be missing."""
        return not self.forged and len(self.hit) <= 1


def spoil(sample: Sample, seed: int, *, forged: bool) -> Spoilt:
    """One random mutation of a sound pool."""
    images, rng = copied(sample.images), random.Random(seed)
    what = forge(images, rng) if forged else damage(images, rng, sample.older)
    hit = {n for n in sample.images.keys() | images.keys() if sample.images.get(n) != images.get(n)}
    return Spoilt(images, f"seed {seed}: {what}", forged, hit)


@contextmanager
def bounded() -> Iterator[None]:
    """Little memory and time: more is a MemoryError, or a failure."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - began < SECONDS


def attempt(work: Work, sample: Sample, spoilt: Spoilt, *, reading: bool) -> str:
    """Do something with the images; returns how it ended: what `work` says, or `refused`."""
    before = copied(spoilt.images)
    try:
        with bounded():
            ending = run(work(sample, spoilt))
    except (PoolError, OSError) as error:
        text = str(error)
        assert text, spoilt.what
        assert "\n" not in text, spoilt.what
        assert len(text) < 1000, spoilt.what
        assert spoilt.images == before, f"{spoilt.what}: refused, and changed a device"
        return "refused"
    except BaseException as error:
        error.add_note(spoilt.what)
        raise
    if reading:
        assert spoilt.images == before, f"{spoilt.what}: a device was changed"
    return ending


async def read_all(pool: Pool, sample: Sample, spoilt: Spoilt) -> int:
    """Read every block of every volume; returns how many are errors. Right ones are right."""
    errors = 0
    for info in pool.volumes():
        volume, known = pool.volume(info.name), sample.volumes.get(info.name)
        judged = not spoilt.forged and JOURNAL not in spoilt.what and known is not None
        for start in range(0, min(volume.size, 4 * MIB), PIECE):
            size = PIECE
            offset = start
            while offset < start + PIECE:
                found = await _read(volume, offset, size)
                if found is None and size > BLOCK_SIZE:
                    size = BLOCK_SIZE  # find out which block it is
                    continue
                errors += found is None
                if judged and found is not None and known is not None:
                    right = known[offset : offset + size]
                    assert found == right, f"{spoilt.what}: {info.name} at {offset} is wrong"
                offset += size
    return errors


async def _read(volume: Volume, offset: int, size: int) -> bytes | None:
    """Bytes of a volume; None if they are an error."""
    into = bytearray(size)
    try:
        await volume.read(offset, memoryview(into))
    except OSError:
        return None
    return bytes(into)


async def look(sample: Sample, spoilt: Spoilt) -> str:
    """Open for reading: status, check, all bytes."""
    pool = await open_pool(disks(spoilt.images), read_only=True)
    try:
        assert pool.status()["state"]
        faults = await pool.check()
        assert all("\n" not in line for line in faults)
        errors = await read_all(pool, sample, spoilt)
        assert not (spoilt.within_budget and errors)
        return "faults" if faults else "clean"
    finally:
        await pool.close()


async def serve(sample: Sample, spoilt: Spoilt) -> str:
    """Open for writing and use it; what happens must be an error with a reason, if it is one."""
    pool = await open_pool(disks(spoilt.images))
    state = pool.engine.state
    try:
        errors = await read_all(pool, sample, spoilt)
        assert not (spoilt.within_budget and errors)
        await _use(pool)
    except (PoolError, NoSpace, OSError):
        assert not spoilt.within_budget
    finally:
        await pool.check()
        assert pool.status()["state"]
        await pool.close()
    assert "internal error" not in state.stopped, state.stopped
    return "stopped" if state.stopped else "served"


async def _use(pool: Pool) -> None:
    """Write, flush, trim, make and delete volumes, write checkpoints."""
    for info in pool.volumes()[:3]:
        volume = pool.volume(info.name)
        size = min(volume.size, 4 * MIB)
        for offset in range(0, size, size // 8 // BLOCK_SIZE * BLOCK_SIZE or BLOCK_SIZE):
            await volume.write(offset, memoryview(b"anew" * 1024))
        await volume.trim(0, size // 2)
        await volume.flush()
    await pool.create_volume("anew", MIB)
    await pool.checkpoint()
    await asyncio.sleep(1)
    for info in pool.volumes()[:1]:
        await pool.delete_volume(info.name)
    await asyncio.sleep(1)
    await pool.checkpoint()
