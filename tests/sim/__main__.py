"""The simulation from the command line; `make sim` and `make soak` call it.

SEED=n                        one seed, with its digest
CRASH=name:n                  the workload `name`, crashed at its nth device operation
FAILPOINT=name:n:power|kill   the workload `everything`, ended at the nth pass of a failpoint
--seeds n                     n fresh seeds, every crash of the brief workload, every failpoint
--forever                     fresh seeds and random crashes, until interrupted or for MINUTES
--first n                     seeds from n on instead of fresh ones
--lives                       the seeds alone, and it is a failure if something rare never happens

As many processes as there are processors (JOBS=n) work on it. A case that takes too long counts as
failed. The last lines say how often rare things happened.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool

from pool.failpoints import FAILPOINTS

from .histogram import RARE_IN_LIVES, never_reached, table
from .scenarios import SCENARIOS, crash_at, crash_at_failpoint, passes, which
from .seeds import run_seed

OPERATIONS_MAX = 5_000
#: The brief workload ends before this many operations.
BRIEF_OPERATIONS = 800
#: Seconds that a case may take on a busy machine.
CASE_SECONDS = 120
#: Cases between two lines of progress.
PROGRESS = 100


def cases(seeds: int, first: int, *, forever: bool, lives: bool) -> Iterator[str]:
    """What to run, as variables of the environment that repeat it."""
    for name in ("SEED", "CRASH", "FAILPOINT"):
        if name in os.environ:
            yield f"{name}={os.environ[name]}"
            return
    rng = random.Random(first)
    for seed in itertools.count(first):
        if not forever and seed >= first + seeds:
            break
        yield f"SEED={seed}"
        if forever and seed % 20 == 0:
            yield f"CRASH={rng.choice(list(SCENARIOS))}:{rng.randrange(1, OPERATIONS_MAX)}"
    if lives:
        return
    yield from (f"CRASH=brief:{nth}" for nth in range(1, BRIEF_OPERATIONS))
    yield from (f"CRASH=eventful:{rng.randrange(1, OPERATIONS_MAX)}" for _ in range(seeds))
    counts = passes()
    for name in FAILPOINTS:
        for nth in which(counts[name]):
            yield from (f"FAILPOINT={name}:{nth}:{end}" for end in ("power", "kill"))


def run_case(case: str) -> tuple[str, Counter[str], str]:
    """(case, its events, what went wrong or nothing)."""
    kind, _, value = case.partition("=")
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(CASE_SECONDS)
    try:
        if kind == "SEED":
            result = run_seed(int(value))
            return case, result.events + Counter(seeds=1), ""
        name, nth, *end = value.split(":")
        if kind == "CRASH":
            return case, crash_at(name, int(nth))[0], ""
        return case, crash_at_failpoint(name, int(nth), power=end[0] == "power"), ""
    except (Exception, KeyboardInterrupt):
        return case, Counter(), traceback.format_exc()
    finally:
        signal.alarm(0)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it takes more than {CASE_SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="crash simulation")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--forever", action="store_true")
    parser.add_argument("--lives", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + float(os.environ.get("MINUTES", "inf")) * 60
    jobs = int(os.environ.get("JOBS", os.cpu_count() or 1))
    events: Counter[str] = Counter()
    failed = done = 0
    print(f"seeds from {options.first} on, {jobs} processes", flush=True)
    todo = cases(options.seeds, options.first, forever=options.forever, lives=options.lives)
    with Pool(jobs, maxtasksperchild=200) as workers:
        try:
            for case, found, trouble in workers.imap_unordered(run_case, todo):
                done += 1
                events.update(found)
                if trouble:
                    failed += 1
                    print(f"{trouble}FAILED; to repeat: make sim {case}", flush=True)
                if time.monotonic() > deadline:
                    workers.terminate()
                    break
                if done % PROGRESS == 0:
                    print(f"{done} cases, {events['seeds']} seeds, {failed} failed", flush=True)
        except KeyboardInterrupt:
            workers.terminate()
            print("interrupted")
    print(f"{done} cases, {events['seeds']} seeds, {failed} failed")
    if events["seeds"]:
        print(f"{events['requests'] // events['seeds']:10d}  requests per seed")
    print(table(events, RARE_IN_LIVES))
    if unreached := never_reached(events):
        print(f"failpoints that nothing came by: {', '.join(unreached)}")
    never = [text for name, text in RARE_IN_LIVES.items() if not events[name]]
    if options.lives and never:
        print(f"never happened: {', '.join(never)}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
