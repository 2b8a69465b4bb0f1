"""Spoils images. `mutate` draws one way of many from a random generator and says what it did.

* **Damage** needs no understanding: bits flipped, regions zeroed, torn, swapped, or as they were
  some time before; devices cut short, or gone. Checksums give it away.
* **Forgery** edits one field to a hostile value and makes every checksum above it right: what reads
  the images has to meet that value and survive it. Docs call that out of the fault model for bytes;
  it is in for crashes, hangs and memory.

Called by the fuzz tests of `stripewell.recover` and `pool`.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import BLOCK_SIZE
from pool.checkpoint import DIRECTORY_DTYPE
from pool.format import page, record, superblock
from pool.format.page import Pointer
from pool.format.record import KIND_CATALOG
from pool.table import row_dtype
from tests.fuzz.anatomy import Anatomy, PageAt, Region
from tests.fuzz.images import Images

Mutation = Callable[[Images, random.Random], str]


def mutate(images: Images, rng: random.Random, older: Images | None = None) -> str:
    """Spoil images that are sound, in one random way; returns what was done. With `older` images
    of the same pool, regions may also turn old."""
    return forge(images, rng) if rng.random() < 0.6 else damage(images, rng, older)


def forge(images: Images, rng: random.Random) -> str:
    """A hostile value with right checksums."""
    for _ in range(50):
        try:
            return rng.choice(FORGERIES)(images, rng)
        except ValueError:
            continue  # it did not fit there
    raise AssertionError("nothing could be forged")


# -- damage ------------------------------------------------------------------------------------


def damage(images: Images, rng: random.Random, older: Images | None = None) -> str:
    """One to six regions of one structure spoilt, or a whole device."""
    if rng.random() < 0.15:
        return _damage_device(images, rng, older)
    regions = Anatomy(images).regions()
    structure = rng.choice(sorted({region.structure for region in regions}))
    candidates = [region for region in regions if region.structure == structure]
    chosen = rng.sample(candidates, min(rng.randint(1, 6), len(candidates)))
    return "; ".join(damage_region(images, region, rng, candidates, older) for region in chosen)


def damage_region(
    images: Images,
    region: Region,
    rng: random.Random,
    others: list[Region],
    older: Images | None = None,
) -> str:
    """Spoil one region; `others` are what it may be swapped with."""
    image, start, end = images[region.device], region.offset, region.offset + region.length
    ways = ("flip", "zero", "tear", "noise", "swap", "old" if older else "flip")
    match way := rng.choice(ways):
        case "flip":
            for _ in range(rng.randint(1, 8)):
                image[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        case "zero":
            image[start:end] = bytes(region.length)
        case "tear":
            cut = rng.randrange(start, end)
            image[cut:end] = (older or {}).get(region.device, bytes(len(image)))[cut:end]
        case "noise":
            image[start:end] = rng.randbytes(region.length)
        case "swap":
            other = rng.choice(others)
            length = min(region.length, other.length)
            there = images[other.device][other.offset : other.offset + length]
            images[other.device][other.offset : other.offset + length] = image[
                start : start + length
            ]
            image[start : start + length] = there
        case "old":
            assert older is not None
            image[start:end] = older[region.device][start:end]
    return f"{way} {region.structure} at {region.device}:{region.offset}"


def _damage_device(images: Images, rng: random.Random, older: Images | None) -> str:
    name = rng.choice(sorted(images))
    ways = ("cut", "grow", "gone", "blank", "twice", "old" if older else "cut")
    match way := rng.choice(ways):
        case "cut":
            blocks = len(images[name]) // BLOCK_SIZE
            del images[name][rng.randrange(16, blocks) * BLOCK_SIZE :]
        case "grow":
            images[name] += bytes(rng.randint(1, 64) * BLOCK_SIZE)
        case "gone":
            del images[name]
        case "blank":
            images[name][:] = bytes(len(images[name]))
        case "twice":
            images[f"{name}-copy"] = bytearray(images[name])
        case "old":
            assert older is not None
            images[name][:] = older[name]
    return f"device {name}: {way}"


# -- forgery -----------------------------------------------------------------------------------

_NUMBERS = (
    0, 1, 2, 3, 63, 64, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**51, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**9,
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    -1, -(2**63), 2**64, 10**40, 0.5, 1e300, True, None, "", "0", "../../etc/passwd",
    "\x1b[2J\n\0", "x" * 3000, [], {}, [0], [[]], {"id": 1},
)  # fmt: skip


def hostile_number(rng: random.Random, bits: int) -> int:
    """A value that is unusual for an unsigned field of that many bits."""
    if rng.random() < 0.2:
        return rng.getrandbits(bits)
    return rng.choice(_NUMBERS) & (1 << bits) - 1


def hostile_value(rng: random.Random) -> Any:
    """A value of a wrong type or size for JSON."""
    return rng.choice(_NUMBERS) if rng.random() < 0.5 else rng.choice(_OTHERS)


def hostile_json(value: Any, rng: random.Random) -> str:
    """Change one place anywhere in a JSON value, which is an object or a list."""
    holder, key = rng.choice(list(_places(value)))
    ways = ["replace", "replace", "delete"]
    if isinstance(holder, list):
        ways += ["repeat", "swap", "flood"]
    elif isinstance(holder[key], int):
        ways += ["step"]
    match way := rng.choice(ways):
        case "replace":
            holder[key] = hostile_value(rng)
        case "delete":
            del holder[key]
        case "repeat":
            holder.insert(key, holder[key])
        case "swap":
            other = rng.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
        case "flood":
            holder.extend([holder[key]] * 200)
        case "step":
            holder[key] += rng.choice((-1, 1))
    return f"{way} {key!r}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        yield value, key
        if isinstance(below, dict | list):
            yield from _places(below)


def _poke(block: bytearray, fields: list[tuple[int, int]], rng: random.Random) -> str:
    """One of the fields, given as (offset, bits), gets a hostile value."""
    offset, bits = rng.choice(fields)
    number = hostile_number(rng, bits)
    block[offset : offset + bits // 8] = number.to_bytes(bits // 8, "little")
    return f"u{bits} at {offset} = {number:#x}"


def forge_head(images: Images, rng: random.Random) -> str:
    """A field of superblock heads: on one device, or on all."""
    anatomy = Anatomy(images)
    fields = [
        (8, 16), (10, 16), (12, 32), (16, 64), (24, 64), (32, 64), (48, 64), (64, 16), (68, 32),
        (72, 64), (80, 64), (88, 32), (96, 64), (104, 64), (112, 32),
    ]  # fmt: skip
    only, seed, what = rng.choice([None, *sorted(images)]), rng.random(), ""
    for copy in anatomy.copies:
        if only in (None, copy.device):
            head = bytearray(images[copy.device][copy.offset : copy.offset + superblock.HEAD_BYTES])
            what = _poke(head, fields, random.Random(seed))
            anatomy.write_head(copy, bytes(head))
    return f"superblock head of {only or 'all'}: {what}"


def forge_root(images: Images, rng: random.Random) -> str:
    """A place of the root's JSON, on all devices."""
    anatomy = Anatomy(images)
    what = hostile_json(anatomy.root, rng)
    anatomy.write_root(anatomy.root)
    return f"root: {what}"


