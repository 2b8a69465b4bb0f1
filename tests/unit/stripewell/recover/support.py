"""What the tests of recover share: remains of images in memory, and volumes restored to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.base import Device, ObjectStore
from stripewell.recover.remains import Finding, Remains, assemble
from stripewell.recover.restore import restore
from stripewell.recover.sources import Source, find_superblocks
from tests.fuzz.images import Images, disks


@dataclass(slots=True)
class Memory:
    """A sink that keeps the pieces: a volume may claim any size."""

    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = -1

    def write(self, offset: int, data: memoryview) -> None:
        assert not self.pieces or offset >= self.pieces[-1][0] + len(self.pieces[-1][1])
        self.pieces.append((offset, bytes(data)))

    def finish(self, size: int) -> None:
        self.size = size

    def abandon(self) -> None:
        self.pieces = []

    def content(self, size: int) -> bytes:
        whole = bytearray(size)
        for offset, data in self.pieces:
            whole[offset : offset + len(data)] = data
        assert len(whole) == size
        return bytes(whole)


async def examine_backends(
    backends: Sequence[Device | ObjectStore],
    generation: int | None = None,
    digest: str | None = None,
) -> Remains:
    """What is left on open backends. Raises UserError."""
    sources = [Source(backend.url, backend) for backend in backends]
    for source in sources:
        await find_superblocks(source)
    return await assemble(sources, generation, digest)


async def examine(
    images: Images, generation: int | None = None, digest: str | None = None
) -> Remains:
    """What is left on images. Raises UserError."""
    return await examine_backends([disk.open() for disk in disks(images)], generation, digest)


def quiet(done: int, total: int) -> None:
    """Nobody looks at the progress."""


async def restored(remains: Remains, name: str) -> tuple[bytes, Finding]:
    """A volume's bytes, zeros where blocks are lost, and what the command would say of them."""
    volume = remains.volume(name)
    sink = Memory()
    finding = await restore(remains, volume, sink, quiet)
    return sink.content(volume.size), finding


async def everything(remains: Remains) -> dict[str, bytes]:
    """All volumes, of which nothing may be lost."""
    found = {}
    for name in remains.catalog.volumes:
        found[name], finding = await restored(remains, name)
        assert not finding.lost.blocks
    return found
