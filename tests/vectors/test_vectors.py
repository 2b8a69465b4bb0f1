"""Golden images of revision 1: today's code reads them, and so does one made from the document."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from backends.base import Device, ObjectStore
from backends.memory import MemoryDevice, MemoryStore
from pool import Pool
from pool.mover import InlineMover
from tests.sim.loop import run
from tests.vectors.reader import Image, Reader

HERE = Path(__file__).parent
VECTORS = ("small", "store", "narrow", "many")
#: Which member to leave out: nobody, or each one. Every pool here is 2+1.
DEGRADED = [(name, missing) for name in VECTORS for missing in (None, 0, 1, 2)] + [("store", 3)]


def manifest(name: str) -> dict[str, Any]:
    """The members' names and the volumes' sizes and digests."""
    found: dict[str, Any] = json.loads((HERE / f"revision-1-{name}.json").read_text())
    return found


def images(name: str, missing: int | None = None) -> dict[str, Image]:
    """A golden pool's members by name, without one of them."""
    names = manifest(name)["members"]
    found: dict[str, Any] = {}
    with tarfile.open(HERE / f"revision-1-{name}.tar.xz") as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert isinstance(file, io.BufferedIOBase)
            member, _, key = info.name.partition("/")
            if key:
                found.setdefault(member, {})[key] = file.read()
            else:
                found[member] = file.read()
    return {member: found[member] for i, member in enumerate(names) if i != missing}


async def backends(found: dict[str, Image]) -> list[Device | ObjectStore]:
    """The members as the engine takes them."""
    opened: list[Device | ObjectStore] = []
    for name, image in found.items():
        if isinstance(image, bytes):
            device = MemoryDevice(len(image), url=f"file:{name}")
            device.append(0, [image])
            opened.append(device)
        else:
            store = MemoryStore(6 << 20, url=f"dir:{name}")
            for key, data in image.items():
                await store.put(key, [data])
            opened.append(store)
    return opened


async def digests(pool: Pool) -> dict[str, dict[str, Any]]:
    """Size and digest of every volume's content."""
    volumes = {}
    for info in pool.volumes():
        whole = bytearray(info.size)
        await pool.volume(info.name).read(0, memoryview(whole))
        volumes[info.name] = {"size": info.size, "sha256": hashlib.sha256(whole).hexdigest()}
    return volumes


@pytest.mark.parametrize(("name", "missing"), DEGRADED)
def test_today_s_code_reads_the_golden_pool(name: str, missing: int | None) -> None:
    """P2, P8: everything that was flushed is there, also without one device; and it can go on."""

    async def scenario() -> None:
        pool = await Pool.open(
            await backends(images(name, missing)), mover=InlineMover(), rng=random.Random(1)
        )
        assert await digests(pool) == manifest(name)["volumes"]
        if missing is None:
            assert await pool.check() == []
        await pool.volume("alpha").write(0, memoryview(b"new"))
        await pool.checkpoint()
        await pool.close()

    run(scenario())


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_a_golden_pool_opens_for_reading_without_being_changed(missing: int | None) -> None:
    """What `pool import` does: all volumes can be read, nothing is written."""

    async def scenario() -> None:
        found = images("small", missing)
        opened = await backends(found)
        before = [await b.read(0, b.size) for b in opened if isinstance(b, Device)]
        pool = await Pool.open(opened, mover=InlineMover(), rng=random.Random(1), read_only=True)
        assert await digests(pool) == manifest("small")["volumes"]
        assert [await b.read(0, b.size) for b in opened if isinstance(b, Device)] == before
        await pool.close()

    run(scenario())


@pytest.mark.parametrize(("name", "missing"), DEGRADED)
def test_the_document_is_enough_to_read_a_volume(name: str, missing: int | None) -> None:
    """P8: the format, the devices and nothing else give every byte back."""
    reader = Reader(list(images(name, missing).values()))
    found = {
        volume: {
            "size": entry["size"],
            "sha256": hashlib.sha256(reader.volume(volume)).hexdigest(),
        }
        for volume, entry in reader.volumes.items()
    }
    assert found == manifest(name)["volumes"]


def test_the_golden_pools_hold_what_they_are_kept_for() -> None:
    """A vector that lost what makes it worth reading would prove nothing."""
    small, store, narrow, many = (Reader(list(images(name).values())) for name in VECTORS)
    # Every kind of extent is in the journal behind the checkpoint.
    assert {kind for kind, *_ in small.records} == {1, 2, 3, 4}
    tags = {location >> 62 for layer in small.layers.values() for location, _ in layer.values()}
    assert tags == {1, 2, 3}
    # A batch of 150 single blocks does not fit one header.
    assert sum(kind == 1 for kind, *_ in store.records) >= 150
    assert any(index == 3 for row in store.rows.values() for index, _ in row.places)
    assert {row.data for row in narrow.rows.values()} == {1, 2}
    assert [member["state"] for member in narrow.root["members"]] == ["active"] * 3
    assert narrow.root["term"] == 3
    assert len(many.root["checkpoint"]["top"]) == 2