def forge_one_root(images: Images, rng: random.Random) -> str:
    """One device has another root: a fork of the same generation, or a newer one."""
    anatomy = Anatomy(images)
    step = rng.choice((0, 0, 1, 10**6))
    anatomy.root["generation"] += step
    what = hostile_json(anatomy.root, rng)
    device = rng.choice(sorted(images))
    anatomy.write_root(anatomy.root, only=device)
    return f"root of {device} alone, {step} generations ahead: {what}"


def forge_nesting(images: Images, rng: random.Random) -> str:
    """A root that no parser can follow, or that is no object."""
    anatomy = Anatomy(images)
    deep: Any = []
    for _ in range(rng.choice((10, 500))):
        deep = [deep]
    anatomy.root[rng.choice(sorted(anatomy.root))] = deep
    anatomy.write_root(rng.choice((anatomy.root, deep)))
    return "root: deep nesting"


def forge_top(images: Images, rng: random.Random) -> str:
    """A place of the top page's JSON: width, catalog, pointers."""
    anatomy = Anatomy(images)
    top = rng.choice(_pages(anatomy, page.KIND_TOP))
    found = json.loads(bytes(top.page.body))
    part = rng.choice((found, found["catalog"], found["catalog"]["volumes"], found["directories"]))
    what = hostile_json(part, rng)
    anatomy.write_page(top, json.dumps(found, separators=(",", ":")).encode())
    return f"top page: {what}"


