"""Crashes at the Nth device operation of fixed workloads, then recovery, judged by the oracle.

Every N of both workloads would take minutes here: each case takes a stride of its own, and `make
sim` takes every N of the brief one. Strides are odd, so that each kind of ending meets each phase.
"""

from __future__ import annotations

from collections import Counter

import pytest

from .histogram import RARE, report
from .scenarios import SCENARIOS, crash_at, flush_and_lose, fork

#: (workload, first operation, stride).
STRIDES = [("brief", 1, 17), ("brief", 7, 17), ("eventful", 3, 331), ("eventful", 41, 211)]
#: A workload that goes on this long does not end.
OPERATIONS_MAX = 20_000


def enumerate_crashes(name: str, first: int, stride: int) -> tuple[Counter[str], int]:
    """Crash at every `stride`th operation until the workload ends before; the events, the cases."""
    events: Counter[str] = Counter()
    for cases, nth in enumerate(range(first, OPERATIONS_MAX, stride), start=1):
        found, completed = crash_at(name, nth)
        events.update(found)
        if completed:
            return events, cases
    raise AssertionError(f"{name} does not end within {OPERATIONS_MAX} operations")


@pytest.mark.parametrize(("name", "first", "stride"), STRIDES)
def test_every_crash_leaves_a_prefix(name: str, first: int, stride: int) -> None:
    events, cases = enumerate_crashes(name, first, stride)
    wanted = RARE if name == "eventful" else {"crashes_in_recovery": RARE["crashes_in_recovery"]}
    report(f"{name}: {cases} crashes, from operation {first} in steps of {stride}", events, wanted)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_workload_goes_through_everything_rare(name: str) -> None:
    """Without a crash: what `crash_at` does afterwards must not be what fills the histogram."""
    events, completed = crash_at(name, OPERATIONS_MAX)
    assert completed
    assert events["journal_laps"] >= 2
    assert events["checkpoints"] >= 1
    assert events["trims_overwritten"] >= 1
    assert events["slots_reused"] >= 1


@pytest.mark.parametrize("seed", range(7))
def test_what_was_flushed_survives_the_loss_of_the_first_replica(seed: int) -> None:
    flush_and_lose(seed)


@pytest.mark.parametrize("seed", range(3))
def test_of_two_roots_of_one_generation_the_committed_one_counts(seed: int) -> None:
    fork(seed)
