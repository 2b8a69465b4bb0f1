"""Where the shards of a stripe go, and how much fits.

Pure: the candidates and the randomness are passed in. Shards of one stripe are on distinct devices,
and on as many failure domains as there are with free slots; within that, those with the most free
space come first, so that devices of mixed sizes fill to the last slot that any choice could use.

Called by the engine for every stripe (`choose`), when the set of devices changes (`width`) and for
status (`capacity`).
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


class NoSpace(Exception):
    """Fewer devices have a free slot than the stripe has shards."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that may take a shard: its number, its free slots, and its failure domain."""

    device: int
    free: int
    domain: str


#: Order of preference, least first: shards already in the domain, minus the slots that the domain
#: has left for further ones, a random number to break ties, the device.
_Rank = tuple[int, int, float, int]


def choose(candidates: Sequence[Candidate], count: int, rng: random.Random) -> list[int]:
    """Return `count` distinct devices with a free slot each, for the shards of one stripe.

    The most shards that share a domain are as few as the devices with free slots allow. Domains
    with the most free slots go first, and in them the devices with the most: with one device per
    domain, or one domain for all, repeated calls place `capacity` stripes. Raises `NoSpace`.
    """
    usable = [candidate for candidate in candidates if candidate.free > 0]
    if len(usable) < count:
        raise NoSpace(f"{count} devices needed, {len(usable)} have free slots: delete data")
    return [rank[-1] for rank in heapq.nsmallest(count, _ranks(usable, rng))]


def _ranks(usable: Sequence[Candidate], rng: random.Random) -> list[_Rank]:
    draw = rng.random
    domains: defaultdict[str, list[tuple[int, float, int]]] = defaultdict(list)
    for candidate in usable:
        domains[candidate.domain].append((-candidate.free, draw(), candidate.device))
    ranks: list[_Rank] = []
    for members in domains.values():
        members.sort()
        left = sum([member[0] for member in members])
        for position, (free, tie, device) in enumerate(members):
            ranks.append((position, left, tie, device))
            left -= free
    return ranks


def capacity(free: Sequence[int], count: int) -> int:
    """Return how many stripes of `count` shards, on distinct devices each, fit in `free` slots.

    It is the largest S with sum(min(f, S)) >= count * S. A device can't hold more than S shards of
    S stripes, so without the j fullest the others must hold count - j of each: the least of these
    bounds is exact. Raises `ValueError` for a count below one.
    """
    if count < 1:
        raise ValueError(f"a stripe has at least one shard, not {count}")
    left = sum(free)
    stripes = left // count
    for fullest, slots in enumerate(heapq.nlargest(count - 1, free), start=1):
        left -= slots
        stripes = min(stripes, left // (count - fullest))
    return stripes


def width(active: int, data: int, parity: int) -> tuple[int, int] | None:
    """Return the (data, parity) of new stripes on `active` devices, or None if writes must stop.

    P6: too few devices narrow the data, never the parity.
    """
    narrowed = min(data, active - parity)
    return (narrowed, parity) if narrowed >= 1 else None
