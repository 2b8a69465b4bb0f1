"""The measurements' own parts: a wrong figure is worse than none."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import fio
from bench.compare import drain
from bench.deployment import CommandFailed, Deployment
from bench.jobs import JOBS
from bench.processes import alive, end, family, resident_bytes
from bench.report import Row, markdown
from bench.servers import QemuNbd


@pytest.fixture
def peer(folder: Path) -> Iterator[QemuNbd]:
    server = QemuNbd(folder / "peer")
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_fio_counts_operations_of_all_connections(peer: QemuNbd) -> None:
    options = {"rw": "randwrite", "bs": "4k", "io_size": "256k", "fsync": "1", "numjobs": "4"}
    result = fio.run(peer.uri, options)
    assert result.operations == 4 * 64
    assert result.bytes == 4 * 64 * 4096
    assert result.seconds > 0
    assert 0 < result.write_latency[50.0] <= result.write_latency[99.99]
    assert fio.flush(peer.uri) > 0
    fio.first_read(peer.uri)


def test_fio_failures_are_one_exception(folder: Path) -> None:
    uri = f"nbd+unix:///?socket={folder}/nothing"
    with pytest.raises(fio.FioFailed):
        fio.run(uri, {"rw": "read"})
    with pytest.raises(fio.FioFailed):
        fio.flush(uri)
    with pytest.raises(fio.FioFailed, match="use fsync"):
        fio.run(uri, {"rw": "write", "fdatasync": "1"})


class Draining(QemuNbd):
    """Has a backlog that falls to a floor."""

    def __init__(self, folder: Path, *backlog: int) -> None:
        super().__init__(folder)
        self.left = list(backlog)

    def backlog(self) -> int:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def test_draining_ends_with_the_last_fall(tmp_path: Path) -> None:
    assert 0.25 < drain(Draining(tmp_path, 900, 500, 300, 100)) < 1.0
    assert drain(Draining(tmp_path, 0)) < 0.1


@pytest.mark.parametrize(("ratio", "verdict"), [(2.0, ">= 2x met"), (1.99, ">= 2x MISSED")])
def test_the_table_names_the_goal_and_the_verdict(ratio: float, verdict: str) -> None:
    values = {"stripewell": 100 * ratio, "qemu-nbd": 100.0, "nbdkit": 50.0}
    rounds = {name: [value] for name, value in values.items()}
    ratios = {"qemu-nbd": ratio, "nbdkit": 2 * ratio}
    row = Row("randread", "IOPS", values, rounds, ratios, 2.0, {"stripewell": 4.5}, {})
    text = markdown([row])
    assert verdict in text
    assert "stripewell 4.5" in text


def test_every_goal_is_in_the_table() -> None:
    goals = {job.name: job.goal for job in JOBS if job.goal is not None}
    assert goals == {
        "randread 4k QD32": 2.0,
        "read 1M QD8": 0.6,
        "randwrite 4k QD32, burst": 2.0,
        "randwrite 4k QD32, sustained": 1.0,
        "write 1M QD8": 0.4,
        "write 4k + flush QD1": 0.4,
    }


def test_families_are_seen_and_ended() -> None:
    process = subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        members = family(process.pid)
        assert len(members) == 2
        assert resident_bytes(members) > 0
        subprocess.run(["kill", str(members[1])], check=True)
    finally:
        end(process)
        process.communicate()
    assert not any(map(alive, members))


def test_a_daemon_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo no such pool >&2; exit 1"]
    with Deployment(tmp_path, command=command) as site:
        with pytest.raises(CommandFailed, match="no such pool"):
            site.serve()
        with pytest.raises(CommandFailed, match="exit 1: no such pool"):
            site.run("pool", "list")
