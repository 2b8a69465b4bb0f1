"""`pool check` of damaged devices: it finds the damage and blames the right device, not more.

The damage is within the budget: on one device of a pool of 2+1. Such a pool opens, nothing of it is
lost, and each fault that is found is that device's.
"""

from __future__ import annotations

import faulthandler
import random
from collections import Counter
from functools import cache

import pytest

from pool import PoolError
from pool.check import Report, Severity
from tests.fuzz.images import Sample, build, disks
from tests.fuzz.trial import Spoilt, bounded, spoil
from tests.sim.loop import run
from tests.unit.pool.support import open_pool

QUICK, MANY = 100, 2000
#: Damage to a device as a whole that its layout gives away: it is refused, or as good as absent.
WHOLE = ("cut", "gone", "blank", "twice", "grow")


@cache
def sample() -> Sample:
    return run(build(random.Random(11)))


async def report_of(spoilt: Spoilt) -> Report:
    """What a check of the pool finds, opened for reading."""
    pool = await open_pool(disks(spoilt.images), read_only=True)
    try:
        return await pool.check_report()
    finally:
        await pool.close()


def judge(spoilt: Spoilt) -> str:
    """How the check of one pool ended."""
    names = list(sample().images)
    guilty = {names.index(name) for name in spoilt.hit if name in names}
    try:
        with bounded():
            report = run(report_of(spoilt))
    except PoolError:
        assert any(way in spoilt.what for way in WHOLE), spoilt.what
        return "refused"
    for fault in report.faults:
        assert fault.member in guilty, f"{spoilt.what}: {fault.text}"
        assert fault.severity is not Severity.LOST, f"{spoilt.what}: {fault.text}"
        assert fault.severity is not Severity.WRONG, f"{spoilt.what}: {fault.text}"
    if report.faults:
        return "found"
    return "remarked" if report.remarks else "not found"


def trials(start: int, count: int) -> Counter[str]:
    endings: Counter[str] = Counter()
    for seed in range(start, start + 4 * count):
        spoilt = spoil(sample(), seed, forged=False)
        if spoilt.within_budget and spoilt.hit and endings.total() < count:
            endings[judge(spoilt)] += 1
    return endings


def test_damage_on_one_device_is_found_and_blamed_on_it() -> None:
    endings = trials(0, QUICK)
    assert endings.total() == QUICK
    # What is not found is in bytes without a meaning: behind a header, or in an older root slot.
    assert endings["found"] > QUICK * 3 // 4, endings
    assert endings["not found"] < QUICK // 6, endings


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many() -> None:
    # It takes longer than what pytest takes for a hang; the timeout above is the limit.
    faulthandler.cancel_dump_traceback_later()
    endings = trials(50_000, MANY)
    assert endings["found"] > MANY * 3 // 4, endings
    assert endings["not found"] < MANY // 6, endings
