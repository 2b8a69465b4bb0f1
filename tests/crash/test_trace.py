"""What the notes of processes say is durable, and what a power failure may do to the rest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from backends.file import open_file
from tests.crash import trace
from tests.crash.trace import BLOCK, Disk, Recorder, TracedDevice

BLOCKS = 16


def block(fill: int) -> bytes:
    return bytes([fill]) * BLOCK


class Bench:
    """A file of zeros with two processes that write to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk"
        self.path.write_bytes(bytes(BLOCKS * BLOCK))
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.disk = Disk(self.path)
        self.file = open_file(str(self.path), url=str(self.path))
        self.one, self.other = (
            TracedDevice(self.file, Recorder(self.notes, self.file.url)) for _ in range(2)
        )

    def fail(self, seed: int) -> Counter[str]:
        self.disk.process_ended(self.notes)
        for notes in self.notes.iterdir():
            os.truncate(notes, 0)
        return self.disk.lose(Random(seed))

    def block(self, number: int) -> bytes:
        return self.path.read_bytes()[number * BLOCK : (number + 1) * BLOCK]


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(trace, "SLOWEST", 1)
    made = Bench(tmp_path)
    yield made
    await made.file.close()


@pytest.mark.parametrize("seed", range(8))
async def test_what_was_synced_stays(bench: Bench, seed: int) -> None:
    """Also by the other process, and also under a later write that is lost."""
    bench.one.append(0, [block(1)])
    await bench.other.write(BLOCK, [block(2)])
    await bench.other.sync()
    await bench.one.write(2 * BLOCK, [block(3)], sync=True)
    bench.one.append(0, [block(4)])
    fates = bench.fail(seed)
    assert fates.total() == 1
    assert bench.block(1) == block(2)
    assert bench.block(2) == block(3)
    assert set(bench.block(0)) <= {1, 4}
    if fates["lost"]:
        assert bench.block(0) == block(1)
    if fates["kept"]:
        assert bench.block(0) == block(4)


async def test_every_fate_occurs(bench: Bench) -> None:
    fates: Counter[str] = Counter()
    for seed in range(8):
        for number in range(BLOCKS):
            bench.one.append(number * BLOCK, [block(7)])
        fates += bench.fail(seed)
    assert fates.total() == 8 * BLOCKS
    assert min(fates[fate] for fate in ("kept", "lost", "torn")) > 0


async def test_a_write_that_syncs_itself_covers_no_other(bench: Bench) -> None:
    bench.one.append(0, [block(1)])
    await bench.one.write(BLOCK, [block(2)], sync=True)
    bench.disk.process_ended(bench.notes)
    assert bench.disk.unsynced == 1


async def test_a_later_synced_write_is_not_undone_by_an_earlier_one(bench: Bench) -> None:
    for seed in range(8):
        bench.one.append(0, [block(1)])
        await bench.one.write(0, [block(2)], sync=True)
        bench.fail(seed)
        assert bench.block(0) == block(2)


async def test_a_sync_covers_what_was_over_when_it_began(bench: Bench) -> None:
    number = bench.one._recorder.begin(trace.WRITE, 0, [block(1)])
    await bench.other.sync()
    bench.one._recorder.end(trace.WRITTEN, number)
    bench.disk.process_ended(bench.notes)
    assert bench.disk.unsynced == 1


async def test_of_a_write_that_a_process_died_over_only_what_is_there_may_stay(
    bench: Bench,
) -> None:
    for seed in range(8):
        bench.one._recorder.begin(trace.WRITE, 0, [block(1)])
        bench.fail(seed)
        assert bench.block(0) == bytes(BLOCK)


async def test_notes_cut_short_are_left_out(bench: Bench) -> None:
    bench.one.append(0, [block(1)])
    [path] = [note for note in bench.notes.iterdir() if note.stat().st_size]
    image = path.read_bytes()
    for length in range(0, len(image), 97):
        path.write_bytes(image[:length])
        notes = list(trace.read_notes(path))
        assert len(notes) <= 1
        assert not notes or notes[0].data == block(1)
