"""What is on a simulated medium: what readers see, what is durable, and how a crash decides.

Two sparse images of 4 KiB blocks: `written`, what a read returns, and `synced`, what is certain to
survive power loss. Between them lies `unsynced`, the writes in the order in which they took effect.
On power loss each is kept, lost or torn on its own; when only the process dies, all stay. Pure:
randomness is passed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from backends.base import BLOCK_SIZE, Buffer

SECTOR = 512
ZEROS = bytes(BLOCK_SIZE)

#: Block number to content; what is not there is zeros.
Blocks = dict[int, bytes]


@dataclass(slots=True)
class Write:
    """One write: its blocks, and whether a failed sync has given up on it."""

    blocks: Blocks
    doomed: bool = False


@dataclass(slots=True)
class Image:
    """The medium of one device."""

    size: int
    written: Blocks = field(default_factory=dict)
    synced: Blocks = field(default_factory=dict)
    unsynced: list[Write] = field(default_factory=list)
    inflight: list[Write] = field(default_factory=list)

    def read(self, offset: int, length: int) -> bytes:
        """Return what a reader sees now."""
        first = offset // BLOCK_SIZE
        count = length // BLOCK_SIZE
        return b"".join([self.written.get(first + i, ZEROS) for i in range(count)])

    def apply(self, write: Write) -> None:
        """The write takes effect: visible to readers, not durable."""
        self.written.update(write.blocks)
        self.unsynced.append(write)

    def make_durable(self, writes: Iterable[Write]) -> None:
        """These writes, in their order, reach the medium; a doomed one never does."""
        done = {id(write) for write in writes}
        for write in self.unsynced:
            if id(write) in done and not write.doomed:
                self.synced.update(write.blocks)
        self.unsynced = [w for w in self.unsynced if id(w) not in done or w.doomed]

    def make_block_durable(self, write: Write) -> None:
        """Only this write reaches the medium: older content of its blocks is superseded."""
        position = next(i for i, other in enumerate(self.unsynced) if other is write)
        for older in self.unsynced[:position]:
            for number in write.blocks:
                older.blocks.pop(number, None)
        self.make_durable([write])

    def fail_sync(self, rng: Random) -> None:
        """A sync failed: each unsynced write may never become durable, visible or evicted."""
        for write in self.unsynced:
            write.doomed = write.doomed or rng.random() < 0.5
        if rng.random() < 0.5:
            self._evict_doomed()

    def kill(self, rng: Random) -> None:
        """The process dies: what was written stays; a write in flight got somewhere, or nowhere."""
        self._cut_inflight(rng)
        self._evict_doomed()

    def lose_power(self, rng: Random, fate: str | None = None) -> None:
        """Decide about every unsynced write; `fate` ("kept", "lost", "torn") decides for all."""
        self._cut_inflight(rng)
        for write in self.unsynced:
            self._decide(write, rng, fate or rng.choice(("kept", "lost", "torn")))
        self.unsynced.clear()
        self.written = self.synced.copy()

    def flip(self, offset: int, mask: int) -> None:
        """Rot on the medium: both images and what waits for a sync change at byte `offset`."""
        number, position = divmod(offset, BLOCK_SIZE)
        waiting = [write.blocks for write in self.unsynced if number in write.blocks]
        for blocks in (self.written, self.synced, *waiting):
            spoiled = bytearray(blocks.get(number, ZEROS))
            spoiled[position] ^= mask
            blocks[number] = bytes(spoiled)

    def add_to(self, digest: hashlib._Hash) -> None:
        """Add all of it to a fingerprint."""
        layers = [self.written, self.synced, *(write.blocks for write in self.unsynced)]
        digest.update(f"{self.size} {len(layers)}\n".encode())
        for blocks in layers:
            for number in sorted(blocks):
                digest.update(f"{number}\n".encode() + blocks[number])

    def copy(self) -> Image:
        """Return an independent image with the same content and nothing in flight."""
        waiting = [Write(w.blocks.copy(), w.doomed) for w in self.unsynced]
        return Image(self.size, self.written.copy(), self.synced.copy(), waiting)

    def _cut_inflight(self, rng: Random) -> None:
        for write in self.inflight:
            reached = rng.randint(0, len(write.blocks))
            prefix = sorted(write.blocks)[:reached]
            self.apply(Write({number: write.blocks[number] for number in prefix}))
        self.inflight.clear()

    def _evict_doomed(self) -> None:
        self.unsynced = [write for write in self.unsynced if not write.doomed]
        self.written = self.synced.copy()
        for write in self.unsynced:
            self.written.update(write.blocks)

    def _decide(self, write: Write, rng: Random, fate: str) -> None:
        if write.doomed or fate == "lost":
            return
        if fate == "kept":
            self.synced.update(write.blocks)
            return
        grain = rng.choice((BLOCK_SIZE, SECTOR))
        for number, data in write.blocks.items():
            old = self.synced.get(number, ZEROS)
            self.synced[number] = torn(old, data, grain, rng)


def torn(old: bytes, new: bytes, grain: int, rng: Random) -> bytes:
    """Return `old` with some of its pieces of `grain` bytes replaced by those of `new`."""
    return b"".join(
        [
            (new if rng.random() < 0.5 else old)[start : start + grain]
            for start in range(0, len(new), grain)
        ]
    )


def split(offset: int, buffers: Iterable[Buffer]) -> Write:
    """Return the blocks of a write. Copies: nothing refers to the buffers afterwards."""
    data = b"".join(buffers)
    first = offset // BLOCK_SIZE
    return Write(
        {
            first + i: data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
            for i in range(len(data) // BLOCK_SIZE)
        }
    )
