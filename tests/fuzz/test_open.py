"""Damaged and hostile devices: opened and served right, or refused with one line (P4).

See `tests.fuzz.trial` for what counts. A failure names the seed of its mutation.
"""

from __future__ import annotations

import faulthandler
import random
from collections import Counter
from functools import cache

import pytest

from tests.fuzz.images import Sample, build
from tests.fuzz.trial import attempt, look, serve, spoil
from tests.sim.loop import run

QUICK, MANY = 60, 1500


@cache
def sample(number: int) -> Sample:
    """Some pools, made once."""
    shape = {"devices": 4, "data": 2, "parity": 1} if number % 2 else {}
    return run(build(random.Random(number), **shape))  # type: ignore[arg-type]


def trials(start: int, count: int, *, forged: bool) -> Counter[str]:
    """So many mutations, each looked at and served; returns the endings."""
    endings: Counter[str] = Counter()
    for seed in range(start, start + count):
        whole = sample(seed % 3)
        spoilt = spoil(whole, seed, forged=forged)
        endings["look: " + attempt(look, whole, spoilt, reading=True)] += 1
        endings["serve: " + attempt(serve, whole, spoilt, reading=False)] += 1
    return endings


@pytest.mark.parametrize("start", [0, 1000])
def test_damage(start: int) -> None:
    endings = trials(start, QUICK, forged=False)
    # Not all are refused: there is parity, and most of the damage is local.
    assert endings["look: faults"] > QUICK // 2
    assert endings["serve: served"] > QUICK // 2


@pytest.mark.parametrize("start", [2000, 3000])
def test_forgery(start: int) -> None:
    endings = trials(start, QUICK, forged=True)
    assert endings["look: refused"] > QUICK // 4
    assert endings["serve: refused"] > QUICK // 4
    assert endings["serve: served"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("forged", [False, True], ids=["damage", "forgery"])
def test_many(forged: bool) -> None:
    # It takes longer than what pytest takes for a hang; the timeout above is the limit.
    faulthandler.cancel_dump_traceback_later()
    endings = trials(10_000 + 10_000 * forged, MANY, forged=forged)
    assert sum(endings.values()) == 2 * MANY
