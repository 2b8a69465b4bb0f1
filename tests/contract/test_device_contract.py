"""Every sentence that `backends.base` says about a `Device`, for every adapter and stack."""

from __future__ import annotations

import asyncio
import errno
import json
import sys
from pathlib import Path

import pytest

from backends.base import BLOCK_SIZE, Device, DeviceBusy, DeviceError, DeviceGone
from backends.block import open_block
from backends.file import open_file
from backends.transfer import IOV_MAX

from .conftest import SIZE, Kind

A, B, C = (bytes([letter]) * BLOCK_SIZE for letter in b"abc")
ROOT = Path(__file__).parents[2]

OUTSIDE = [
    (SIZE, BLOCK_SIZE),
    (-BLOCK_SIZE, BLOCK_SIZE),
    (SIZE - BLOCK_SIZE, 2 * BLOCK_SIZE),
    (512, BLOCK_SIZE),
    (0, 512),
]


def test_it_has_the_shape_of_a_device(device: Device) -> None:
    assert isinstance(device, Device)
    assert device.size == SIZE
    assert device.size % BLOCK_SIZE == 0
    assert device.url


async def test_buffers_are_written_one_after_the_other(device: Device) -> None:
    await device.write(0, [A, A, A, A])
    await device.write(BLOCK_SIZE, [bytearray(B), memoryview(C)])
    assert await device.read(0, 4 * BLOCK_SIZE) == A + B + C + A


async def test_a_durable_write_is_read_back(device: Device) -> None:
    await device.write(SIZE - 2 * BLOCK_SIZE, [A, B], sync=True)
    await device.sync()
    assert await device.read(SIZE - 2 * BLOCK_SIZE, 2 * BLOCK_SIZE) == A + B


async def test_a_read_returns_bytes_of_exactly_the_length(device: Device) -> None:
    data = await device.read(0, device.size)
    assert type(data) is bytes
    assert len(data) == device.size


async def test_more_buffers_than_one_system_call_takes(device: Device) -> None:
    # Empty buffers are aligned too: they let a small device see more than IOV_MAX of them.
    buffers = [A if i % 100 == 0 else b"" for i in range(2 * IOV_MAX + 50)]
    await device.write(0, buffers)
    device.append(len([b for b in buffers if b]) * BLOCK_SIZE, buffers)
    count = 2 * len([b for b in buffers if b])
    assert await device.read(0, count * BLOCK_SIZE) == A * count


async def test_nothing_to_write_is_fine(device: Device) -> None:
    await device.write(0, [])
    device.append(0, [])
    assert await device.read(0, 0) == b""


async def test_append_is_visible_when_it_returns(device: Device) -> None:
    device.append(2 * BLOCK_SIZE, [A, B])
    device.append(3 * BLOCK_SIZE, [C])
    assert await device.read(2 * BLOCK_SIZE, 2 * BLOCK_SIZE) == A + C


async def test_try_read_fills_all_or_says_no(device: Device) -> None:
    await device.write(0, [A, B])
    answers = set()
    for _ in range(50):
        into = bytearray(2 * BLOCK_SIZE)
        answers.add(device.try_read(0, memoryview(into)))
        if True in answers:
            break
    assert bytes(into) == A + B


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
async def test_requests_outside_or_unaligned_are_errors(
    device: Device, offset: int, length: int
) -> None:
    await device.write(0, [A])
    with pytest.raises(DeviceError) as read:
        await device.read(offset, length)
    with pytest.raises(DeviceError):
        await device.write(offset, [bytes(length)])
    with pytest.raises(DeviceError):
        device.append(offset, [bytes(length)])
    with pytest.raises(DeviceError):
        device.try_read(offset, memoryview(bytearray(length)))
    assert read.value.errno == errno.EINVAL
    assert device.url in str(read.value)
    assert await device.read(0, BLOCK_SIZE) == A


async def test_every_single_buffer_must_be_aligned(device: Device) -> None:
    with pytest.raises(DeviceError):
        await device.write(0, [bytes(1024), bytes(3072)])
    with pytest.raises(DeviceError):
        device.append(0, [bytes(1024), bytes(3072)])


