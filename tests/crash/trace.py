"""Power loss under real processes: what they wrote and synced, and what a disk may have kept.

`TracedDevice` notes each write before it is made and after it, and each sync likewise, in a file of
its process; a process that is killed leaves the notes in the page cache, as it leaves its writes.
`Disk` reads the notes of daemon and worker together (their clock is the system's) and knows which
writes a power failure may undo: those that were not over when the last answered sync began.
`Disk.lose` puts the file into a state in which the disk may be found.

Invariant: everybody who writes to the file notes it. No write is believed to be durable earlier
than the engine itself may believe it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from backends.base import Buffer, Device, WorkerSpec
from backends.url import parse_url

SECTOR = 512
BLOCK = 4096
#: Milliseconds that a sync may take longer than the file system needs: more is outstanding then.
SLOWEST = 20

#: Kind, number of the write or sync in its file, time, offset and length of what was written.
NOTE = struct.Struct("<BQQQQ")
WRITE, WRITTEN, DURABLE, SYNCING, SYNCED = range(1, 6)

_files = itertools.count()


class Recorder:
    """Appends notes to a file of its own, to the end of the process. One thread calls it."""

    def __init__(self, folder: Path, url: str) -> None:
        name = f"{Path(parse_url(url).path).name}.{os.getpid()}.{next(_files)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(folder / name, flags)
        self._numbers = itertools.count()

    def begin(self, kind: int, offset: int = 0, buffers: Sequence[Buffer] = ()) -> int:
        """Note that something begins; returns its number for `end`."""
        number = next(self._numbers)
        data = b"".join(buffers)
        os.write(self._fd, NOTE.pack(kind, number, time.monotonic_ns(), offset, len(data)) + data)
        return number

    def end(self, kind: int, number: int) -> None:
        """Note that it succeeded."""
        os.write(self._fd, NOTE.pack(kind, number, time.monotonic_ns(), 0, 0))


class TracedDevice:
    """Implements `backends.base.Device` around one in a file."""

    def __init__(self, inner: Device, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self._rng = Random(time.monotonic_ns())
        self.read = inner.read
        self.try_read = inner.try_read

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def size(self) -> int:
        return self._inner.size

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        number = self._recorder.begin(WRITE, offset, buffers)
        if sync:
            await asyncio.sleep(self._rng.uniform(0, SLOWEST / 1000))
        await self._inner.write(offset, buffers, sync=sync)
        self._recorder.end(DURABLE if sync else WRITTEN, number)

    async def sync(self) -> None:
        number = self._recorder.begin(SYNCING)
        await asyncio.sleep(self._rng.uniform(0, SLOWEST / 1000))
        await self._inner.sync()
        self._recorder.end(SYNCED, number)

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        number = self._recorder.begin(WRITE, offset, buffers)
        self._inner.append(offset, buffers)
        self._recorder.end(WRITTEN, number)

    def worker_spec(self) -> WorkerSpec:
        return self._inner.worker_spec()

    async def close(self) -> None:
        await self._inner.close()


@dataclass(slots=True, eq=False)
class Write:
    """A write that some process began. `over`: when all of it was in the file, if it is known."""

    begun: int
    offset: int
    data: bytes
    over: int | None = None
    durable: bool = False


@dataclass(slots=True)
class Note:
    """One entry of a trace; `what` names the write or sync among all processes."""

    kind: int
    what: tuple[str, int]
    time: int
    offset: int
    data: bytes


def read_notes(path: Path) -> Iterator[Note]:
    """The whole notes of a file; one that the process died over was not followed by its write."""
    image = path.read_bytes()
    at = 0
    while at + NOTE.size <= len(image):
        kind, number, when, offset, length = NOTE.unpack_from(image, at)
        at += NOTE.size
        if at + length > len(image):
            return
        yield Note(kind, (path.name, number), when, offset, image[at : at + length])
        at += length


class Disk:
    """A device file and what of it is durable. Made while nobody writes to the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._image = path.with_name(f"{path.name}.durable")
        #: All writes from the first one on that is not durable, in the order they were begun.
        self._writes: list[Write] = []
        copy_sparse(path, self._image)

    @property
    def unsynced(self) -> int:
        """How many writes a power failure may undo."""
        return sum(not write.durable for write in self._writes)

    def process_ended(self, folder: Path) -> None:
        """Take the notes of processes that are dead now."""
        notes = [n for p in folder.glob(f"{self.path.name}.*") for n in read_notes(p)]
        self._follow(sorted(notes, key=lambda note: note.time))
        for write in self._writes:
            if write.over is None:
                # The kernel has some of it, and will sync that for whoever syncs next.
                with open(self.path, "rb") as file:
                    write.data = os.pread(file.fileno(), len(write.data), write.offset)
                write.over = time.monotonic_ns()
        self._shorten()

    def _follow(self, notes: Sequence[Note]) -> None:
        writes: dict[tuple[str, int], Write] = {}
        syncs: dict[tuple[str, int], int] = {}
        for note in notes:
            match note.kind:
                case kind if kind == WRITE:
                    writes[note.what] = Write(note.time, note.offset, note.data)
                    self._writes.append(writes[note.what])
                case kind if kind == SYNCING:
                    syncs[note.what] = note.time
                case kind if kind == SYNCED:
                    self._synced(syncs.pop(note.what))
                case kind:
                    writes[note.what].over = note.time
                    writes[note.what].durable = kind == DURABLE

    def _synced(self, begun: int) -> None:
        for write in self._writes:
            if write.over is not None and write.over <= begun:
                write.durable = True
        self._shorten()

    def _shorten(self) -> None:
        """Put what is durable for good into the image."""
        first = next((i for i, w in enumerate(self._writes) if not w.durable), len(self._writes))
        if first:
            with open(self._image, "r+b") as image:
                for write in self._writes[:first]:
                    os.pwrite(image.fileno(), write.data, write.offset)
            del self._writes[:first]

    def lose(self, rng: Random) -> Counter[str]:
        """The power fails: decide each unsynced write's fate. Returns how often which."""
        fates: Counter[str] = Counter()
        if not self._writes:
            return fates  # nobody wrote; the file may even be away
        bias = rng.choice((0.1, 0.5, 0.9))
        with open(self._image, "r+b") as image, open(self.path, "r+b") as file:
            for write in self._writes:
                old = os.pread(image.fileno(), len(write.data), write.offset)
                os.pwrite(file.fileno(), old, write.offset)
            for write in self._writes:
                fate = "durable" if write.durable else draw_fate(rng, bias)
                fates[fate] += 1
                for at, piece in pieces(write.data, fate, rng):
                    for target in (image, file):
                        os.pwrite(target.fileno(), piece, write.offset + at)
        self._writes.clear()
        del fates["durable"]
        return fates


