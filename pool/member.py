"""A member of the pool: a backend, its place in the pool and what is known of its health."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backends.base import BLOCK_SIZE, Device, DeviceError, ObjectStore
from pool.errors import BadSuperblock, FormatError
from pool.failpoints import reached
from pool.format import superblock
from pool.format.geometry import Layout
from pool.format.superblock import HostileRoot, Superblock
from pool.shards import Shards, shards_of
from pool.slots import FreeSlots

#: Root slots of an object store.
ROOT_NAMES = ("root-a", "root-b")
#: Sizes that a root slot can have; a reader that finds the first slot damaged tries them all.
ROOT_SIZES = (64 << 10, 256 << 10)


class MemberState(StrEnum):
    """What the committed root says of a member."""

    ACTIVE = "active"
    #: It failed or was absent. It is not written; what it holds is used again when it returns
    #: (R24).
    GONE = "gone"


@dataclass(slots=True)
class Member:
    """One device or store. `backend` is None while it is absent."""

    index: int
    uuid: bytes
    url: str
    layout: Layout
    state: MemberState
    slots: FreeSlots
    labels: dict[str, str] = field(default_factory=dict)
    journal: bool = False
    backend: Device | ObjectStore | None = None
    shards: Shards | None = None
    #: Why the root says that it is gone.
    reason: str = ""
    #: What was found of it when the pool was opened, if it was absent; never stored.
    finding: str = ""
    #: Its storage ran out of room below its nominal size: only slots that were written before.
    full: bool = False
    #: It returned and may lack shards that the table places on it; the root says so until it has
    #: caught up (R24).
    missed: bool = False
    #: The root slot (0 or 1) that holds the last committed generation; never overwritten.
    committed_slot: int = 0
    errors: int = 0
    repaired: int = 0

    def attach(self, backend: Device | ObjectStore) -> None:
        """Give an absent member its backend."""
        self.backend = backend
        self.shards = shards_of(backend, self.layout)
        self.url = backend.url

    @property
    def present(self) -> bool:
        return self.backend is not None and self.state is MemberState.ACTIVE

    @property
    def trouble(self) -> str:
        """Why it is not there, in one line; what is true now before what the root says."""
        return self.finding or self.reason

    @property
    def journal_capable(self) -> bool:
        return self.present and self.layout.journal_bytes > 0 and isinstance(self.backend, Device)

    @property
    def room(self) -> int:
        """Slots that may take a new shard."""
        return self.slots.spare if self.full else self.slots.free

    @property
    def domain(self) -> str:
        """The failure domain it belongs to; by default it is its own."""
        return self.labels.get("host", f"device-{self.index}")

    def to_json(self) -> dict[str, Any]:
        """The member as the root keeps it."""
        where = self.layout
        missed = {"missed": True} if self.missed else {}
        return missed | {
            "index": self.index,
            "uuid": self.uuid.hex(),
            "url": self.url,
            "state": str(self.state),
            "reason": self.reason,
            "class": "journal" if self.journal else "data",
            "labels": self.labels,
            "size": where.size,
            "root_bytes": where.root_bytes,
            "journal_offset": where.journal_offset,
            "journal_bytes": where.journal_bytes,
            "slots_offset": where.slots_offset,
            "slot_blocks": where.slot_blocks,
            "slots": where.slots,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Member:
        """Inverse of `to_json`, without a backend. Raises FormatError."""
        try:
            layout = Layout(
                row["size"], row["root_bytes"], row["journal_offset"], row["journal_bytes"],
                row["slots_offset"], row["slot_blocks"], row["slots"],
            )  # fmt: skip
            return cls(
                row["index"], bytes.fromhex(row["uuid"]), row["url"], layout,
                MemberState(row["state"]), FreeSlots(layout.slots), dict(row["labels"]),
                row["class"] == "journal", reason=row.get("reason", ""),
                missed=bool(row.get("missed")),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"member in the root is damaged: {error}") from error

    def superblock(self, root: dict[str, Any], pool: bytes) -> bytes:
        """The bytes of a root slot. Raises PoolError if the root outgrew it."""
        return superblock.encode(
            root, pool=pool, device=self.uuid, index=self.index, where=self.layout
        )

    async def write_root(self, root: dict[str, Any], pool: bytes) -> int:
        """Write a root into the slot that does not hold the last committed one, and sync. Returns
        the slot. Raises DeviceError, PoolError."""
        assert self.backend is not None
        image = self.superblock(root, pool)
        slot = 1 - self.committed_slot
        if not isinstance(self.backend, Device):
            await self.backend.put(ROOT_NAMES[slot], [image])
            return slot
        image += bytes(-len(image) % BLOCK_SIZE)
        front, end = self.layout.root_offsets(slot)
        await self.backend.write(front, [image])
        reached("root_after_front_before_end")
        await self.backend.write(end, [image])
        await self.backend.sync()
        return slot


async def read_superblocks(backend: Device | ObjectStore) -> list[tuple[int, Superblock]]:
    """All valid superblocks of a backend as (slot, superblock), newest first.

    Raises PoolError if it holds a newer revision, BadSuperblock if it holds ours and nothing valid,
    or a newer one that makes no sense; DeviceError."""
    images = await (
        _device_images(backend) if isinstance(backend, Device) else _store_images(backend)
    )
    found: dict[tuple[int, str], tuple[int, Superblock]] = {}
    damaged = False
    hostile: HostileRoot | None = None
    for slot, image in images:
        try:
            block = superblock.decode(image)
        except HostileRoot as error:
            if hostile is None or error.generation > hostile.generation:
                hostile = error
            continue
        except FormatError:
            damaged = damaged or image[:8] == superblock.MAGIC
            continue
        found[(block.generation, block.digest)] = (slot, block)
    newest = max((generation for generation, _ in found), default=0)
    if hostile is not None and hostile.generation > newest:
        # An older root must not take the place of one that may have been the pool's.
        raise BadSuperblock(
            f"{backend.url}: its superblock of generation {hostile.generation} makes no sense "
            f"({hostile}): leave it out",
            hostile.generation,
        )
    if not found and damaged:
        raise BadSuperblock(
            f"{backend.url}: it belongs to a stripewell pool, but no whole superblock is left on "
            "it: leave it out"
        )
    return [found[key] for key in sorted(found, reverse=True)]


async def _device_images(device: Device) -> list[tuple[int, bytes]]:
    images = []
    for size in ROOT_SIZES:
        for offset, slot in (
            (0, 0),
            (size, 1),
            (device.size - 2 * size, 0),
            (device.size - size, 1),
        ):
            if offset >= 0 and offset + size <= device.size:
                try:
                    images.append((slot, await device.read(offset, size)))
                except DeviceError:
                    if not images and offset == 0:
                        # One bad place must not hide the other copies.
                        images.append((slot, b""))
    if not any(image for _, image in images):
        raise DeviceError(5, f"{device.url}: its superblocks cannot be read")
    return images


async def _store_images(store: ObjectStore) -> list[tuple[int, bytes]]:
    images = []
    failure: DeviceError | None = None
    names = await store.list("root-")
    for slot, name in enumerate(ROOT_NAMES):
        if name not in names:
            continue
        try:
            head = await store.get(name, 0, superblock.HEAD_BYTES)
            length = superblock.body_length(head)
            images.append((slot, await store.get(name, 0, superblock.HEAD_BYTES + length)))
        except DeviceError as error:
            # One bad object must not hide the other.
            failure = error
    if failure is not None and not images:
        raise failure
    return images