async def test_no_buffer_is_referenced_after_return_or_error(device: Device) -> None:
    written, appended, refused, into = (bytearray(A) for _ in range(4))
    await device.write(0, [written])
    device.append(0, [appended])
    device.try_read(0, memoryview(into))
    with pytest.raises(DeviceError):
        await device.write(SIZE, [refused])
    for buffer in (written, appended, refused, into):
        buffer.append(0)  # raises BufferError while anybody has a view of it


async def test_no_buffer_is_referenced_after_cancellation(device: Device) -> None:
    for _ in range(20):
        buffer = bytearray(A * 64)
        writing = asyncio.ensure_future(device.write(0, [buffer]))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        buffer.append(0)
    assert len(await device.read(0, BLOCK_SIZE)) == BLOCK_SIZE


async def test_operations_overlap(device: Device) -> None:
    blocks = [bytes([i]) * BLOCK_SIZE for i in range(64)]
    writes = [device.write(i * BLOCK_SIZE, [block]) for i, block in enumerate(blocks)]
    await asyncio.gather(*writes, device.sync(), device.sync())
    reads = [device.read(i * BLOCK_SIZE, BLOCK_SIZE) for i in range(64)]
    assert await asyncio.gather(*reads) == blocks


async def test_after_close_everything_is_gone(device: Device) -> None:
    await device.write(0, [A])
    await device.close()
    await device.close()
    with pytest.raises(DeviceGone):
        await device.read(0, BLOCK_SIZE)
    with pytest.raises(DeviceGone):
        await device.write(0, [A])
    with pytest.raises(DeviceGone):
        await device.sync()
    with pytest.raises(DeviceGone):
        device.append(0, [A])
    with pytest.raises(DeviceGone):
        device.try_read(0, memoryview(bytearray(BLOCK_SIZE)))


async def test_close_waits_for_what_is_in_flight(device: Device) -> None:
    writing = asyncio.ensure_future(device.write(0, [A * 32]))
    await asyncio.sleep(0)
    await device.close()
    await writing


WORKER = """
import asyncio, json, sys
from backends.open import attach
spec = json.loads(sys.argv[1])
device = attach(spec, json.loads(sys.argv[2]))
async def work():
    data = await device.read(0, 4096)
    await device.write(4096, [data], sync=True)
asyncio.run(work())
print("done", flush=True)
sys.stdin.read()
"""


async def test_a_worker_process_attaches_and_keeps_the_lock(kind: Kind, device: Device) -> None:
    spec, fds = device.worker_spec()
    assert json.loads(json.dumps(spec)) == spec
    if not kind.attachable:
        assert fds == []
        return
    await device.write(0, [A])
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", WORKER, json.dumps(spec), json.dumps(fds)),
        pass_fds=fds,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdout is not None
    try:
        assert await worker.stdout.readline() == b"done\n"
        assert await device.read(BLOCK_SIZE, BLOCK_SIZE) == A
        if kind.locked:
            await device.close()
            with pytest.raises(DeviceBusy):
                reopen(device.url)
    finally:
        await worker.communicate(b"")


def reopen(url: str) -> Device:
    """Open the file or disk once more, for writing."""
    if url.startswith("/dev/"):
        return open_block(url, url=url)
    return open_file(url.removeprefix("file://"), url=url)


async def test_one_writer_any_number_of_readers(kind: Kind, device: Device) -> None:
    if not kind.locked:
        assert kind.name in ("memory", "sim")  # nobody else can name them
        return
    with pytest.raises(DeviceBusy, match="stop the daemon"):
        reopen(device.url)
    await device.write(0, [A])
    if device.url.startswith("/dev/"):
        reader: Device = open_block(device.url, url=device.url, writable=False)
    else:
        path = device.url.removeprefix("file://")
        reader = open_file(path, url=device.url, writable=False)
    assert await reader.read(0, BLOCK_SIZE) == A
    with pytest.raises(DeviceError) as refused:
        await reader.write(0, [B])
    assert refused.value.errno == errno.EROFS
    await reader.close()