def draw_fate(rng: Random, bias: float) -> str:
    """What becomes of an unsynced write: "kept" with a chance of `bias`, "lost" or "torn"."""
    return "kept" if rng.random() < bias else rng.choice(("lost", "torn"))


def pieces(data: bytes, fate: str, rng: Random) -> Iterator[tuple[int, bytes]]:
    """What of a write the disk has: offsets and bytes."""
    if fate in ("durable", "kept"):
        yield 0, data
    elif fate == "torn":
        unit = rng.choice((SECTOR, BLOCK))
        for at in range(0, len(data), unit):
            if rng.random() < 0.5:
                yield at, data[at : at + unit]


class Power:
    """The power of a host whose devices are files.

    power = Power(folder, paths)
    ... Plan(trace=power.next_life()) ...; all processes are dead
    fates = power.fail(rng)
    """

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder = folder
        self._lives = 0
        self.disks = [Disk(path) for path in paths]

    def next_life(self) -> Path:
        """A directory for the notes of the next daemon and its worker."""
        life = self._life()
        life.mkdir(parents=True)
        return life

    def life_ended(self) -> None:
        """Daemon and worker are dead, the power is on."""
        life = self._life()
        for disk in self.disks:
            disk.process_ended(life)
        shutil.rmtree(life)
        self._lives += 1

    def fail(self, rng: Random) -> Counter[str]:
        """Daemon and worker are dead because the power failed."""
        self.life_ended()
        fates: Counter[str] = Counter()
        for disk in self.disks:
            fates += disk.lose(rng)
        return fates

    def _life(self) -> Path:
        return self._folder / f"life{self._lives}"


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
