"""P2, P4, P6, P7: device files vanish, shrink or lose their content under a daemon with load on it.

No client may see an error, no byte may be wrong, and what is left gives everything back: to a
killed daemon's successor, and to another host that has nothing but the devices.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

from tests.cli.conftest import SECONDS, Daemon, Stripewell
from tests.crash.clients import Clients, Life, judge, read_volume
from tests.crash.writer import Work
from tests.sim.oracle import Oracle, identify

DEVICES = 6
DEVICE_SIZE = 32 << 20
VOLUME = 16 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


class Tank:
    """A 4+2 pool of files, its clients, and the oracle that knows what they were told."""

    def __init__(self, stripewell: Stripewell, clients: Clients) -> None:
        self.run = stripewell
        self.clients = clients
        self.oracle = Oracle()
        self.oracle.add_volume("vm1", VOLUME)
        self.paths = [stripewell.directory / f"d{n}" for n in range(DEVICES)]
        urls = [f"file://{path}?size={DEVICE_SIZE}" for path in self.paths]
        code = ("--data", "4", "--parity", "2", "--journal-size", "4M", "--slot-size", "64K")
        stripewell.ok("pool", "create", "tank", *code, *urls)
        stripewell.ok("volume", "create", "tank/vm1", "--size", str(VOLUME))

    def serve_imported(self, name: str, paths: list[Path]) -> Daemon:
        """Serve from devices alone: with a state directory that never knew the pool."""
        state = self.run.state.with_name(name)
        self.run.ok("pool", "import", *map(str, paths), state=state)
        return self.run.serve(state=state)

    def start(self, daemon: Daemon) -> None:
        self.clients.start(Work(daemon.socket, "vm1", flush_every=50))

    def finish(self) -> Life:
        """End the load. There may have been no errors."""
        life = self.clients.finish()
        assert life.errors == []
        assert life.acknowledged
        life.tell(self.oracle, "vm1")
        return life

    def judge(self, daemon: Daemon) -> None:
        """What the volume holds now is what was acknowledged."""
        judge(self.oracle, "vm1", read_volume(daemon.socket, "vm1"))

    def load(self, daemon: Daemon, seconds: float) -> None:
        """Some writes, all answered and judged."""
        self.start(daemon)
        time.sleep(seconds)
        self.finish()
        self.judge(daemon)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.run.json("pool", "status", "tank")
        return status

    def status_when(self, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status for which `reached` is true; it has to come soon."""
        deadline = time.monotonic() + SECONDS
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
        return status


@pytest.fixture
def tank(stripewell: Stripewell) -> Iterator[Tank]:
    with Clients(2, seed=30) as clients:
        yield Tank(stripewell, clients)


def expelled(status: dict[str, Any]) -> set[int]:
    return {device["index"] for device in status["devices"] if device["state"] != "active"}


def test_two_journal_devices_are_deleted(tank: Tank) -> None:
    daemon = tank.run.serve()
    tank.load(daemon, 1.0)
    assert daemon.terminate()[0] == 0
    lost = [tank.paths[index] for index in (0, 1)]
    stale = [shutil.copy(path, path.with_suffix(".stale")) for path in lost]

    daemon = tank.run.serve()
    assert {0, 1} < set(tank.status()["journal"]["replicas"])
    tank.start(daemon)
    time.sleep(0.3)
    for path in lost:
        path.unlink()
    status = tank.status_when(
        lambda status: expelled(status) == {0, 1} and len(status["journal"]["replicas"]) == 3
    )
    assert not {0, 1} & set(status["journal"]["replicas"])
    assert status["counters"]["replicas_replaced"] == 2
    identify(read_volume(daemon.socket, "vm1"), 0)
    time.sleep(0.5)
    daemon.kill()
    life = tank.finish()
    assert life.unflushed()

    daemon = tank.serve_imported("elsewhere", tank.paths[2:])
    tank.judge(daemon)
    tank.load(daemon, 0.5)
    assert daemon.terminate()[0] == 0

    for path, copy in zip(lost, stale, strict=True):
        os.rename(copy, path)
    daemon = tank.serve_imported("six", tank.paths)
    tank.judge(daemon)
    tank.load(daemon, 0.5)
    assert daemon.terminate()[0] == 0

    # Whatever the stale ones missed is theirs alone: no other device has a fault.
    faults = tank.run("pool", "check", "tank", "--json", state=tank.run.state.with_name("six"))
    assert all(re.search(r"device [01]\b", line) for line in json.loads(faults.stdout)["faults"])


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(DEVICE_SIZE))


def truncate(path: Path) -> None:
    os.truncate(path, 1 << 20)


@pytest.mark.parametrize("harm", [overwrite, truncate])
def test_two_devices_lose_their_content(tank: Tank, harm: Callable[[Path], None]) -> None:
    """One that holds the journal, and one that does not."""
    daemon = tank.run.serve()
    tank.load(daemon, 1.0)
    assert set(tank.status()["journal"]["replicas"]) == {0, 1, 2}
    tank.start(daemon)
    time.sleep(0.3)
    harm(tank.paths[1])
    harm(tank.paths[5])
    identify(read_volume(daemon.socket, "vm1"), 0)
    time.sleep(0.5)
    tank.finish()
    tank.judge(daemon)
    assert tank.status()["counters"]["reconstructed_blocks"] > 0
    tank.load(daemon, 0.5)
    daemon.kill()
    daemon = tank.run.serve()
    tank.judge(daemon)
    tank.load(daemon, 0.5)
    assert daemon.terminate()[0] == 0
    daemon = tank.serve_imported("elsewhere", [tank.paths[n] for n in (0, 2, 3, 4)])
    tank.judge(daemon)
