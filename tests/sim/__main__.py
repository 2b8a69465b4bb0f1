"""The simulation from the command line; `make sim` and `make soak` call it.

SEED=n            one seed, with its events
CRASH=name:n      the workload `name`, crashed at its nth device operation
--seeds n         n fresh seeds, and every crash of the brief workload
--forever         fresh seeds and random crashes, until interrupted or for MINUTES
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator

from .histogram import RARE
from .scenarios import SCENARIOS, crash_at
from .seeds import run_seed

#: A case: what to type to repeat it, and what to do.
Case = tuple[str, Callable[[], Counter[str]]]
OPERATIONS_MAX = 5_000
#: The brief workload ends before this many operations.
BRIEF_OPERATIONS = 800


def seed_case(seed: int) -> Case:
    return f"SEED={seed}", lambda: run_seed(seed).events


def crash_case(name: str, nth: int) -> Case:
    return f"CRASH={name}:{nth}", lambda: crash_at(name, nth)[0]


def cases(seeds: int, rng: random.Random, *, forever: bool) -> Iterator[Case]:
    """What to run, as the environment or the options say."""
    if "SEED" in os.environ:
        yield seed_case(int(os.environ["SEED"]))
        return
    if "CRASH" in os.environ:
        name, _, nth = os.environ["CRASH"].partition(":")
        yield crash_case(name, int(nth))
        return
    while forever:
        yield seed_case(rng.randrange(1 << 32))
        yield crash_case(rng.choice(list(SCENARIOS)), rng.randrange(1, OPERATIONS_MAX))
    first = rng.randrange(1 << 32)
    yield from (seed_case(first + i) for i in range(seeds))
    yield from (crash_case("brief", nth) for nth in range(1, BRIEF_OPERATIONS))
    yield from (crash_case("eventful", rng.randrange(1, OPERATIONS_MAX)) for _ in range(seeds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="crash simulation")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--forever", action="store_true")
    options = parser.parse_args()
    minutes = float(os.environ.get("MINUTES", "inf"))
    deadline = time.monotonic() + minutes * 60
    events: Counter[str] = Counter()
    failed = done = 0
    try:
        for name, run in cases(options.seeds, random.SystemRandom(), forever=options.forever):
            if time.monotonic() > deadline:
                break
            try:
                events.update(run())
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"FAILED; to repeat: make sim {name}", flush=True)
            done += 1
            if done % 50 == 0:
                print(f"{done} cases, {failed} failed", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print(f"{done} cases, {failed} failed")
    for key, text in RARE.items():
        print(f"{events[key]:8d}  {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
