"""Crashes at every failpoint of the engine, and again in the recoveries that follow.

Every name of `pool.failpoints.FAILPOINTS` is a case of its own, so that the list of tests is the
list of orders that recovery relies on.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from pool.failpoints import FAILPOINTS

from .scenarios import crash_at_failpoint, passes, which


@cache
def counted() -> Counter[str]:
    """How often the workload comes by each; the same in every run."""
    return passes()


def test_the_workload_comes_by_every_failpoint() -> None:
    counts = counted()
    assert [name for name in FAILPOINTS if not counts[name]] == []


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_crash_there_leaves_a_prefix(name: str) -> None:
    """At its first pass, by power loss: the quick half."""
    events = crash_at_failpoint(name, 1, power=True)
    assert events[f"died at {name}"] == 1
    assert events["recoveries"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAILPOINTS)
def test_later_crashes_there_leave_a_prefix(name: str) -> None:
    """At later passes and the last one, by kill and by power loss."""
    events: Counter[str] = Counter()
    cases = [(nth, power) for nth in which(counted()[name]) for power in (True, False)]
    for nth, power in cases:
        events.update(crash_at_failpoint(name, nth, power=power))
    assert events[f"died at {name}"] == len(cases)
