"""Where a volume is written to: sparse, whole or not at all, and never over a pool's device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stripewell.errors import UserError
from stripewell.recover.sinks import DiskSink, Sink, StreamSink, failed, open_sink

SIZE = 8 << 20


def fill(sink: Sink) -> None:
    sink.write(4096, memoryview(b"a" * 4096))
    sink.write(5 << 20, memoryview(b"b" * 8192))


def expected() -> bytes:
    whole = bytearray(SIZE)
    whole[4096:8192] = b"a" * 4096
    whole[5 << 20 : (5 << 20) + 8192] = b"b" * 8192
    return bytes(whole)


def test_a_file_is_sparse_and_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    sink = open_sink(str(path), SIZE, [], force=False)
    fill(sink)
    assert not path.exists()
    sink.finish(SIZE)
    assert path.read_bytes() == expected()
    assert path.stat().st_blocks * 512 < 1 << 20
    assert os.listdir(tmp_path) == ["out.img"]


def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"old")
    sink = open_sink(str(path), SIZE, [], force=True)
    fill(sink)
    sink.abandon()
    sink.abandon()
    assert os.listdir(tmp_path) == ["out.img"]
    assert path.read_bytes() == b"old"


def test_what_is_there_is_overwritten_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "out.img"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="exists"):
        open_sink(str(path), SIZE, [], force=False)
    sink = open_sink(str(path), SIZE, [], force=True)
    sink.finish(SIZE)
    assert path.read_bytes() == bytes(SIZE)


def test_a_device_of_the_pool_is_never_a_target(tmp_path: Path) -> None:
    device, link, store = tmp_path / "d.img", tmp_path / "link", tmp_path / "store"
    device.write_bytes(bytes(SIZE))
    link.symlink_to(device)
    store.mkdir()
    sources = [f"file://{device}?size=8M", f"dir://{store}"]
    for target in (device, link, store / "root-a", store / "below" / "x"):
        with pytest.raises(UserError, match="one of the devices to restore from"):
            open_sink(str(target), SIZE, sources, force=True)
    device.write_bytes(b"STRIPEWL" + bytes(SIZE))
    with pytest.raises(UserError, match="device of a stripewell pool"):
        open_sink(str(device), SIZE, [], force=True)
    assert sorted(os.listdir(tmp_path)) == ["d.img", "link", "store"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="no file and no disk"):
            open_sink(str(target), SIZE, [], force=True)
    with pytest.raises(UserError, match="No such file or directory"):
        open_sink(str(tmp_path / "nowhere" / "x"), SIZE, [], force=False)


def test_a_disk_is_zeroed_between_the_pieces_and_untouched_behind(tmp_path: Path) -> None:
    """A file stands for the disk: what differs is how it is opened."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (SIZE + 4096))
    sink = DiskSink(path, SIZE)
    fill(sink)
    sink.finish(SIZE)
    assert path.read_bytes() == expected() + b"x" * 4096
    with pytest.raises(UserError, match="use a larger disk"):
        DiskSink(path, SIZE + 8192)


def test_a_stream_gets_every_byte(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("wb") as stream:
        sink = StreamSink(stream.fileno())
        fill(sink)
        assert sink.written == (5 << 20) + 8192
        sink.finish(SIZE)
        assert sink.written == SIZE
    assert (tmp_path / "stream").read_bytes() == expected()


def test_a_stream_that_broke_says_how_far_it_came() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = StreamSink(writing)
    with pytest.raises(BrokenPipeError) as broken:
        fill(sink)
    os.close(writing)
    assert str(failed(sink, "-", broken.value)) == (
        "stdout failed after 0 bytes, Broken pipe: see what became of its reader, and try again"
    )