def forge_table(images: Images, rng: random.Random) -> str:
    """A field of a row of the stripe table; or one row is a copy of another."""
    anatomy = Anatomy(images)
    at = rng.choice(_pages(anatomy, page.KIND_TABLE))
    width = json.loads(bytes(_pages(anatomy, page.KIND_TOP)[0].page.body))["width"]
    return _forge_rows(anatomy, at, row_dtype(width), rng)


def forge_directory(images: Images, rng: random.Random) -> str:
    """A field of a row of a directory; or one row is a copy of another."""
    anatomy = Anatomy(images)
    at = rng.choice(_pages(anatomy, page.KIND_DIRECTORY))
    return _forge_rows(anatomy, at, DIRECTORY_DTYPE, rng)


def _forge_rows(anatomy: Anatomy, at: PageAt, dtype: np.dtype[np.void], rng: random.Random) -> str:
    rows = np.frombuffer(bytearray(at.page.body), dtype)
    used = [i for i in range(len(rows)) if any(rows[i].tobytes())]
    target = rng.choice(used)
    assert dtype.names is not None
    if rng.random() < 0.2:
        rows[target] = rows[rng.choice(used)]
        what = f"row {target} is a copy"
    else:
        name = rng.choice(dtype.names)
        what = f"row {target}, {name}: {_poke_column(rows, target, name, rng)}"
    anatomy.write_page(at, rows.tobytes())
    return f"page of kind {at.page.kind}: {what}"


def _poke_column(rows: npt.NDArray[np.void], target: int, name: str, rng: random.Random) -> int:
    column = rows[name]
    number = hostile_number(rng, 8 * column.dtype.itemsize)
    if column.ndim == 1:
        column[target] = number
    else:
        column[target, rng.randrange(column.shape[1])] = number
    return number


def forge_leaf(images: Images, rng: random.Random) -> str:
    """An entry of a leaf: its location, checksum or block number; or a body of another length."""
    anatomy = Anatomy(images)
    at = rng.choice(_pages(anatomy, page.KIND_LEAF))
    body = bytearray(at.page.body)
    count = 512 if at.page.form == page.FORM_DENSE else len(body) // 14
    entry = rng.randrange(count)
    match what := rng.choice(("location", "tag", "crc", "number", "cut", "grow")):
        case "location":
            struct.pack_into("<Q", body, 8 * entry, hostile_number(rng, 64))
        case "tag":
            location = struct.unpack_from("<Q", body, 8 * entry)[0]
            struct.pack_into("<Q", body, 8 * entry, location ^ rng.randint(1, 3) << 62)
        case "crc":
            struct.pack_into("<I", body, 8 * count + 4 * entry, hostile_number(rng, 32))
        case "number" if at.page.form == page.FORM_SPARSE:
            struct.pack_into("<H", body, 12 * count + 2 * entry, hostile_number(rng, 16))
        case "cut":
            del body[rng.randrange(len(body)) :]
        case _:
            body += bytes(rng.randint(1, 100))
    anatomy.write_page(at, bytes(body))
    return f"leaf {at.page.number} of layer {at.page.layer}: {what} of entry {entry}"


def forge_envelope(images: Images, rng: random.Random) -> str:
    """A field of a page's envelope."""
    anatomy = Anatomy(images)
    at = rng.choice(_one_of_each_kind(anatomy, rng))
    name, bits = rng.choice(
        (("kind", 8), ("form", 8), ("layer", 32), ("index", 64), ("generation", 64), ("length", 32))
    )
    number = hostile_number(rng, bits)
    anatomy.write_page(at, bytes(at.page.body), **{name: number})
    return f"page of kind {at.page.kind}: {name} = {number:#x}"


