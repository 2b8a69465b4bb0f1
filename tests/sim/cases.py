"""Cases of the simulation as variables of the environment that repeat them, and which to run.

SEED=n                        one seed
CRASH=name:n                  the workload `name`, crashed at its nth device operation
FAILPOINT=name:n:power|kill   the workload `everything`, ended at the nth pass of a failpoint

Called by `__main__`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TypeVar

from pool.failpoints import FAILPOINTS

from .scenarios import SCENARIOS, crash_at, crash_at_failpoint, operations, passes, which
from .seeds import run_seed

T = TypeVar("T")

#: Variables that may name a case.
KINDS = ("SEED", "CRASH", "FAILPOINT")
#: With as many seeds as this, every crash of the brief workload and every failpoint is run; with
#: fewer a share of them.
SEEDS_FOR_ALL = 200
#: Seeds between two random crashes, in a run without end.
SEEDS_PER_CRASH = 20


class Mistake(Exception):
    """Something was asked wrongly; `str()` is one line that says what to write."""


# -- one case --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seed:
    number: int

    def live(self) -> Counter[str]:
        """Its events. Raises Violation, or whatever broke."""
        return run_seed(self.number).events + Counter(seeds=1)


@dataclass(frozen=True, slots=True)
class CrashAt:
    workload: str
    nth: int

    def live(self) -> Counter[str]:
        return crash_at(self.workload, self.nth)[0]


@dataclass(frozen=True, slots=True)
class EndAt:
    failpoint: str
    nth: int
    power: bool

    def live(self) -> Counter[str]:
        return crash_at_failpoint(self.failpoint, self.nth, power=self.power)


Case = Seed | CrashAt | EndAt


def parse(text: str) -> Case:
    """The case that `text` describes. Raises Mistake if it describes none."""
    kind, _, value = text.partition("=")
    case = {"SEED": _seed, "CRASH": _crash, "FAILPOINT": _failpoint}[kind]
    return case(text, value)


def _seed(text: str, value: str) -> Case:
    if not re.fullmatch("[0-9]{1,18}", value):
        raise Mistake(f"{text} is no seed: write a number, as in SEED=12345")
    return Seed(int(value))


def _crash(text: str, value: str) -> Case:
    match = re.fullmatch("(.+):([1-9][0-9]{0,17})", value)
    if match is None:
        raise Mistake(f"{text}: write a workload and which operation, as in CRASH=brief:417")
    name, nth = match[1], int(match[2])
    if name not in SCENARIOS:
        raise Mistake(f"{text}: there is no workload {name!r}: write one of {', '.join(SCENARIOS)}")
    return CrashAt(name, nth)


def _failpoint(text: str, value: str) -> Case:
    match = re.fullmatch("(.+):([1-9][0-9]{0,17}):(power|kill)", value)
    if match is None:
        raise Mistake(
            f"{text}: write a failpoint, which pass, and power or kill, as in"
            " FAILPOINT=term_after_root_before_copy:2:power"
        )
    name, nth = match[1], int(match[2])
    if name not in FAILPOINTS:
        raise Mistake(f"{text}: there is no failpoint {name!r}: see pool/failpoints.py")
    return EndAt(name, nth, match[3] == "power")


def refuse_beyond(text: str) -> None:
    """Raises Mistake for a crash that would not come, since the workload ends before."""
    match parse(text):
        case CrashAt(name, nth) if nth > _operations(name):
            raise Mistake(f"{text}: the workload {name} has only {_operations(name)} operations")
        case EndAt(name, nth) if nth > _passes()[name]:
            raise Mistake(f"{text}: the workload comes by it only {_passes()[name]} times")


# -- which to run ----------------------------------------------------------------------------


def asked_for(environment: Mapping[str, str]) -> str | None:
    """The one case that was asked for. Raises Mistake if it cannot be."""
    given = [f"{kind}={environment[kind]}" for kind in KINDS if environment.get(kind)]
    if len(given) > 1:
        raise Mistake(f"{' and '.join(given)}: give one of them")
    for text in given:
        refuse_beyond(text)
    return given[0] if given else None


def fresh(seeds: int, first: int) -> Iterator[str]:
    return (f"SEED={seed}" for seed in range(first, first + seeds))


def without_end(first: int) -> Iterator[str]:
    """Fresh seeds, and a random crash now and then."""
    rng = Random(first)
    for seed in itertools.count(first):
        yield f"SEED={seed}"
        if seed % SEEDS_PER_CRASH == 0:
            name = rng.choice(list(SCENARIOS))
            yield f"CRASH={name}:{rng.randint(1, _operations(name))}"


def crashes(seeds: int, first: int) -> tuple[str, list[str]]:
    """What to run beside so many seeds, in words and as cases: as large a share of all crashes of
    the brief workload, of as many random ones of the eventful one, and of all failpoints, as the
    seeds are of 200."""
    rng = Random(first)
    brief = [f"CRASH=brief:{nth}" for nth in range(1, _operations("brief") + 1)]
    ends = [
        f"FAILPOINT={name}:{nth}:{end}"
        for name in FAILPOINTS
        for nth in which(_passes()[name])
        for end in ("power", "kill")
    ]
    some, few = _share(brief, seeds, rng), _share(ends, seeds, rng)
    eventful = [f"CRASH=eventful:{rng.randint(1, _operations('eventful'))}" for _ in range(seeds)]
    text = (
        f"{len(some)} of {len(brief)} crashes of brief, {len(eventful)} of eventful,"
        f" {len(few)} of {len(ends)} ends at failpoints"
    )
    return text, [*some, *eventful, *few]


def _share(cases: Sequence[T], seeds: int, rng: Random) -> list[T]:
    """All of them, or a random share that befits the number of seeds; at least one."""
    if seeds >= SEEDS_FOR_ALL:
        return list(cases)
    count = max(1, len(cases) * seeds // SEEDS_FOR_ALL)
    return [cases[at] for at in sorted(rng.sample(range(len(cases)), count))]


_operations = cache(operations)
_passes = cache(passes)
