"""What one seed draws: the pool, its machine, its clients and their luck. Not all at once: a run in
which some things never happen lets others happen more often ("swarm testing")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from pool import failpoints
from pool.blockmap import LEAF_BLOCKS

from .world import KIB, SMALL, TIGHT, WIDE, Shape

SHAPES = (
    WIDE,
    SMALL,
    TIGHT,
    Shape(4, 2, 8),
    Shape(2, 2, 5),
    Shape(1, 1, 3, journal_kib=64),
    Shape(2, 1, 5, journal_kib=64, stores=2),
    Shape(3, 2, 7, journal_kib=128, stores=2),
    Shape(1, 2, 5, device_kib=1024, journal_kib=64),
)
#: What users may ask for.
REQUESTS = ("write", "odd write", "fua", "flush", "trim", "zero", "read", "status", "sync write")
_USUAL = (30, 12, 5, 10, 6, 4, 18, 3, 3)
#: What may go wrong with an unlucky device.
FAULTS = (
    "reads fail", "writes fail", "syncs fail", "applied, then failed", "bits flip", "short reads",
    "slow", "hangs", "vanishes", "no room", "rot", "returns old",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that is decided before a run begins."""

    shape: Shape
    #: Longest time of a device operation, and of bytes on their way, in virtual seconds.
    latency: float
    network: float
    #: Bytes that a socket takes before the client has received some.
    socket: int
    #: Chance that a read finds its data in the page cache.
    cached: float
    leaf_budget: int
    users: int
    connections: int
    requests: int
    volume_blocks: int
    #: Where in a volume its users work: at the beginning, or across the border of two map leaves.
    first_block: int
    sparse_max: int
    #: Share of a volume that gets most of the writes.
    hot: float
    weights: tuple[int, ...]
    #: Faults that this run knows, and how many come in a life.
    faults: tuple[str, ...]
    faults_per_life: int
    lives: int
    #: Chance that a life ends by power loss rather than by a kill.
    power: float
    #: How a life ends: at a device operation, at a failpoint, or as it should.
    endings: tuple[str, ...]
    failpoints: tuple[str, ...]
    #: Chance that an unlucky device is not there at the next opening.
    away: float
    cuts: int
    babble: bool
    operator: int
    beyond: bool
    #: How often another server goes on with the connections.
    upgrades: int


def draw(seed: int) -> Options:
    """The options of a seed."""
    rng = Random(f"options {seed}")
    silenced = {rng.choice(REQUESTS[1:]) for _ in range(rng.randrange(3))}
    weights = tuple(
        0 if name in silenced else weight * rng.choice((1, 1, 1, 4))
        for name, weight in zip(REQUESTS, _USUAL, strict=True)
    )
    # Where the journal is tiny, everything else is checkpoints.
    shape = rng.choice(SHAPES)
    shape = replace(shape, journal_kib=rng.choice((shape.journal_kib, 192, 256)))
    return Options(
        shape=shape,
        latency=rng.choice((0.0005, 0.002, 0.02)),
        network=rng.choice((0.0001, 0.001, 0.01)),
        socket=rng.choice((2 * KIB, 24 * KIB)),
        cached=rng.choice((0.0, 0.5, 0.5, 1.0)),
        leaf_budget=rng.choice((1, 64 * KIB)),
        users=rng.randint(2, 5),
        connections=rng.randint(1, 3),
        requests=rng.choice((80, 110, 150)),
        volume_blocks=rng.choice((16, 80, 80, 80)),
        first_block=rng.choice((0, 0, LEAF_BLOCKS - 20)),
        sparse_max=rng.choice((6, 30, 340)),
        hot=rng.choice((0.1, 0.5, 1.0)),
        weights=weights,
        faults=tuple(rng.sample(FAULTS, rng.choice((1, 3, len(FAULTS))))),
        faults_per_life=rng.choice((0, 1, 2, 4)),
        lives=rng.choice((2, 3, 3)),
        power=rng.choice((0.3, 0.6, 0.9)),
        endings=rng.choice((("operation",), ("failpoint",), ("operation", "failpoint", "clean"))),
        failpoints=tuple(failpoints.FAILPOINTS),
        away=rng.choice((0.0, 0.2, 0.5)),
        cuts=rng.choice((0, 2, 6)),
        babble=rng.random() < 0.3,
        operator=rng.choice((0, 2, 4)),
        beyond=rng.random() < 0.25,
        upgrades=rng.choice((0, 0, 1, 4)),
    )