def forge_pointer(images: Images, rng: random.Random) -> str:
    """A pointer with a hostile field, or to another page: a cycle, or one page twice."""
    anatomy = Anatomy(images)
    at = rng.choice(_one_of_each_kind(anatomy, rng))
    if rng.random() < 0.5:
        pointer = rng.choice(anatomy.pages).pointer
    else:
        name = rng.choice(Pointer._fields)
        bits = 64 if name == "stripe" else 32
        pointer = at.pointer._replace(**{name: hostile_number(rng, bits)})
    anatomy.write_pointer(at, pointer)
    return f"pointer to page of kind {at.page.kind}: {pointer}"


def _pages(anatomy: Anatomy, kind: int) -> list[PageAt]:
    return [at for at in anatomy.pages if at.page.kind == kind]


def _one_of_each_kind(anatomy: Anatomy, rng: random.Random) -> list[PageAt]:
    return [rng.choice(_pages(anatomy, kind)) for kind in (1, 2, 3, 4)]


def forge_record(images: Images, rng: random.Random) -> str:
    """A field of a record's header or of one of its extents."""
    anatomy = Anatomy(images)
    at = rng.choice(anatomy.records)
    block = bytearray(at.block)
    fields = [
        (12, 16), (14, 16), (16, 32), (20, 32), (24, 32), (32, 64), (40, 64), (48, 64), (56, 64),
    ]  # fmt: skip
    if at.record.extents and rng.random() < 0.7:
        start = record.HEAD.size + record.EXTENT.size * rng.randrange(len(at.record.extents))
        fields = [(start, 8), (start + 4, 32), (start + 8, 64), (start + 16, 64)]
    what = _poke(block, fields, rng)
    anatomy.write_records(
        [bytes(block) if other is at else other.block for other in anatomy.records]
    )
    return f"record at {at.record.position}: {what}"


def forge_change(images: Images, rng: random.Random) -> str:
    """A catalog change in the journal."""
    anatomy = Anatomy(images)
    changes = [at for at in anatomy.records if at.record.extents[:1]]
    changes = [at for at in changes if at.record.extents[0].kind == KIND_CATALOG]
    at = rng.choice(changes)
    _, offset = next(anatomy.ring(at.record.position + 1))
    device, _ = next(anatomy.ring(at.record.position + 1))
    length = at.record.extents[0].block
    change = json.loads(images[device][offset : offset + length])
    what = hostile_json(change, rng)
    body = json.dumps(change).encode()[: len(at.record.crcs) * BLOCK_SIZE]
    at_length = record.HEAD.size + 8
    block = bytearray(at.block)
    struct.pack_into("<Q", block, at_length, len(body))
    at = type(at)(at.record, bytes(block))
    anatomy.records = [
        at if other.record.position == at.record.position else other for other in anatomy.records
    ]
    anatomy.write_payload(at, body)
    return f"catalog change at {at.record.position}: {what}"


def forge_stripe_header(images: Images, rng: random.Random) -> str:
    """A field of a stripe header, on one shard or on all."""
    anatomy = Anatomy(images)
    stripe = rng.choice(list(anatomy.stripes.values()))
    fields = [
        (12, 16), (14, 8), (15, 8), (16, 64), (32, 64), (40, 8), (41, 8), (42, 8), (43, 8),
        (44, 16), (46, 16), (48, 32), (52, 64), (128, 32),
    ]  # fmt: skip
    every, seed, what = rng.random() < 0.5, rng.random(), "not there"
    for shard in range(stripe.shape.shards):
        header = anatomy.stripe_header(stripe, shard)
        if header is not None and (every or shard == 0):
            block = bytearray(header)
            what = _poke(block, fields, random.Random(seed))
            anatomy.write_stripe_header(stripe, shard, bytes(block))
    return f"stripe {stripe.id}: {what}"


FORGERIES: tuple[Mutation, ...] = (
    forge_head,
    forge_root,
    forge_root,
    forge_one_root,
    forge_nesting,
    forge_top,
    forge_top,
    forge_table,
    forge_directory,
    forge_leaf,
    forge_envelope,
    forge_pointer,
    forge_record,
    forge_change,
    forge_stripe_header,
)
