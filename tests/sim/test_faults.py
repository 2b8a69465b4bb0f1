"""The one table of faults, and what random lives draw of it."""

from __future__ import annotations

from random import Random

from backends.fault_script import Delay

from . import options
from .faults import FAULTS, drawn

#: Kinds that are no rules of a script, but done by `actors` and `seeds`.
DONE_BY_HAND = {"no room", "rot", "returns old"}


def test_random_lives_know_faults_of_the_table_and_those_done_by_hand() -> None:
    assert set(options.FAULTS) - DONE_BY_HAND <= set(FAULTS)


def test_a_drawn_fault_is_that_of_the_table() -> None:
    """Only how slow a slow device is differs; and every kind draws as much as any other."""
    for kind, (ops, action) in FAULTS.items():
        rng, other = Random(5), Random(5)
        rule = drawn(kind, rng)
        assert rule.ops == ops
        assert type(rule.action) is type(action)
        assert rule.action == action or isinstance(action, Delay)
        drawn("slow", other)
        assert rng.random() == other.random()
