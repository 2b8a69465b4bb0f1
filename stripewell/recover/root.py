"""The root's content ("Root" and "Stripe" in `docs/format.md`), checked field by field. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from stripewell.recover.values import (
    POSITIONS,
    U16,
    U32,
    U64,
    Unusable,
    integer,
    mapping,
    sequence,
    text,
)

BLOCK = 4096
MAX_DATA = 32
MAX_PARITY = 8
#: Slots of 64 MiB: the format's largest.
MAX_SLOT_BLOCKS = 1 << 14
#: Offsets that a 64-bit file can have.
_OFFSETS = (1 << 63) - 1


class Pointer(NamedTuple):
    """Where a page is: bytes of a stripe's data, and their checksum."""

    stripe: int
    offset: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Row:
    """Where a stripe is: its shape, and (member, slot) of each shard."""

    stripe: int
    data: int
    parity: int
    header_blocks: int
    shard_blocks: int
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A device as the root knows it."""

    index: int
    uuid: str
    url: str
    active: bool
    #: Why it is not, in the words of the pool that let it go.
    reason: str
    slots_offset: int


@dataclass(frozen=True, slots=True)
class Replica:
    """Where a copy of the journal is, and whether it may lack what was synced."""

    member: int
    offset: int
    behind: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """The journal, and the position of the checkpoint in it."""

    blocks: int
    replicas: tuple[Replica, ...]
    replay: int
    version: int
    previous: int
    durable: int
    #: Term of the root: records behind the end of the chain count from it on.
    term: int


@dataclass(frozen=True, slots=True)
class Root:
    """The commit point: who belongs to the pool, and where everything is."""

    name: str
    generation: int
    data: int
    parity: int
    slot_blocks: int
    members: dict[int, Member]
    stream: Stream
    top: tuple[Pointer, ...]
    anchors: tuple[Row, ...]

    def active(self) -> set[int]:
        """Indices of the members that count."""
        return {member.index for member in self.members.values() if member.active}


def parse_root(body: dict[str, Any]) -> Root:
    """Raises Unusable, naming the field."""
    code = mapping(body.get("code"), "code")
    checkpoint = mapping(body.get("checkpoint"), "checkpoint")
    slot_blocks = integer(code.get("slot_blocks"), "code.slot_blocks", MAX_SLOT_BLOCKS, 2)
    members = _members(body.get("members"), slot_blocks)
    anchors = sequence(checkpoint.get("anchors"), "checkpoint.anchors")
    return Root(
        text(body.get("name"), "name"),
        integer(body.get("generation"), "generation", U64),
        integer(code.get("data"), "code.data", MAX_DATA, 1),
        integer(code.get("parity"), "code.parity", MAX_PARITY, 1),
        slot_blocks,
        members,
        _stream(body, members),
        tuple(parse_pointer(p) for p in sequence(checkpoint.get("top"), "checkpoint.top")),
        tuple(_anchor(row, slot_blocks) for row in anchors),
    )


def parse_pointer(value: Sequence[object]) -> Pointer:
    """A pointer of four numbers. Raises Unusable."""
    stripe, offset, length, crc = sequence(value, "a pointer", 4)
    return Pointer(
        integer(stripe, "a pointer's stripe", U64),
        integer(offset, "a pointer's offset", U32),
        integer(length, "a pointer's length", U32),
        integer(crc, "a pointer's checksum", U32),
    )


def quorum(root: Root) -> int:
    """On how many members a root must be to be committed ("Which root counts")."""
    return max(root.parity + 1, len(root.active()) // 2 + 1)


@lru_cache(4096)
def fits(data: int, parity: int, header_blocks: int, shard_blocks: int, slot_blocks: int) -> bool:
    """Whether a stripe can have that shape: the header is as small as its tables allow."""
    if not (1 <= data <= MAX_DATA and 1 <= parity <= MAX_PARITY):
        return False
    if header_blocks < 1 or shard_blocks < 1 or header_blocks + shard_blocks > slot_blocks:
        return False

    def holds(header: int) -> bool:
        per_block = 20 * data + 4 * (data + parity)
        return 128 + (header_blocks + shard_blocks - header) * per_block <= BLOCK * header

    return holds(header_blocks) and not (header_blocks > 1 and holds(header_blocks - 1))


def _members(value: object, slot_blocks: int) -> dict[int, Member]:
    found: dict[int, Member] = {}
    for row in sequence(value, "members"):
        member = _member(mapping(row, "a member"), slot_blocks)
        if member.index in found or any(other.uuid == member.uuid for other in found.values()):
            raise Unusable(f"member {member.index} is there twice")
        found[member.index] = member
    if not found:
        raise Unusable("members is empty")
    return found


def _member(row: dict[str, Any], slot_blocks: int) -> Member:
    index = integer(row.get("index"), "a member's index", U16 - 1)
    where = f"slot_blocks of member {index}"
    reason = row.get("reason")
    integer(row.get("slot_blocks"), where, slot_blocks, slot_blocks)
    return Member(
        index,
        text(row.get("uuid"), f"uuid of member {index}"),
        text(row.get("url"), f"url of member {index}"),
        text(row.get("state"), f"state of member {index}") == "active",
        reason if isinstance(reason, str) else "",
        integer(row.get("slots_offset"), f"slots_offset of member {index}", _OFFSETS),
    )


def _stream(body: dict[str, Any], members: dict[int, Member]) -> Stream:
    [only] = sequence(body.get("streams"), "streams", 1)
    row = mapping(only, "a stream")
    replicas = tuple(
        _replica(mapping(replica, "a replica"), members)
        for replica in sequence(row.get("replicas"), "replicas")
    )
    if len({replica.member for replica in replicas}) < len(replicas):
        raise Unusable("a journal replica is there twice")
    return Stream(
        integer(row.get("blocks"), "the journal's blocks", U32, 1),
        replicas,
        integer(row.get("replay"), "replay", POSITIONS),
        integer(row.get("version"), "version", U64),
        integer(row.get("previous"), "previous", U32),
        integer(row.get("durable"), "durable", POSITIONS),
        integer(body.get("term"), "term", U32),
    )


def _replica(row: dict[str, Any], members: dict[int, Member]) -> Replica:
    member = integer(row.get("member"), "a replica's member", U16 - 1)
    if member not in members:
        raise Unusable(f"a journal replica is on member {member}, which does not exist")
    offset = integer(row.get("offset"), "a replica's offset", _OFFSETS)
    if offset % BLOCK:
        raise Unusable("a replica's offset is between blocks")
    return Replica(member, offset, row.get("behind") is True)


def _anchor(value: object, slot_blocks: int) -> Row:
    stripe, _, data, parity, header, shard, _, flat = sequence(value, "an anchor", 8)
    k, m, header_blocks, shard_blocks = (
        integer(number, "an anchor's shape", U16) for number in (data, parity, header, shard)
    )
    if not fits(k, m, header_blocks, shard_blocks, slot_blocks):
        raise Unusable("an anchor has an impossible shape")
    numbers = sequence(flat, "an anchor's places", 2 * (k + m))
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    places = tuple(
        (integer(device, "an anchor's device", U16), integer(slot, "an anchor's slot", U32))
        for device, slot in pairs
    )
    number = integer(stripe, "an anchor's stripe", U64)
    return Row(number, k, m, header_blocks, shard_blocks, places)
