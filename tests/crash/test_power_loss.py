"""P2 and P3 under the real daemon and its worker: the power fails, again and again.

Daemon and worker note their writes and syncs (`trace`). A power failure kills both, and then every
write that was not synced is kept, lost or torn. With it up to m devices may go, for good or to come
back old; it may fail twice more in the recovery. What is left has to be some prefix of the
acknowledged writes with all that was flushed.
"""

from __future__ import annotations

import faulthandler
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

from pool.failpoints import FAILPOINTS
from tests.cli.conftest import SECONDS, Daemon, Stripewell
from tests.crash.clients import Clients, read_volume, write_and_flush
from tests.crash.failing import Plan
from tests.crash.locks import wait_until_free
from tests.crash.trace import Power
from tests.crash.writer import Work
from tests.sim.oracle import SECTOR, Oracle

ROUNDS = 15
DEVICES = 6
PARITY = 2
DEVICE_SIZE = 12 << 20
VOLUME = 12 << 20
#: Large enough that a client's write is one record: P3 knows no half of it.
JOURNAL = 2 << 20
#: Syncs take up to so many milliseconds, so that more is outstanding.
SLOW = (("tests.crash.trace.SLOWEST", 30),)
RECOVERY = [name for name in FAILPOINTS if name.startswith(("recovery_", "term_", "root_"))]


@dataclass
class Host:
    """A machine with six disks and a daemon, whose power fails."""

    run: Stripewell
    rng: Random
    oracle: Oracle = field(default_factory=Oracle)
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.paths = [self.run.directory / f"d{number}" for number in range(DEVICES)]
        urls = [f"file://{path}?size={DEVICE_SIZE}" for path in self.paths]
        code = ("--data", str(DEVICES - PARITY), "--parity", str(PARITY))
        size = ("--journal-size", str(JOURNAL), "--slot-size", "64K")
        self.run.ok("pool", "create", "tank", *code, *size, *urls)
        self.run.ok("volume", "create", "tank/vm1", "--size", str(VOLUME))
        self.oracle.add_volume("vm1", VOLUME)
        self.volumes = {"vm1"}
        self.replicas: list[int] = []
        self.power = Power(self.run.directory.with_name("traces"), self.paths)

    def _plan(self, kill: str = "") -> Plan:
        return Plan(kill, trace=self.power.next_life(), constants=SLOW)

    def serve(self) -> Daemon:
        """A daemon that recovered, and the judgement of what it serves."""
        daemon = self.run.serve(program=self._plan().command())
        assert {v["name"] for v in self.run.json("volume", "list", "tank")} == self.volumes
        data = read_volume(daemon.socket, "vm1")
        self.happened["lost unflushed"] += self.oracle.check_recovered("vm1", data, power_lost=True)
        return daemon

    def change_volumes(self) -> None:
        """One goes, one comes; what was answered is synced (R7)."""
        for name in sorted(self.volumes - {"vm1"}):
            self.run.ok("volume", "delete", f"tank/{name}")
        name = f"v{self.happened['volumes changed']}"
        self.run.ok("volume", "create", f"tank/{name}", "--size", "1M")
        self.volumes = {"vm1", name}
        self.happened["volumes changed"] += 1

    def load(
        self, daemon: Daemon, clients: Clients, seconds: float, *, flushed: bool = False
    ) -> None:
        """Clients write until the power fails; or they stop, and it fails when the last flush was
        just answered."""
        clients.start(Work(daemon.socket, "vm1", depth=8, flush_every=15, whole_zeros=True))
        time.sleep(seconds)
        status = self.run.json("pool", "status", "tank")
        self.replicas = status["journal"]["replicas"]
        self.happened.update(status["counters"])
        if not flushed:
            daemon.kill()
        life = clients.finish()
        if flushed:
            life = life.then(write_and_flush(daemon.socket, "vm1", self.rng))
        self.fail(daemon)
        assert life.errors == []
        self.happened["written"] += life.acknowledged_sectors * SECTOR
        self.happened["acknowledged"] += len(life.acknowledged)
        self.happened["unflushed"] += life.unflushed()
        life.tell(self.oracle, "vm1")

    def fail(self, daemon: Daemon) -> None:
        """The power fails."""
        daemon.kill()
        wait_until_free(self.run.directory)
        self.happened.update(self.power.fail(self.rng))

    def fail_in_recovery(self) -> None:
        """It fails twice more before the daemon serves."""
        for _ in range(2):
            plan = self._plan(f"{self.rng.choice(RECOVERY)}:1")
            daemon = self.run.start("serve", "tank", program=plan.command())
            daemon.process.wait(SECONDS)
            assert daemon.process.returncode == -9, daemon.process.communicate()[1]
            self.fail(daemon)
            self.happened["failed in recovery"] += 1

    def take_devices(self) -> list[Path]:
        """Up to m devices have gone with the power, mostly such that hold the journal."""
        holders = [self.paths[index] for index in self.replicas]
        among = holders if self.rng.random() < 0.7 else self.paths
        taken = self.rng.sample(among, self.rng.choice((1, PARITY, PARITY)))
        for path in taken:
            path.rename(path.with_suffix(".away"))
        self.happened["devices lost"] += len(taken)
        return taken

    def return_devices(self, taken: list[Path]) -> None:
        """They come back as they were; the rest went on without them."""
        for path in taken:
            path.with_suffix(".away").rename(path)

    def wait_caught_up(self) -> None:
        """Until then they count as lost: the next failure may take others."""
        deadline = time.monotonic() + SECONDS
        while any("catching up" in p for p in self.run.json("pool", "status", "tank")["problems"]):
            assert time.monotonic() < deadline, "devices do not catch up"
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1])
def test_flushed_writes_survive_power_failures(
    stripewell: Stripewell, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    faulthandler.cancel_dump_traceback_later()
    host = Host(stripewell, Random(seed))
    with Clients(2, seed) as clients:
        for number in range(ROUNDS):
            daemon = host.serve()
            host.wait_caught_up()
            host.change_volumes()
            if number % 3 == 1:
                host.fail(daemon)  # with nobody who flushes after it
                daemon = host.serve()
            take = bool(number % 3)
            host.load(daemon, clients, host.rng.uniform(0.0, 0.8), flushed=take)
            taken = host.take_devices() if take else []
            if number % 3 == 2:
                host.fail_in_recovery()
            if taken:
                host.load(host.serve(), clients, 0.3)
                host.return_devices(taken)
    daemon = host.serve()
    host.wait_caught_up()
    assert stripewell.json("pool", "check", "tank")["faults"] == []
    assert daemon.terminate()[0] == 0
    host.happened["laps"] = host.happened["written"] // JOURNAL
    names = ["acknowledged", "unflushed", "lost unflushed", "kept", "lost", "torn", "laps"]
    names += ["checkpoints", "collected_stripes", "devices lost", "failed in recovery"]
    names += ["volumes changed"]
    with capsys.disabled():
        print(f"\n{ROUNDS} power failures:", {name: host.happened[name] for name in names})
    assert min(host.happened[name] for name in names) > 0
