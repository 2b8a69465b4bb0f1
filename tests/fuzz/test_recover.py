"""`stripewell.recover` over spoilt images: right bytes or a clear report, nothing else, ever.

* Damage within the budget (one device here): everything comes back.
* Damage beyond it: what is handed out as complete is a state that the pool was in; what is not is
  named. No device is held to be damaged that is not.
* Forgery: no bytes are promised, but there is no other error than the one line for the operator, no
  large memory, no long time.

Nothing is ever written.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Sequence

import pytest

from backends.base import BLOCK_SIZE
from stripewell.errors import UserError
from stripewell.recover import report
from stripewell.recover.choice import Candidate
from stripewell.recover.journal import Ring
from stripewell.recover.remains import Remains
from stripewell.recover.restore import restore
from tests.fuzz.images import Images, Sample, build, copied
from tests.fuzz.mutations import damage, forge
from tests.sim.loop import run
from tests.unit.stripewell.recover.support import Memory, examine, quiet, restored

#: What a small pool may take of memory, and of time, whatever it claims.
MEMORY = 48 << 20
SECONDS = 10.0
PARITY = 1
#: Mutations of one test.
SEEDS = 50


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [run(build(random.Random(seed))) for seed in range(3)]


async def read_all(remains: Remains) -> None:
    """All that the command does but the printing: the report, and every volume."""
    findings = []
    for volume in list(remains.catalog.volumes.values())[:50]:
        findings.append(await remains.examine(volume))
        if not findings[-1].objection:
            await restore(remains, volume, Memory(), quiet)
    volumes = [report.volume_data(remains, finding) for finding in findings]
    data = report.pool_data(remains, findings)
    text = report.pool_text(data, report.result(remains, findings), volumes)
    assert text.replace("\n", "").isprintable()
    assert not await remains.changed()


def check_forgery(sample: Sample, seed: int) -> bool:
    """True if the pool could be opened all the same."""
    images = copied(sample.images)
    what = forge(images, random.Random(seed))
    before, started = copied(images), time.monotonic()
    tracemalloc.start()
    try:
        refusal = run(_forged(images))
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert refusal.isprintable(), what
    assert peak < MEMORY, what
    assert time.monotonic() - started < SECONDS, what
    assert images == before, what
    return not refusal


async def _forged(images: Images) -> str:
    """The line with which the command refuses, "" if it does not."""
    try:
        await read_all(await examine(images))
    except UserError as error:
        return str(error)
    return ""


def check_damage(sample: Sample, seed: int) -> bool:
    """True if everything was there."""
    images = copied(sample.images)
    what = damage(images, random.Random(seed), sample.older)
    before = copied(images)
    spoilt = [name for name, image in sample.images.items() if images.get(name) != image]
    try:
        whole = run(_damaged(sample, images, spoilt))
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert images == before, what
    return whole


async def _damaged(sample: Sample, images: Images, spoilt: Sequence[str]) -> bool:
    within = len(spoilt) <= PARITY
    try:
        remains = await examine(images)
    except UserError:
        if within:
            raise
        return False
    await read_all(remains)
    found = {name: await restored(remains, name) for name in remains.catalog.volumes}
    lost = sum(finding.lost.blocks for _, finding in found.values())
    blamed = {source.url for source in remains.sources if any(source.damage.counts().values())}
    assert blamed <= {f"memory:{name}" for name in spoilt}
    if within:
        assert remains.gaps() == []
        assert lost == 0
        assert {name: data for name, (data, _) in found.items()} == sample.volumes
    elif not remains.gaps() and not remains.problems.lines:
        assert any(_agrees(found, state) for state in sample.history), "bytes that never were"
    return not lost and not remains.gaps()


def _agrees(found: dict[str, tuple[bytes, object]], state: dict[str, bytes]) -> bool:
    """Whether all that was restored is what a state has there."""
    if found.keys() != state.keys():
        return False
    for name, (data, finding) in found.items():
        lost = {block for first, end in finding.lost.kept for block in range(first, end)}
        for block in range(len(data) // BLOCK_SIZE):
            here = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            if block not in lost and data[here] != state[name][here]:
                return False
    return True


def _unverified(data: bytes | None, crcs: Sequence[int]) -> list[bytes | None]:
    """Blocks as they were read."""
    return [None if data is None else data[i * 4096 : (i + 1) * 4096] for i in range(len(crcs))]


async def _first_replica(ring: Ring, position: int, crcs: Sequence[int]) -> list[bytes | None]:
    """What the first replica has, right or wrong."""
    return [await ring.copies[0].block(position + i) for i in range(len(crcs))]


def _oldest(
    found: Sequence[Candidate], generation: int | None = None, digest: str | None = None
) -> Candidate:
    """The root that lost."""
    return found[-1]


async def _no_parity(*_: object) -> None:
    """What is not there stays away."""


@pytest.mark.parametrize(
    ("place", "broken"),
    [
        ("stripewell.recover.stripes._right_ones", _unverified),
        ("stripewell.recover.journal.Ring.run", _first_replica),
        ("stripewell.recover.remains.choose", _oldest),
        ("stripewell.recover.stripes.Stripes._reconstruct", _no_parity),
    ],
    ids=["unverified", "first replica", "oldest root", "no parity"],
)
def test_a_recover_that_is_broken_is_caught(
    place: str, broken: object, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or these tests would prove nothing."""
    monkeypatch.setattr(place, broken)

    def search() -> None:
        for seed in range(400):
            check_damage(samples[seed % len(samples)], seed)

    with pytest.raises(AssertionError):
        search()


#: The first portions belong to the quick checks.
PORTIONS = [pytest.param(n, marks=[pytest.mark.slow] if n >= 4 else []) for n in range(40)]


@pytest.mark.parametrize("portion", PORTIONS)
def test_forged_images_give_a_report(portion: int, samples: list[Sample]) -> None:
    seeds = range(portion * SEEDS, portion * SEEDS + SEEDS)
    opened = [check_forgery(samples[seed % len(samples)], seed) for seed in seeds]
    assert any(opened)
    assert not all(opened)


@pytest.mark.parametrize("portion", PORTIONS)
def test_damaged_images_give_right_bytes_or_say_what_is_lost(
    portion: int, samples: list[Sample]
) -> None:
    seeds = range(portion * SEEDS, portion * SEEDS + SEEDS)
    whole = [check_damage(samples[seed % len(samples)], seed) for seed in seeds]
    assert any(whole)
    assert not all(whole)
