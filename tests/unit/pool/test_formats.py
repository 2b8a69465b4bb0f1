"""Everything on the devices: round trips, and no damage that a decoder takes for something else.

Every truncation and every flipped byte of an encoded structure gives `FormatError`, or the same
value where the byte means nothing; never another exception, never another value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_BLOCKS, SPARSE_MAX, Leaf
from pool.checkpoint import decode_directory, encode_directory
from pool.errors import FormatError, PoolError
from pool.format import location, page, record, stripe, superblock
from pool.format.geometry import Geometry, geometry, layout
from pool.format.page import Pointer
from pool.table import Stripe
from tests.unit.pool.support import sound_root

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
WHERE = layout(2 << 20, 64 << 10, 4)
ROOT = sound_root(WHERE)


def every_damage(
    image: bytes, decode: Callable[[bytes], Any], *, step: int = 1, same: object = None
) -> None:
    """Truncate after every byte and flip bits of every byte; `same` is what may come out."""
    rng = random.Random(len(image))
    for length in range(0, len(image), step):
        _refused_or_same(image[:length], decode, same)
    for at in range(0, len(image), step):
        damaged = bytearray(image)
        damaged[at] ^= rng.randrange(1, 256)
        _refused_or_same(bytes(damaged), decode, same)


def _refused_or_same(image: bytes, decode: Callable[[bytes], Any], same: object) -> None:
    try:
        found = decode(image)
    except (FormatError, PoolError):
        return
    assert found == same


# -- superblock ------------------------------------------------------------------------------


def make_superblock(root: dict[str, Any] = ROOT) -> bytes:
    return superblock.encode(root, pool=b"p" * 16, device=b"d" * 16, index=5, where=WHERE)


def test_superblock_round_trip() -> None:
    image = make_superblock()
    block = superblock.decode(image + bytes(100))
    assert (block.pool, block.device, block.index) == (b"p" * 16, b"d" * 16, 5)
    assert asdict(block.layout) == asdict(WHERE)
    assert block.generation == 7
    assert block.root == ROOT
    assert block.digest == superblock.digest(superblock.encode_root(ROOT))
    assert superblock.body_length(image) == len(image) - superblock.HEAD_BYTES


def test_superblock_damage() -> None:
    image = make_superblock()
    every_damage(image, superblock.decode)


def test_superblock_of_a_newer_revision_says_so() -> None:
    image = bytearray(make_superblock())
    image[8:10] = (superblock.REVISION + 1).to_bytes(2, "little")
    with pytest.raises(FormatError):
        superblock.decode(bytes(image))
    image[252:256] = crc32c(image[:252]).to_bytes(4, "little")
    with pytest.raises(PoolError, match="newer than this stripewell.*use a newer stripewell"):
        superblock.decode(bytes(image))


def test_superblock_that_outgrew_its_slot_is_refused() -> None:
    with pytest.raises(PoolError, match="root needs .* bytes, its slot has 65536"):
        make_superblock(ROOT | {"junk": "x" * 70_000})


@given(st.binary(max_size=400))
def test_superblock_of_anything(data: bytes) -> None:
    _refused_or_same(data, superblock.decode, None)
    _refused_or_same(superblock.MAGIC + data, superblock.decode, None)
    assert 0 <= superblock.body_length(superblock.MAGIC + data) <= 1 << 20


# -- journal record --------------------------------------------------------------------------

extents = st.lists(
    st.one_of(
        st.tuples(st.just(record.KIND_DATA), u32, u64, st.integers(1, 40)),
        st.tuples(st.sampled_from([record.KIND_TRIM, record.KIND_ZERO]), u32, u64, u64),
        st.tuples(st.just(record.KIND_CATALOG), st.just(0), st.integers(1, 4096), st.just(1)),
    ),
    max_size=12,
)


def make_record(found: list[tuple[int, int, int, int]], **other: int) -> tuple[bytearray, int]:
    block = bytearray(BLOCK_SIZE)
    payload = sum(e[3] for e in found if e[0] in (record.KIND_DATA, record.KIND_CATALOG))
    fields = {
        "flags": 1, "stream": 1, "previous": 9, "version": 1 << 40, "position": 100, "tail": 50,
        "durable": 70,
    }  # fmt: skip
    fields |= other
    crc = record.encode_into(
        memoryview(block), **fields, extents=found, crcs=list(range(7, 7 + payload))
    )
    return block, crc


@given(extents, u32, u64, u64)
def test_record_round_trip(
    found: list[tuple[int, int, int, int]], previous: int, version: int, position: int
) -> None:
    block, crc = make_record(found, previous=previous, version=version, position=position)
    header = record.decode(bytes(block))
    assert header.crc == crc
    assert [(e.kind, e.layer, e.block, e.count) for e in header.extents] == found
    assert (header.previous, header.version, header.position) == (previous, version, position)
    assert (header.flags, header.stream, header.tail, header.durable) == (1, 1, 50, 70)
    assert header.crcs == tuple(range(7, 7 + len(header.crcs)))
    assert header.end == position + 1 + sum(extent.payload for extent in header.extents)


def test_record_damage() -> None:
    block, _ = make_record([(record.KIND_DATA, 1, 5, 3), (record.KIND_TRIM, 1, 9, 99)])
    every_damage(bytes(block), record.decode, same=record.decode(bytes(block)))


def test_the_largest_record_fits_its_block() -> None:
    block, _ = make_record([(record.KIND_DATA, 1, 0, record.MAX_BLOCKS)])
    assert len(record.decode(bytes(block)).crcs) == record.MAX_BLOCKS


@given(st.binary(max_size=200))
def test_record_of_anything(data: bytes) -> None:
    _refused_or_same(data, record.decode, None)
    _refused_or_same(record.MAGIC + data.ljust(BLOCK_SIZE, b"\0"), record.decode, None)


# -- stripe header ---------------------------------------------------------------------------


def make_headers(shape: Geometry, used: int) -> tuple[list[bytes], stripe.Contents]:
    rng = np.random.default_rng(1)
    room = shape.blocks
    contents = stripe.Contents(
        rng.integers(0, 2**32, room, np.uint32),
        rng.integers(0, 2**63, room, np.uint64),
        rng.integers(0, 2**63, room, np.uint64),
        rng.integers(0, 2**32, shape.shards * shape.shard_blocks, np.uint32),
    )
    images = stripe.encode(
        pool=b"p" * 16, stripe=77, kind=stripe.KIND_DATA, shape=shape, used=used, contents=contents
    )
    return images, contents


@pytest.mark.parametrize(("k", "m", "slot"), [(1, 1, 4), (4, 2, 4), (8, 3, 16), (32, 8, 64)])
def test_stripe_header_round_trip(k: int, m: int, slot: int) -> None:
    shape = geometry(k, m, slot)
    images, contents = make_headers(shape, shape.blocks - 1)
    headers = [stripe.decode(image) for image in images]
    assert [header.shard for header in headers] == list(range(k + m))
    assert len({header.digest for header in headers}) == 1
    for header in headers:
        assert (header.stripe, header.kind, header.pool) == (77, stripe.KIND_DATA, b"p" * 16)
        assert (header.shape, header.used) == (shape, shape.blocks - 1)
        for name in ("layers", "blocks", "versions", "crcs"):
            assert (getattr(header.contents, name) == getattr(contents, name)).all()


def test_stripe_header_damage() -> None:
    shape = geometry(2, 1, 4)
    images, _ = make_headers(shape, shape.blocks)
    every_damage(images[1], lambda data: stripe.decode(data).digest, step=3)


@given(st.binary(min_size=80, max_size=300))
def test_stripe_header_of_anything(data: bytes) -> None:
    _refused_or_same(stripe.MAGIC + data, stripe.decode, None)


# -- pages and what is on them ---------------------------------------------------------------


@given(st.binary(max_size=300), u32, u64, u64)
def test_page_round_trip(body: bytes, layer: int, number: int, generation: int) -> None:
    image = page.encode(page.KIND_LEAF, page.FORM_DENSE, layer, number, generation, body)
    assert len(image) % page.ALIGN == 0
    found = page.decode(image, page.KIND_LEAF)
    assert (found.layer, found.number, found.generation) == (layer, number, generation)
    assert bytes(found.body) == body
    with pytest.raises(FormatError):
        page.decode(image, page.KIND_TABLE)


def test_page_damage_changes_the_checksum_that_its_pointer_repeats() -> None:
    image = page.encode(page.KIND_LEAF, 0, 1, 2, 3, b"body of a page")
    crc = page.checksum(image)

    def read(data: bytes) -> object:
        page.decode(data, page.KIND_LEAF)
        if page.checksum(data) != crc:
            raise FormatError("not the page meant")
        return data

    every_damage(image, read)


@given(st.dictionaries(st.integers(0, 255), st.tuples(u64, u32, u32, u32), max_size=256))
def test_directory_round_trip(rows: dict[int, tuple[int, int, int, int]]) -> None:
    leaves = {(3 << 8) + leaf: Pointer(*row) for leaf, row in rows.items()}
    body = memoryview(encode_directory(leaves))
    assert decode_directory(3, body) == leaves
    for length in range(1, len(body), 7):
        if length % 24:
            with pytest.raises(FormatError, match="wrong size"):
                decode_directory(3, body[:length])


@pytest.mark.parametrize("count", [0, 1, 5, SPARSE_MAX, SPARSE_MAX + 1, LEAF_BLOCKS])
def test_leaf_damage_is_refused_or_has_the_size_of_a_leaf(count: int) -> None:
    leaf = Leaf()
    for block in random.Random(count).sample(range(LEAF_BLOCKS), count):
        leaf.set(block, location.in_stripe(1, 0, block), block)
    form, body = leaf.encode()
    assert list(Leaf.decode(form, memoryview(body)).mapped()) == list(leaf.mapped())
    for length in range(0, len(body), 5):
        for wrong_form in (form, 1 - form, 9):
            try:
                found = Leaf.decode(wrong_form, memoryview(body[:length]))
            except FormatError:
                continue
            assert all(0 <= block < LEAF_BLOCKS for block, _, _ in found.mapped())


def test_a_sparse_leaf_that_is_unsorted_or_out_of_range_is_refused() -> None:
    def body(*blocks: int) -> memoryview:
        count = len(blocks)
        return memoryview(bytes(12 * count) + np.array(blocks, np.uint16).tobytes())

    with pytest.raises(FormatError, match="not sorted"):
        Leaf.decode(page.FORM_SPARSE, body(3, 3))
    with pytest.raises(FormatError, match="does not cover"):
        Leaf.decode(page.FORM_SPARSE, body(3, LEAF_BLOCKS))


# -- locations and rows in the root ----------------------------------------------------------


@given(
    st.integers(0, location.STRIPE_MASK),
    st.integers(0, location.SHARD_MASK),
    st.integers(0, location.BLOCK_MASK),
)
def test_location_round_trip(number: int, shard: int, block: int) -> None:
    found = location.in_stripe(number, shard, block)
    assert found < 2**64
    assert found >> location.TAG_SHIFT == location.TAG_STRIPE
    assert location.stripe_of(found) == number
    assert found >> location.SHARD_SHIFT & location.SHARD_MASK == shard
    assert found & location.BLOCK_MASK == block
    assert location.ZERO >> location.TAG_SHIFT == location.TAG_ZERO
    assert (location.JOURNAL | block) & location.POSITION_MASK == block


def test_stripe_row_in_the_root_round_trip() -> None:
    row = Stripe(9, 2, geometry(2, 1, 4), ((0, 5), (3, 1), (0xFFFF, 0)), placement=4)
    assert Stripe.from_json(row.to_json()) == row


@pytest.mark.parametrize(
    "row", [[], [1, 2, 3], [1, 2, 2, 1, 1, 3, 0, [1, 2]], [1, 2, "x", 1, 1, 3, 0, []], [None] * 8]
)
def test_a_damaged_stripe_row_is_refused(row: list[object]) -> None:
    with pytest.raises(FormatError):
        Stripe.from_json(row)
