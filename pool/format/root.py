"""Whether a root can be one: every key, type, range, and what its parts say of each other. Pure.

A root with right checksums that breaks a rule was not written by this engine. Nothing of it is
believed: all that is opened afterwards may rely on these rules (`docs/format.md`, "Root"). Unknown
keys are ignored, as the format wants it.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.base import BLOCK_SIZE
from pool.errors import FormatError
from pool.format.fields import Fields, number, numbers
from pool.format.geometry import (
    HEADER_FIXED,
    HEADER_PER_BLOCK,
    HEADER_PER_DATA_BLOCK,
    MAX_DATA,
    MAX_PARITY,
    geometry,
)
from pool.format.location import POSITION_MASK, STRIPE_MASK
from pool.format.page import ENVELOPE
from pool.format.record import TERM_SHIFT
from pool.format.stripe import KIND_META

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
#: Sizes and offsets in bytes.
BYTES_MAX = 1 << 62
#: Larger slots' offsets outgrow their fields.
SLOT_BLOCKS_MAX = 1 << 14
MEMBERS_MAX = 4096
#: Numbers that stand for no device are above (`pool.table.NOWHERE`).
INDEX_MAX = 0xFFFE
JOURNAL_BLOCKS_MIN = 16
ROOT_BYTES = (64 << 10, 256 << 10)
TERM_MAX = (1 << 24) - 2
NAME_MAX, LINE_MAX = 64, 4096


@dataclass(frozen=True, slots=True)
class _Member:
    """What the other parts of a root must fit."""

    slots: int
    journal_offset: int
    journal_bytes: int


def validate(root: object) -> None:
    """Raises FormatError, with the place and what it should be."""
    fields = Fields(root, "root")
    fields.text("name", NAME_MAX)
    fields.number("generation", 1, U64 >> 1)
    fields.text("parent", NAME_MAX)
    fields.hex("writer", 32)
    term = fields.number("term", 0, TERM_MAX)
    shards, slot_blocks = _code(fields.below("code"))
    members = _members(fields, slot_blocks)
    _streams(fields, members, term)
    limit = fields.below("next").number("stripe", 1, STRIPE_MASK)
    checkpoint = fields.below("checkpoint")
    width = checkpoint.number("width", shards, MAX_DATA + MAX_PARITY)
    _checkpoint(checkpoint, members, slot_blocks, width, limit)


def _code(code: Fields) -> tuple[int, int]:
    """Shards of a stripe, and blocks of a slot."""
    data = code.number("data", 1, MAX_DATA)
    parity = code.number("parity", 1, MAX_PARITY)
    slot_blocks = code.number("slot_blocks", 2, SLOT_BLOCKS_MAX)
    try:
        geometry(data, parity, slot_blocks)
    except ValueError as error:
        raise FormatError(f"root.code: {error}") from None
    return data + parity, slot_blocks


# -- members ---------------------------------------------------------------------------------


def _members(root: Fields, slot_blocks: int) -> dict[int, _Member]:
    members: dict[int, _Member] = {}
    uuids: set[str] = set()
    active = 0
    for row in root.objects("members"):
        index = row.number("index", 0, INDEX_MAX)
        uuid = row.hex("uuid", 32)
        if index in members or uuid in uuids:
            raise FormatError(f"{row.where} is there twice, by its index or its uuid")
        row.string("url", LINE_MAX)
        row.string("reason", LINE_MAX, "")
        active += row.one_of("state", ("active", "gone")) == "active"
        row.one_of("class", ("data", "journal"))
        row.texts("labels")
        members[index] = _layout(row, slot_blocks)
        uuids.add(uuid)
    if not active or len(members) > MEMBERS_MAX:
        raise FormatError(f"root.members has {len(members)} members, {active} of them active")
    return members


def _layout(row: Fields, slot_blocks: int) -> _Member:
    """How a member is divided: two root slots, journal, slots, two root slots, no overlap. An
    object store has neither journal nor offsets."""
    size = row.number("size", BLOCK_SIZE, BYTES_MAX)
    root_bytes = row.number("root_bytes", ROOT_BYTES[0], ROOT_BYTES[-1])
    if root_bytes not in ROOT_BYTES:
        raise FormatError(f"{row.where}.root_bytes is {root_bytes}")
    journal_offset = row.number("journal_offset", 0, size)
    journal_bytes = row.number("journal_bytes", 0, size)
    slots_offset = row.number("slots_offset", 0, size)
    row.number("slot_blocks", slot_blocks, slot_blocks)
    slots = row.number("slots", 0, U32)
    ends = 2 * root_bytes
    if not journal_offset and not journal_bytes and not slots_offset:
        ends = 0
    elif journal_offset < ends or journal_offset + journal_bytes > slots_offset:
        raise FormatError(f"{row.where}: root slots, journal and slots overlap")
    if any(at % BLOCK_SIZE for at in (journal_offset, journal_bytes, slots_offset)):
        raise FormatError(f"{row.where}: its parts do not begin at blocks")
    if slots_offset + slots * slot_blocks * BLOCK_SIZE + ends > size:
        raise FormatError(f"{row.where}: its slots do not fit its size")
    return _Member(slots, journal_offset, journal_bytes)


# -- journal ---------------------------------------------------------------------------------


def _streams(root: Fields, members: dict[int, _Member], term: int) -> None:
    streams = list(root.objects("streams"))
    if len(streams) != 1:
        raise FormatError(f"root.streams has {len(streams)} journal streams, not one")
    stream = streams[0]
    stream.number("id", 1, 1)
    blocks = stream.number("blocks", JOURNAL_BLOCKS_MIN, BYTES_MAX // BLOCK_SIZE)
    _replicas(stream, members, blocks)
    tail = stream.number("tail", 0, POSITION_MASK >> 1)
    stream.number("replay", tail, tail + blocks)
    stream.number("durable", 0, POSITION_MASK >> 1)
    stream.number("previous", 0, U32)
    stream.number("version", 0, (term + 1 << TERM_SHIFT) - 1)


def _replicas(stream: Fields, members: dict[int, _Member], blocks: int) -> None:
    seen: set[int] = set()
    for row in stream.objects("replicas"):
        index = row.number("member", 0, INDEX_MAX)
        member = members.get(index)
        if member is None or index in seen:
            raise FormatError(f"{row.where} is on no member, or is there twice")
        row.number("offset", member.journal_offset, member.journal_offset)
        row.flag("behind")
        if blocks * BLOCK_SIZE > member.journal_bytes:
            raise FormatError(f"{row.where}: device {index} has no room for {blocks} blocks")
        seen.add(index)
    if not seen:
        raise FormatError(f"{stream.where} has no replicas")


# -- checkpoint ------------------------------------------------------------------------------


def _checkpoint(
    checkpoint: Fields, members: dict[int, _Member], slot_blocks: int, width: int, limit: int
) -> None:
    anchors: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for at, row in enumerate(checkpoint.items("anchors")):
        where = f"{checkpoint.where}.anchors[{at}]"
        stripe, size, places = _anchor(row, where, members, slot_blocks, width)
        if stripe in anchors or stripe >= limit or taken & places:
            raise FormatError(f"{where}: its id or a slot of it is not its own")
        anchors[stripe] = size
        taken |= places
    for at, row in enumerate(checkpoint.items("top")):
        where = f"{checkpoint.where}.top[{at}]"
        stripe, offset, length, _ = numbers(row, 4, U64, where)
        if length < ENVELOPE.size or offset + length > anchors.get(stripe, 0):
            raise FormatError(f"{where} points outside of the stripes that the root names")


def _anchor(
    row: object, where: str, members: dict[int, _Member], slot_blocks: int, width: int
) -> tuple[int, int, set[tuple[int, int]]]:
    """Stripe id, bytes of data, and places of an anchor."""
    if not isinstance(row, list) or len(row) != 8:
        raise FormatError(f"{where} is not a row of a stripe")
    stripe = number(row[0], 1, STRIPE_MASK, f"{where}[0]")
    number(row[1], KIND_META, KIND_META, f"{where}[1]")
    data = number(row[2], 1, MAX_DATA, f"{where}[2]")
    parity = number(row[3], 1, MAX_PARITY, f"{where}[3]")
    header = number(row[4], 1, slot_blocks - 1, f"{where}[4]")
    shard = number(row[5], 1, slot_blocks - header, f"{where}[5]")
    number(row[6], 0, U32, f"{where}[6]")
    count = data + parity
    need = HEADER_FIXED + shard * (HEADER_PER_DATA_BLOCK * data + HEADER_PER_BLOCK * count)
    if count > width or need > header * BLOCK_SIZE:
        raise FormatError(f"{where}: a stripe of {data}+{parity} does not fit")
    flat = numbers(row[7], 2 * count, U32, f"{where}[7]")
    places = set(zip(flat[::2], flat[1::2], strict=True))
    stored = {place for place in places if place[0] != INDEX_MAX + 1}
    for device, slot in stored:
        if device not in members or slot >= members[device].slots:
            raise FormatError(f"{where}: device {device} has no slot {slot}")
    if len({device for device, _ in stored}) < len([d for d in flat[::2] if d != INDEX_MAX + 1]):
        raise FormatError(f"{where}: two shards are on one device")
    return stripe, data * shard * BLOCK_SIZE, stored
