"""Makes one of everything that claims to be a `Device` or an `ObjectStore`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from backends.base import Device, ObjectStore
from backends.block import open_block
from backends.directory import open_directory
from backends.fault_script import Script
from backends.faults import FaultyDevice, FaultyStore
from backends.file import open_file
from backends.memory import MemoryDevice, MemoryStore
from backends.observe import ObservedDevice, ObservedStore
from backends.open import attach
from tests.sim.devices import World

SIZE = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One way to make a backend, and what its tests may expect of it."""

    name: str
    attachable: bool = True
    locked: bool = True


DEVICES = (
    Kind("file"),
    Kind("block"),
    Kind("memory", locked=False),
    Kind("attached"),
    Kind("faulty"),
    Kind("observed"),
    Kind("faulty-observed"),
    Kind("observed-faulty"),
    Kind("sim", attachable=False, locked=False),
)
STORES = ("directory", "memory", "attached", "faulty", "observed", "faulty-observed")


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device over a file of `SIZE` bytes."""
    losetup = shutil.which("losetup", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if losetup is None:
        pytest.skip("losetup is not installed: no raw block device to test with")
    image = tmp_path / "loop.img"
    image.touch()
    os.truncate(image, SIZE)
    made = subprocess.run([losetup, "-f", "--show", str(image)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run([losetup, "-d", made.stdout.strip()], check=True)


def file_device(path: Path) -> Device:
    """A fresh file of `SIZE` bytes, open for writing."""
    return open_file(str(path), url=f"file://{path}", size=SIZE, create=True)


def quiet_script() -> Script:
    """A script without faults."""
    return Script(Random(1))


def duplicate(device: Device) -> Device:
    """What a worker process has, in this process; it takes the place of `device`."""
    spec, fds = device.worker_spec()
    twin = attach(spec, [os.dup(fd) for fd in fds])
    assert isinstance(twin, Device)
    return twin


@pytest.fixture(params=DEVICES, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """The adapter or stack that `device` is."""
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture
async def device(
    kind: Kind, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Device]:
    """A device of `SIZE` bytes."""
    path = tmp_path / "disk.img"
    closing: list[Device] = []
    match kind.name:
        case "block":
            node = request.getfixturevalue("loop_device")
            made: Device = open_block(node, url=node)
        case "memory":
            made = MemoryDevice(SIZE)
        case "attached":
            closing.append(file_device(path))
            made = duplicate(closing[0])
        case "faulty":
            made = FaultyDevice(file_device(path), quiet_script())
        case "observed":
            made = ObservedDevice(file_device(path), time.perf_counter)
        case "faulty-observed":
            inner = ObservedDevice(file_device(path), time.perf_counter)
            made = FaultyDevice(inner, quiet_script())
        case "observed-faulty":
            made = ObservedDevice(
                FaultyDevice(file_device(path), quiet_script()), time.perf_counter
            )
        case "sim":
            made = World(1, latency=0.0).create({"a": SIZE})["a"]
        case _:
            made = file_device(path)
    yield made
    for opened in (made, *closing):
        await opened.close()


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    """An empty store of `SIZE` bytes."""
    path = tmp_path / "objects"
    plain = open_directory(str(path), url=f"dir://{path}", size=SIZE, create=True)
    match request.param:
        case "memory":
            made: ObjectStore = MemoryStore(SIZE)
        case "attached":
            spec, fds = plain.worker_spec()
            twin = attach(spec, [os.dup(fd) for fd in fds])
            assert isinstance(twin, ObjectStore)
            made = twin
        case "faulty":
            made = FaultyStore(plain, quiet_script())
        case "observed":
            made = ObservedStore(plain, time.perf_counter)
        case "faulty-observed":
            made = FaultyStore(ObservedStore(plain, time.perf_counter), quiet_script())
        case _:
            made = plain
    yield made
    await made.close()
    await plain.close()
