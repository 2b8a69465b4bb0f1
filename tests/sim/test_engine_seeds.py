"""Random lives of random pools: some known seeds, some fresh ones; `make test` has many more.

`SEEDS=n` sets how many fresh seeds are lived through, `SEED=n` takes just that one.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .histogram import RARE, report
from .seeds import run_seed

FRESH = int(os.environ.get("SEEDS", "12"))
ONLY = os.environ.get("SEED")
KNOWN = Path(__file__).with_name("seeds.txt")
#: Each batch runs in a process of its own under xdist.
BATCHES = 2


def known_seeds() -> list[int]:
    """Seeds that once broke the engine, or the oracle."""
    lines = KNOWN.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


@pytest.mark.skipif(ONLY is not None, reason="SEED asks for one seed only")
@pytest.mark.parametrize("batch", range(BATCHES))
def test_seeds_that_once_failed(batch: int) -> None:
    events: Counter[str] = Counter()
    seeds = known_seeds()[batch::BATCHES]
    for seed in seeds:
        events.update(run_seed(seed).events)
    report(f"{len(seeds)} known seeds", events, {"checkpoints": RARE["checkpoints"]})


def test_fresh_seeds() -> None:
    events = live_through(1 if ONLY is not None else FRESH)
    report("what happened", events, {"checkpoints": RARE["checkpoints"]})


def live_through(count: int) -> Counter[str]:
    """Fresh seeds, never the same ones; their events."""
    first = int(ONLY) if ONLY is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seeds {first} to {first + count - 1}")
    events: Counter[str] = Counter()
    for seed in range(first, first + count):
        events.update(run_seed(seed).events)
    print(f"{events['requests'] / count:.0f} requests per seed")
    return events


def test_same_seed_same_digest_in_every_process() -> None:
    here = run_seed(11).digest
    assert here != run_seed(12).digest
    root = Path(__file__).parents[2]
    code = "from tests.sim.seeds import run_seed; print(run_seed(11).digest)"
    for hash_seed in ("0", "7"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert result.stdout.strip() == here
