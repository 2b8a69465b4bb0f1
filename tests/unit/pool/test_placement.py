"""Placement: distinct devices, spread domains, and not one stripe less than fits."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.placement import Candidate, NoSpace, capacity, choose, width

slots = st.lists(st.integers(0, 40), min_size=1, max_size=12)
counts = st.integers(1, 8)
seeds = st.integers(0, 2**32)


def place_all(
    free: list[int], domains: list[str], count: int, rng: random.Random
) -> list[list[int]]:
    """Choose until nothing fits; return the stripes."""
    left = list(free)
    stripes: list[list[int]] = []
    while True:
        candidates = [
            Candidate(device, slots, domain)
            for device, (slots, domain) in enumerate(zip(left, domains, strict=True))
        ]
        try:
            stripe = choose(candidates, count, rng)
        except NoSpace:
            return stripes
        for device in stripe:
            left[device] -= 1
        assert min(left) >= 0
        stripes.append(stripe)


@given(slots, counts)
def test_capacity_is_the_most_that_its_definition_allows(free: list[int], count: int) -> None:
    def fits(stripes: int) -> bool:
        return sum(min(slots, stripes) for slots in free) >= count * stripes

    most = capacity(free, count)
    assert fits(most)
    assert not any(fits(more) for more in range(most + 1, sum(free) + 2))


@given(slots, counts, seeds, st.booleans())
def test_choose_fills_to_capacity(free: list[int], count: int, seed: int, one: bool) -> None:
    domains = ["" if one else str(device) for device in range(len(free))]
    stripes = place_all(free, domains, count, random.Random(seed))
    assert len(stripes) == capacity(free, count)
    assert all(len(set(stripe)) == count for stripe in stripes)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcd")), min_size=1), counts, seeds)
def test_the_most_shards_in_one_domain_are_as_few_as_possible(
    devices: list[tuple[int, str]], count: int, seed: int
) -> None:
    candidates = [Candidate(i, free, domain) for i, (free, domain) in enumerate(devices)]
    usable = Counter(candidate.domain for candidate in candidates if candidate.free)
    if usable.total() < count:
        with pytest.raises(NoSpace):
            choose(candidates, count, random.Random(seed))
        return
    chosen = choose(candidates, count, random.Random(seed))
    assert len(set(chosen)) == count
    assert all(candidates[device].free for device in chosen)
    worst = max(Counter(candidates[device].domain for device in chosen).values())
    fewest = next(
        most for most in range(1, count + 1) if sum(min(n, most) for n in usable.values()) >= count
    )
    assert worst == fewest


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcdef")), min_size=1), counts, seeds)
def test_as_many_stripes_as_can_be_are_on_distinct_domains(
    devices: list[tuple[int, str]], count: int, seed: int
) -> None:
    free, domains = [free for free, _ in devices], [domain for _, domain in devices]
    totals: Counter[str] = Counter()
    for slots, domain in devices:
        totals[domain] += slots
    stripes = place_all(free, domains, count, random.Random(seed))
    apart = [stripe for stripe in stripes if len({domains[device] for device in stripe}) == count]
    assert len(apart) == capacity(list(totals.values()), count)
    assert stripes[: len(apart)] == apart


def test_ties_are_broken_by_the_given_randomness() -> None:
    equal = [Candidate(device, 7, str(device)) for device in range(6)]
    rng = random.Random(3)
    load = Counter(device for _ in range(600) for device in choose(equal, 2, rng))
    assert set(load) == set(range(6))
    assert min(load.values()) > 120
    assert choose(equal, 3, random.Random(5)) == choose(equal, 3, random.Random(5))


def test_a_new_empty_device_is_used_by_the_very_next_stripe() -> None:
    old = [Candidate(device, 3, str(device)) for device in range(6)]
    assert 6 in choose([*old, Candidate(6, 1000, "6")], 3, random.Random(0))


def test_no_space_says_how_many_devices_are_short() -> None:
    devices = [Candidate(0, 5, "a"), Candidate(1, 0, "b"), Candidate(2, 5, "c")]
    with pytest.raises(NoSpace, match=r"^3 devices needed, 2 have free slots"):
        choose(devices, 3, random.Random(0))


def test_a_stripe_without_shards_has_no_capacity() -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        capacity([1, 2], 0)


@pytest.mark.parametrize(
    ("free", "count", "stripes"),
    [([], 1, 0), ([9], 2, 0), ([9, 1], 2, 1), ([10, 10, 20], 2, 20), ([5] * 6, 6, 5), ([7], 1, 7)],
)
def test_capacity_of_known_pools(free: list[int], count: int, stripes: int) -> None:
    assert capacity(free, count) == stripes


@pytest.mark.parametrize(
    ("active", "expected"),
    [(9, (4, 2)), (6, (4, 2)), (5, (3, 2)), (4, (2, 2)), (3, (1, 2)), (2, None), (0, None)],
)
def test_missing_devices_narrow_the_data_and_keep_the_parity(
    active: int, expected: tuple[int, int] | None
) -> None:
    assert width(active, 4, 2) == expected


def test_without_parity_any_device_will_do() -> None:
    assert width(1, 4, 0) == (1, 0)
    assert width(0, 4, 0) is None
