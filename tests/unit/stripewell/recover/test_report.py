"""What the command says: numbers that agree with each other, and every device by name."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from stripewell.recover import report
from stripewell.recover.damage import MOST, Damage, in_words, note
from tests.fuzz.anatomy import Anatomy
from tests.fuzz.images import Images, Sample, build, copied
from tests.sim.loop import run
from tests.unit.stripewell.recover.support import everything, examine


@pytest.fixture(scope="module")
def sample() -> Sample:
    return run(build(random.Random(3)))


def reported(images: Images, generation: int | None = None) -> tuple[dict[str, Any], str]:
    """The pool as data and in words."""

    async def scenario() -> tuple[dict[str, Any], str]:
        remains = await examine(images, generation)
        data = report.pool_data(remains)
        return data, report.pool_text(data, report.result(remains, []), [])

    return run(scenario())


def test_a_copy_of_a_device_counts_as_the_same(sample: Sample) -> None:
    images = copied(sample.images)
    data, text = reported(images | {f"{name} again": images[name] for name in "abc"})
    assert (data["root"]["devices"], data["root"]["active"]) == (4, 4)
    assert "on 4 of 4 active devices" in text


def test_a_root_that_is_not_the_newest_is_on_its_devices_all_the_same(sample: Sample) -> None:
    images = copied(sample.images)
    older = Anatomy(images).root["generation"] - 1
    _, text = reported(images, older)
    assert f"generation {older}" in text
    assert "on 4 of 4 active devices" in text


def test_copies_of_the_journal_are_counted_against_those_there_should_be(sample: Sample) -> None:
    images = copied(sample.images)
    holders = [name for name, _ in Anatomy(images).ring(0)]
    _, text = reported(images)
    assert f"{len(holders)} of {len(holders)} copies here" in text
    del images[holders[0]]
    _, text = reported(images)
    assert f"{len(holders) - 1} of {len(holders)} copies here" in text


def test_without_the_journal_no_number_is_made_up(sample: Sample) -> None:
    """As of a root that names replicas on a device that is not there."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    [stream] = anatomy.root["streams"]
    stream["replicas"] = [one for one in stream["replicas"] if one["member"] == 0]
    anatomy.write_root(anatomy.root)
    del images["a"]
    _, text = reported(images)
    assert f"journal   from {stream['replay']}: none of 1 copies is here" in text


def test_members_that_are_gone_are_listed_as_such(sample: Sample) -> None:
    """Named or not: what the pool let go may still have what the others lack."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    anatomy.root["members"][3] |= {"state": "gone", "reason": "did not answer"}
    for name in "abc":
        anatomy.write_root(anatomy.root, only=name)
    there, text = reported(images)
    assert [one["state"] for one in there["devices"]] == ["used", "used", "used", "gone"]
    assert "on 3 of 3 active devices" in text
    assert "memory:d (the pool goes on without it: did not answer)" in text
    del images["d"]
    absent, text = reported(images)
    assert absent["devices"][3]["index"] == 3
    assert absent["devices"][3]["state"] == "gone"
    assert "(last seen there, the pool goes on without it: did not answer)" in text
    assert absent["complete"]


def spoilt(sample: Sample, structures: tuple[str, ...], device: str) -> Images:
    """One device's structures with their first byte wrong."""
    images = copied(sample.images)
    for region in Anatomy(images).regions():
        if region.structure in structures and region.device == device:
            images[device][region.offset] ^= 1
    return images


async def damage_of(images: Images) -> list[dict[str, int]]:
    """What is held against each device when everything was read, and nothing was lost."""
    remains = await examine(images)
    await everything(remains)
    data = report.pool_data(remains)
    text = report.pool_text(data, report.result(remains, []), [])
    found = [device["damage"] for device in data["devices"]]
    for device, damage in zip(data["devices"], found, strict=True):
        named = f"damage: device {device['index']} at {device['url']} has "
        assert (named in text) == any(damage.values())
    return found


PAGES = ("top page", "table page", "directory page", "leaf page")
#: The structures that are spoilt, and the count that has to tell.
KINDS = [
    (("shard",), "shard_blocks"),
    (("shard", "stripe header"), "shard_headers"),
    (PAGES, "shard_blocks"),
    (("journal header",), "journal_blocks"),
    (("journal payload",), "journal_blocks"),
]


