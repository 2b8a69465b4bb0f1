"""The fault decorators do what the script says, once, at the right operation, and nothing else."""

from __future__ import annotations

import asyncio
import errno
from random import Random

import pytest

from backends.base import BLOCK_SIZE, DeviceError, DeviceFull, DeviceGone
from backends.fault_script import (
    READS,
    WRITES,
    Action,
    ApplyThenFail,
    Delay,
    Fail,
    FlipBits,
    Hang,
    Rule,
    Script,
    ShortRead,
    Vanish,
)
from backends.faults import FaultyDevice, FaultyStore
from backends.memory import MemoryDevice, MemoryStore
from tests.sim.loop import run

SIZE = 16 * BLOCK_SIZE
A, B = b"a" * BLOCK_SIZE, b"b" * BLOCK_SIZE
READ, WRITE, SYNC = frozenset({"read"}), frozenset({"write"}), frozenset({"sync"})


def faulty(*rules: Rule, seed: int = 1) -> FaultyDevice:
    return FaultyDevice(MemoryDevice(SIZE), Script(Random(seed), rules))


async def outcomes(device: FaultyDevice, count: int) -> str:
    """Read `count` times; return one letter for each, `.` success and `x` error."""
    results = ""
    for _ in range(count):
        try:
            await device.read(0, BLOCK_SIZE)
            results += "."
        except DeviceError:
            results += "x"
    return results


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(READ, Fail()), "x....."),
        (Rule(READ, Fail(), nth=3), "..x..."),
        (Rule(READ, Fail(), nth=2, times=2), ".xx..."),
        (Rule(READ, Fail(), nth=4, times=None), "...xxx"),
        (Rule(WRITE, Fail(), times=None), "......"),
        (Rule(READ, Fail(), times=None, within=(BLOCK_SIZE, SIZE)), "......"),
        (Rule(READ, Fail(), times=None, within=(0, 1)), "xxxxxx"),
        (Rule(READ, ShortRead(), nth=2), ".x...."),
        (Rule(READ, Vanish(), nth=3), "..xxxx"),
    ],
)
async def test_which_operations_are_hit(rule: Rule, expected: str) -> None:
    assert await outcomes(faulty(rule), 6) == expected


async def test_chance_is_the_seeds() -> None:
    def device(seed: int) -> FaultyDevice:
        return faulty(Rule(READ, Fail(), times=None, chance=0.5), seed=seed)

    first = await outcomes(device(1), 40)
    assert 10 < first.count("x") < 30
    assert await outcomes(device(1), 40) == first
    assert await outcomes(device(2), 40) != first


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EIO, DeviceError), (errno.ENOSPC, DeviceFull), (errno.ENODEV, DeviceGone)],
)
async def test_errors_have_their_class_and_do_nothing(code: int, kind: type[DeviceError]) -> None:
    device = faulty(Rule(WRITES | SYNC, Fail(code), times=None))
    with pytest.raises(kind) as failure:
        await device.write(0, [A])
    assert failure.value.errno == code
    with pytest.raises(kind):
        device.append(0, [A])
    with pytest.raises(kind):
        await device.sync()
    assert await device.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)


async def test_apply_then_fail_applies() -> None:
    device = faulty(Rule(WRITES, ApplyThenFail(), times=2))
    with pytest.raises(DeviceError):
        await device.write(0, [A])
    with pytest.raises(DeviceError):
        device.append(BLOCK_SIZE, [B])
    assert await device.read(0, 2 * BLOCK_SIZE) == A + B


async def test_bits_flip_on_the_way_and_not_on_the_medium() -> None:
    device = faulty(Rule(READS, FlipBits(3), times=2))
    await device.write(0, [A])
    wrong = await device.read(0, BLOCK_SIZE)
    assert sum((x ^ y).bit_count() for x, y in zip(wrong, A, strict=True)) == 3
    into = bytearray(BLOCK_SIZE)
    assert device.try_read(0, memoryview(into))
    assert sum((x ^ y).bit_count() for x, y in zip(into, A, strict=True)) == 3
    assert device.try_read(0, memoryview(into))
    assert into == A


def test_delays_take_the_time_of_the_loop() -> None:
    async def main() -> float:
        device = faulty(Rule(READS, Delay(5.0)))
        assert not device.try_read(0, memoryview(bytearray(BLOCK_SIZE)))
        await device.read(0, BLOCK_SIZE)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(5.0)


def test_a_hanging_operation_waits_for_its_release() -> None:
    async def main() -> None:
        device = faulty(Rule(SYNC, Hang(), times=None))
        syncing = asyncio.create_task(device.sync())
        await asyncio.sleep(3600)
        assert not syncing.done()
        device.script.release()
        await syncing
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(device.sync(), 60)

    run(main())


async def test_a_vanished_device_answers_nothing_until_it_is_back() -> None:
    device = faulty(Rule(SYNC, Vanish()))
    await device.write(0, [A])
    for _ in range(2):
        with pytest.raises(DeviceGone):
            await device.sync()
    with pytest.raises(DeviceGone):
        device.append(0, [A])
    with pytest.raises(DeviceGone):
        device.try_read(0, memoryview(bytearray(BLOCK_SIZE)))
    device.script.clear()
    assert await device.read(0, BLOCK_SIZE) == A


@pytest.mark.parametrize(
    ("ops", "action"),
    [
        (WRITE, FlipBits()),
        (SYNC, ShortRead()),
        (frozenset({"append"}), Hang()),
        (WRITES, Delay(1)),
        (frozenset({"flush"}), Fail()),
    ],
)
def test_rules_that_make_no_sense_are_refused(ops: frozenset[str], action: Action) -> None:
    with pytest.raises(ValueError, match="operations|reads only|synchronous"):
        Rule(ops, action)


async def test_stores_fail_by_the_same_script() -> None:
    rules = [
        Rule(frozenset({"put"}), Fail(errno.ENOSPC)),
        Rule(frozenset({"put"}), ApplyThenFail(), nth=2),
        Rule(frozenset({"get"}), FlipBits()),
        Rule(frozenset({"list"}), Fail()),
        Rule(frozenset({"delete"}), Vanish()),
    ]
    store = FaultyStore(MemoryStore(SIZE), Script(Random(1), rules))
    with pytest.raises(DeviceFull):
        await store.put("a", [A])
    with pytest.raises(DeviceError):
        await store.put("a", [A])
    assert await store.get("a", 0, BLOCK_SIZE) != A
    assert await store.get("a", 0, BLOCK_SIZE) == A
    with pytest.raises(DeviceError):
        await store.list()
    assert await store.list() == ["a"]
    for call in (store.delete("a"), store.get("a", 0, 1), store.list(), store.put("b", [])):
        with pytest.raises(DeviceGone):
            await call
