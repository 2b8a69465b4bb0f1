"""Kinds of faults that are rules, by name: one table for random lives and for `test_engine_faults`.

Other kinds (rot, no room, old copies) need to know the device; they are in `actors` and `seeds`.
"""

from __future__ import annotations

from random import Random

from backends.fault_script import (
    OPERATIONS,
    READS,
    WRITES,
    Action,
    ApplyThenFail,
    Delay,
    Fail,
    FlipBits,
    Hang,
    Rule,
    ShortRead,
    Vanish,
)

SYNC = frozenset({"sync"})
#: What may take its time; an append may not.
SLOW = READS | {"write", "sync", "put"}

#: Which operations a fault hits, and what it does to them. Random lives know those that
#: `options.FAULTS` names.
FAULTS: dict[str, tuple[frozenset[str], Action]] = {
    "reads fail": (READS, Fail()),
    "short reads": (READS, ShortRead()),
    "bits flip": (READS, FlipBits(3)),
    "reads hang": (READS, Hang()),
    "writes fail": (WRITES, Fail()),
    "applied, then failed": (SYNC | WRITES, ApplyThenFail()),
    "syncs fail": (SYNC, Fail()),
    "syncs hang": (SYNC, Hang()),
    "slow": (SLOW, Delay(3.0)),
    "hangs": (SLOW, Hang()),
    "vanishes": (OPERATIONS, Vanish()),
}


def drawn(kind: str, rng: Random) -> Rule:
    """A rule for a fault of that kind that comes once, a few times or for good."""
    delay = Delay(rng.choice((0.1, 5.0, 40.0)))
    ops, action = FAULTS[kind]
    return Rule(
        ops,
        delay if isinstance(action, Delay) else action,
        times=rng.choice((1, 3, None)),
        chance=rng.choice((1.0, 0.3)),
    )