@pytest.mark.parametrize(("structures", "kind"), KINDS)
def test_the_device_that_is_damaged_is_named(
    sample: Sample, structures: tuple[str, ...], kind: str
) -> None:
    """And no other, though all of them are read to make up for it."""
    anatomy = Anatomy(copied(sample.images))
    device = next(one.device for one in anatomy.regions() if one.structure in structures)
    found = run(damage_of(spoilt(sample, structures, device)))
    for index, name in enumerate(sample.images):
        assert (found[index][kind] > 0) == (name == device)
        assert name == device or not any(found[index].values())


def test_damage_is_counted_once_however_often_it_is_met(sample: Sample) -> None:
    images = copied(sample.images)
    first = next(copy for copy in Anatomy(images).copies if copy.device == "b")
    images["b"][first.offset] ^= 1

    async def scenario() -> None:
        remains = await examine(images)
        for _ in range(2):
            await everything(remains)
        assert remains.damaged() == ["device 1 at memory:b has 1 superblock wrong or unreadable"]

    run(scenario())


def test_a_pool_without_damage_has_none(sample: Sample) -> None:
    """Neither what was never synced on all replicas, nor a slot that was never written."""
    for state in (sample.images, run(build(random.Random(5), flushed=False)).images):
        assert not any(any(one.values()) for one in run(damage_of(copied(state))))


def test_more_damage_than_is_kept_is_said_to_be_more() -> None:
    damage = Damage()
    note(damage.blocks, range(MOST + 5))
    assert in_words(damage.counts()) == "10000 or more shard blocks wrong or unreadable"


def judged(images: Images, *, verify: bool = False) -> tuple[list[Any], str, bool]:
    """What the listing says of alpha and of the pool; whether restoring is refused for the pool."""

    async def scenario() -> tuple[list[Any], str, bool]:
        remains = await examine(images)
        findings = [await remains.examine(remains.catalog.volumes["alpha"], verify=verify)]
        [volume] = [report.volume_data(remains, finding) for finding in findings]
        line = report.result(remains, findings)
        assert report.pool_data(remains, findings)["complete"] == (not line.startswith("not "))
        return [volume["restorable"], volume["lost_blocks"]], line, bool(remains.doubts())

    return run(scenario())


def test_the_verdict_is_that_of_the_counts(sample: Sample) -> None:
    said, line, _ = judged(copied(sample.images))
    assert said == ["unverified", 0]
    assert line.startswith("complete, unless what was not read is damaged: --verify")
    said, line, _ = judged(copied(sample.images), verify=True)
    assert said == ["yes", 0]
    assert line.startswith("complete: everything that was ever flushed is here")
    images = copied(sample.images)
    for name in "cd":
        images[name] = spoilt(sample, ("shard",), name)[name]
    for region in Anatomy(copied(sample.images)).regions():
        if region.structure in PAGES:
            here = slice(region.offset, region.offset + region.length)
            images[region.device][here] = sample.images[region.device][here]
    (restorable, lost), line, _ = judged(images, verify=True)
    assert (restorable, line.startswith("not complete: volume alpha: ")) == ("incomplete", True)
    assert f"{lost} block" in line


def test_what_restoring_refuses_is_not_called_restorable(sample: Sample) -> None:
    """A map with an entry that makes no sense has lost nobody knows what: without it the blocks
    would be taken for holes."""
    images = copied(sample.images)
    anatomy = Anatomy(images)
    top = next(at for at in anatomy.pages if at.page.kind == 4)
    found = json.loads(bytes(top.page.body))
    found["directories"].append([1, -1, 0, 0, 0, 0])
    anatomy.write_page(top, json.dumps(found, separators=(",", ":")).encode())
    said, line, refused = judged(images, verify=True)
    assert said == ["incomplete", 0]
    assert line.startswith("not complete: parts of the map make no sense: a directory of the map")
    assert refused


def test_devices_that_stopped_to_answer_count_as_missing(sample: Sample) -> None:
    async def scenario() -> None:
        remains = await examine(copied(sample.images))
        volume = remains.catalog.volumes["alpha"]
        assert not (await remains.examine(volume)).lost.blocks
        for source in remains.sources[:2]:
            source.hangs = True
        finding = await remains.examine(volume)
        assert finding.lost.blocks
        assert report.volume_data(remains, finding)["restorable"] == "incomplete"

    run(scenario())
