"""The simulation from the command line; `make sim` and `make soak` call it.

One case, if the environment names one (`cases`): SEED=n, CRASH=name:n, FAILPOINT=name:n:power|kill.
Else:

--seeds n      n fresh seeds; beside them every crash of the brief workload, n random ones of the
               eventful one, and every failpoint; with n below 200 a random share of these
--forever      fresh seeds and random crashes, until interrupted or for MINUTES
--first n      seeds from n on instead of fresh ones
--lives        the seeds alone, and it is a failure if something rare never happens

As many processes as there are processors (JOBS=n) work on it. A case that takes too long counts as
failed. The last lines say how often rare things happened. Exit status: 0 all is well, 1 a case
failed, 2 it was asked wrongly.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pool
from typing import NoReturn

from . import cases
from .cases import Mistake
from .histogram import RARE_IN_LIVES, happened, never_reached, table

#: Seconds that a case may take on a busy machine.
CASE_SECONDS = 120
#: Cases between two lines of progress.
PROGRESS = 100


def run_case(case: str) -> tuple[str, Counter[str], str]:
    """(case, its events, what went wrong or nothing)."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(CASE_SECONDS)
    try:
        return case, cases.parse(case).live(), ""
    except (Exception, KeyboardInterrupt):
        return case, Counter(), traceback.format_exc()
    finally:
        signal.alarm(0)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"it takes more than {CASE_SECONDS} s")


@dataclass(slots=True)
class Tally:
    """What came of the cases so far."""

    events: Counter[str] = field(default_factory=Counter)
    done: int = 0
    failed: int = 0

    def add(self, case: str, events: Counter[str], trouble: str) -> None:
        self.done += 1
        self.events.update(events)
        if trouble:
            self.failed += 1
            print(f"{trouble}FAILED; to repeat: make sim {case}", flush=True)

    def __str__(self) -> str:
        return f"{self.done} cases, {self.events['seeds']} seeds, {self.failed} failed"


def run_one(case: str) -> int:
    """Run a case in this process, and print what happened in it."""
    tally = Tally()
    tally.add(*run_case(case))
    if not tally.failed:
        print(f"{case}: nothing went wrong\n{happened(tally.events, RARE_IN_LIVES)}")
    return 1 if tally.failed else 0


def run_all(todo: Iterable[str], jobs: int, seconds: float) -> Tally:
    """Run cases in `jobs` processes, until all are done, time is up, or somebody interrupts."""
    tally = Tally()
    deadline = time.monotonic() + seconds
    with Pool(jobs, maxtasksperchild=200) as workers:
        try:
            for result in workers.imap_unordered(run_case, todo):
                tally.add(*result)
                if time.monotonic() > deadline:
                    break
                if tally.done % PROGRESS == 0:
                    print(tally, flush=True)
        except KeyboardInterrupt:
            print("interrupted")
    return tally


def report(tally: Tally, *, lives: bool) -> int:
    """Print what happened in all cases; the exit status."""
    events = tally.events
    print(tally)
    if events["seeds"]:
        print(f"{events['requests'] // events['seeds']:10d}  requests per seed")
    print(table(events, RARE_IN_LIVES))
    if unreached := never_reached(events):
        print(f"failpoints that nothing came by: {', '.join(unreached)}")
    never = [text for name, text in RARE_IN_LIVES.items() if not events[name]]
    if lives and never:
        print(f"never happened: {', '.join(never)}")
        return 1
    return 1 if tally.failed else 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message}; -h lists the options")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises Mistake."""
    parser = Parser(prog="python -m tests.sim", description="crash simulation")
    parser.add_argument("--seeds", metavar="n", default=str(cases.SEEDS_FOR_ALL), help="how many")
    parser.add_argument("--first", metavar="n", help="seeds from n on instead of fresh ones")
    parser.add_argument("--forever", action="store_true", help="until interrupted, or for MINUTES")
    parser.add_argument("--lives", action="store_true", help="seeds alone; all rare things happen")
    return parser.parse_args(arguments)


def _number(name: str, text: str, least: int) -> int:
    """Raises Mistake."""
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least):
        raise Mistake(f"{name}={text}: write a whole number from {least} on")
    return int(text)


def _minutes(environment: Mapping[str, str]) -> float:
    """Raises Mistake."""
    text = environment.get("MINUTES") or "inf"
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise Mistake(f"MINUTES={text}: write a number above 0")
    return minutes


def _work(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> int:
    """Raises Mistake."""
    options = _options(arguments)
    seeds = _number("SEEDS", options.seeds, 1)
    fresh = random.SystemRandom().randrange(1 << 32)
    first = fresh if options.first is None else _number("--first", options.first, 0)
    jobs = _number("JOBS", environment.get("JOBS") or str(os.cpu_count() or 1), 1)
    minutes = _minutes(environment)
    if one := cases.asked_for(environment):
        return run_one(one)
    todo = cases.without_end(first) if options.forever else cases.fresh(seeds, first)
    print(f"seeds from {first} on, {jobs} processes", flush=True)
    if not (options.forever or options.lives):
        text, crashes = cases.crashes(seeds, first)
        print(f"{seeds} seeds, {text}", flush=True)
        if seeds < cases.SEEDS_FOR_ALL:
            print(f"SEEDS={cases.SEEDS_FOR_ALL} or more takes all of these", flush=True)
        todo = iter([*todo, *crashes])
    return report(run_all(todo, jobs, minutes * 60), lives=options.lives)


def main(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    try:
        return _work(arguments, environment)
    except Mistake as mistake:
        print(f"sim: {mistake}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
