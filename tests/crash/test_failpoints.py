"""P1 and the rules of order: the real daemon is killed at every failpoint, with clients at work.

Each case starts from the same lived-in pool, killed in mid-write. A daemon runs with one failpoint
armed (`failing`); something makes it go there; it dies of SIGKILL, which is the proof that it was
there. Then an ordinary daemon recovers: everything acknowledged is there and `pool check` finds no
fault. Failpoints of the worker process kill it together with its daemon.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

import nbd

from pool.failpoints import FAILPOINTS
from pool.format.geometry import layout
from tests.cli.conftest import SECONDS, Daemon, Stripewell
from tests.crash.clients import Clients, judge, read_volume
from tests.crash.failing import Plan
from tests.crash.locks import wait_until_free
from tests.crash.writer import Work
from tests.sim.oracle import SECTOR, Oracle

DEVICES = 6
DEVICE_SIZE = 9 << 20
#: Large enough that a client's write is one record: P3 knows no half of it.
JOURNAL = 2 << 20
SLOT = 64 << 10
#: Little enough for five devices.
VOLUME = 10 << 20
OLD = 2 << 20
BLOCK = 4096
STORE = 12 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@dataclass
class Tank:
    """The pools, as they were made once, and what is known of their volumes."""

    run: Stripewell
    clients: Clients
    oracle: Oracle = field(default_factory=Oracle)
    happened: Counter[str] = field(default_factory=Counter)
    template: tuple[Path, Oracle] | None = None
    #: Devices whose faults `pool check` may tell.
    excused: set[int] = field(default_factory=set)
    volumes: set[str] = field(default_factory=set)
    #: A device went with the daemon: what was not flushed was perhaps only there (P2, P3).
    lost: bool = False
    #: Clients have begun and not ended.
    working: bool = False

    @property
    def paths(self) -> list[Path]:
        return [self.run.directory / f"d{number}" for number in range(DEVICES)]

    # -- the template ------------------------------------------------------------------------

    def create(self) -> None:
        """A 4+2 pool of files and a 2+1 pool with a directory, both killed in mid-write."""
        size = ("--journal-size", str(JOURNAL), "--slot-size", str(SLOT))
        urls = [f"file://{path}?size={DEVICE_SIZE}" for path in self.paths]
        self.run.ok("pool", "create", "tank", "--data", "4", "--parity", "2", *size, *urls)
        urls = [f"file://{self.run.directory}/m{n}?size={DEVICE_SIZE}" for n in range(2)]
        urls.append(f"dir://{self.run.directory}/store?size={STORE}")
        self.run.ok("pool", "create", "mixed", "--data", "2", "--parity", "1", *size, *urls)
        self._make("tank", "vm1", VOLUME)
        self._make("tank", "old", OLD)
        self._make("mixed", "vm2", OLD)
        folder = self.run.directory.with_name("template")
        self.run.directory.rename(folder)
        self.template = folder, self.oracle

    def _make(self, pool: str, name: str, size: int) -> None:
        self.run.ok("volume", "create", f"{pool}/{name}", "--size", str(size))
        self.oracle.add_volume(name, size)
        daemon = self.run.serve(pool)
        self.begin(daemon, name)
        time.sleep(1.5)
        self.kill(daemon)
        self.end(name)

    def reset(self) -> None:
        """Everything as it was when it had just been made."""
        assert self.template is not None
        folder, oracle = self.template
        for daemon in self.run.daemons:
            if daemon.process.poll() is None:
                daemon.kill()
        if self.working:  # the last test failed
            self.end(errors=True)
        shutil.rmtree(self.run.directory, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", folder, self.run.directory], check=True)
        self.oracle = copy.deepcopy(oracle)
        self.volumes = {"vm1", "old"}
        self.excused.clear()
        self.lost = False

    # -- clients and daemons -----------------------------------------------------------------

    def begin(self, daemon: Daemon, volume: str = "vm1", flush_every: int = 60) -> None:
        """Clients begin to write."""
        self.working = True
        work = Work(daemon.socket, volume, depth=8, flush_every=flush_every, whole_zeros=True)
        self.clients.start(work)

    def end(self, volume: str = "vm1", *, errors: bool = False) -> None:
        """They end, or have; they may have seen no error."""
        self.working = False
        life = self.clients.finish()
        assert errors or life.errors == []
        life.tell(self.oracle, volume)
        self.happened["acknowledged writes"] += len(life.acknowledged)
        self.happened["unflushed ones"] += life.unflushed()

    def kill(self, daemon: Daemon) -> None:
        """Kill a daemon; its worker follows."""
        daemon.kill()
        wait_until_free(self.run.directory)

    def serve(self, plan: Plan, pool: str = "tank") -> Daemon:
        return self.run.serve(pool, program=plan.command())

    def await_death(self, daemon: Daemon, what: str) -> None:
        """The daemon kills itself at its failpoint."""
        try:
            status = daemon.process.wait(SECONDS / 3)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{what} was not reached")
        assert status == -signal.SIGKILL, daemon.process.communicate()[1]
        wait_until_free(self.run.directory)
        self.happened["kills"] += 1

    # -- judging -----------------------------------------------------------------------------

    def judge(self, pool: str = "tank", volumes: set[str] | None = None) -> None:
        """Recover, and compare everything with what was acknowledged."""
        daemon = self.run.serve(pool)
        there = {volume["name"] for volume in self.run.json("volume", "list", pool)}
        for name in there & self.oracle.volumes.keys():
            data = read_volume(daemon.socket, name)
            if self.lost:
                self.oracle.check_recovered(name, data, power_lost=True)
            else:
                judge(self.oracle, name, data)
            self.happened["volumes judged"] += 1
        missing = (self.volumes if volumes is None else volumes) - there
        assert not missing, f"acknowledged volumes are gone: {missing}"
        self.wait_caught_up(pool)
        self.check(pool)
        self.kill(daemon)

    def wait_caught_up(self, pool: str) -> None:
        deadline = time.monotonic() + 20
        while any(
            "catching up" in line for line in self.run.json("pool", "status", pool)["problems"]
        ):
            assert time.monotonic() < deadline, "a device does not catch up"
            time.sleep(0.1)

    def check(self, pool: str) -> None:
        """`pool check` may only complain about a device that was harmed on purpose."""
        faults = json_of(self.run, "pool", "check", pool)["faults"]
        excused = "|".join(map(str, self.excused)) or "none"
        assert [line for line in faults if not re.search(rf"device ({excused})\b", line)] == []


def json_of(run: Stripewell, *arguments: str) -> Any:
    """What a command prints, whether it found faults or not."""
    return json.loads(run(*arguments, "--json").stdout)


# -- what leads to a failpoint ---------------------------------------------------------------


def load(tank: Tank, plan: Plan) -> None:
    """Clients write, trim and flush."""
    work(tank, plan, "tank", "vm1")


def work(tank: Tank, plan: Plan, pool: str, volume: str) -> None:
    """The same, in any pool. Some failpoints are met on the way to serving."""
    daemon = tank.run.start("serve", pool, program=plan.command())
    assert daemon.process.stdout is not None
    daemon.ready = daemon.process.stdout.readline()
    if daemon.ready:
        tank.begin(daemon, volume)
    tank.await_death(daemon, plan.kill)
    if daemon.ready:
        tank.end(volume)


def reopen(tank: Tank, plan: Plan) -> None:
    """The daemon dies before it serves, twice."""
    for _ in range(2):
        tank.await_death(tank.run.start("serve", "tank", program=plan.command()), plan.kill)


def operate(tank: Tank, plan: Plan) -> None:
    """Volumes are made and deleted beside the load."""
    daemon = tank.serve(plan)
    tank.begin(daemon)
    tank.volumes.discard("old")
    commands = [
        ("delete", "old"),
        *((do, f"v{n}") for n in range(20) for do in ("create", "delete")),
    ]
    for do, name in commands:
        if daemon.process.poll() is not None:
            break
        size = ("--size", "1M") if do == "create" else ()
        answered = tank.run("volume", do, f"tank/{name}", *size).returncode == 0
        if daemon.process.poll() is None:
            assert answered
        tank.volumes.discard(name)
        if answered and do == "create":
            tank.volumes.add(name)
        tank.happened["volumes made or deleted"] += answered
    tank.await_death(daemon, plan.kill)
    tank.end()


def lose_device(tank: Tank, plan: Plan) -> None:
    """The file of a journal replica is deleted."""
    daemon = tank.serve(plan)
    assert 0 in tank.run.json("pool", "status", "tank")["journal"]["replicas"]
    tank.begin(daemon)
    time.sleep(0.2)
    tank.paths[0].unlink()
    tank.excused, tank.lost = {0}, True
    tank.await_death(daemon, plan.kill)
    tank.end()


def lose_idle_device(tank: Tank, plan: Plan) -> None:
    """The same while nobody writes stripes or roots: the journal is the first to notice."""
    daemon = tank.serve(plan)
    time.sleep(1)
    tank.paths[0].unlink()
    tank.excused, tank.lost = {0}, True
    tank.begin(daemon, flush_every=2)
    tank.await_death(daemon, plan.kill)
    tank.end()


def return_old(tank: Tank, plan: Plan) -> None:
    """A device comes back with an old content."""
    daemon = tank.run.serve()
    tank.begin(daemon)
    time.sleep(0.5)
    tank.kill(daemon)
    tank.end()
    assert tank.template is not None
    shutil.copy(tank.template[0] / "d5", tank.paths[5])
    daemon = tank.run.start("serve", "tank", program=plan.command())
    tank.await_death(daemon, plan.kill)


def rot(tank: Tank, plan: Plan) -> None:
    """A block of every stripe on one device has a flipped bit, and all is read."""
    daemon = tank.run.serve()
    data = read_volume(daemon.socket, "vm1")
    judge(tank.oracle, "vm1", data)
    tank.run.ok("pool", "status", "tank")
    assert daemon.terminate()[0] == 0
    tank.happened["rotten blocks"] += flip_bits(tank.paths[3], data)
    daemon = tank.serve(plan)
    with pytest.raises(nbd.Error):
        read_volume(daemon.socket, "vm1")
    tank.await_death(daemon, plan.kill)


def flip_bits(path: Path, data: bytes) -> int:
    """Damage every copy in a slot of `path` of a block that the volume has now; how many."""
    where = layout(DEVICE_SIZE, JOURNAL, SLOT // BLOCK)
    image = np.memmap(path, np.int64, "r+").reshape(-1, BLOCK // 8)
    blocks = np.frombuffer(data, np.int64).reshape(-1, BLOCK // 8)
    sectors = BLOCK // SECTOR
    place = image[:, 1] // sectors
    inside = (image[:, 1] >= 0) & (place < len(blocks)) & (image[:, 0] != 0)
    inside[: where.slots_offset // BLOCK] = False
    found = [at for at in np.flatnonzero(inside) if (image[at] == blocks[place[at]]).all()]
    image[found, 9] ^= 1 << 40
    image.flush()
    return len(found)


def fill_store(tank: Tank, plan: Plan) -> None:
    """Others fill the directory that a member is in."""
    others = tank.run.directory / "store" / "others"
    daemon = tank.serve(plan, "mixed")
    with others.open("wb") as file:
        file.truncate(STORE)
    tank.begin(daemon, "vm2")
    tank.await_death(daemon, plan.kill)
    tank.end("vm2")
    others.unlink()


def churn_store(tank: Tank, plan: Plan) -> None:
    """Overwriting empties stripes, whose objects are deleted."""
    work(tank, plan, "mixed", "vm2")


def terminate(tank: Tank, plan: Plan) -> None:
    """SIGTERM, and then the power button."""
    daemon = tank.serve(plan)
    tank.begin(daemon)
    time.sleep(0.3)
    daemon.process.terminate()
    tank.await_death(daemon, plan.kill)
    tank.end()


Way = Callable[[Tank, Plan], None]

#: How a failpoint is reached, by the beginning of its name; `load` reaches the others.
WAYS: dict[str, Way] = {
    "term_": reopen,
    "recovery_": reopen,
    "opening_": reopen,
    "root_": reopen,
    "catalog_": operate,
    "delete_": operate,
    "drop_": operate,
    "failure_": lose_idle_device,
    "expulsion_": lose_device,
    "catch_up_": return_old,
    "repair_": rot,
    "full_": fill_store,
    "trash_": churn_store,
    "close_": terminate,
}
#: Ways that need the other pool.
MIXED: set[Way] = {fill_store, churn_store}

#: Failpoints that are also met later, when the daemon has been at work for a while.
LATER: dict[str, int] = {
    "append_": 700,
    "sync_": 60,
    "flush_": 40,
    "range_": 40,
    "stripe_after_s": 25,
    "stripe_after_g": 8,
    "destage_": 3,
    "move_": 9,
    "collect_": 2,
    "checkpoint_": 3,
    "root_": 17,
    "catalog_": 4,
    "repair_": 9,
    "trash_": 12,
    "catch_up_after_look": 5,
    "catch_up_after_rebuild": 5,
}


def found(table: dict[str, Any], name: str, default: Any) -> Any:
    """The entry of a table whose key `name` begins with."""
    return next((table[key] for key in table if name.startswith(key)), default)


def cases() -> Iterator[tuple[str, int]]:
    for name in FAILPOINTS:
        yield name, 1
        if later := found(LATER, name, 0):
            yield name, later


@pytest.fixture(scope="module")
def everything() -> Iterator[Tank]:
    folder = Path(tempfile.mkdtemp(prefix="sw-"))
    (folder / "devices").mkdir()
    runner = Stripewell(folder / "state", folder / "devices")
    try:
        with Clients(2, seed=40) as clients:
            tank = Tank(runner, clients)
            tank.create()
            tank.happened.clear()
            yield tank
    finally:
        runner.end()
        shutil.rmtree(folder)


@pytest.fixture
def tank(everything: Tank) -> Tank:
    everything.reset()
    return everything


@pytest.mark.parametrize(("name", "nth"), list(cases()))
def test_killed_at(tank: Tank, name: str, nth: int) -> None:
    way = found(WAYS, name, load)
    if name.startswith("root_") and nth > 1:
        way = load
    way(tank, Plan(kill=f"{name}:{nth}"))
    if way in MIXED:
        tank.judge("mixed", {"vm2"})
    else:
        tank.judge()


def test_the_worker_dies_alone(tank: Tank) -> None:
    """Writes stop with an error, and nothing acknowledged is lost when the daemon is restarted."""
    daemon = tank.serve(Plan(kill="stripe_after_shard_before_next:20", spare_daemon=True))
    tank.begin(daemon)
    deadline = time.monotonic() + 20
    while not any("worker" in line for line in tank.run.json("pool", "status", "tank")["problems"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tank.kill(daemon)
    tank.end(errors=True)
    tank.judge()


def test_what_happened(everything: Tank, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests above did what they say; the last one to run."""
    counts = everything.happened
    with capsys.disabled():
        print("\nat failpoints:", ", ".join(f"{counts[what]} {what}" for what in sorted(counts)))
    assert min(counts[what] for what in ("kills", "acknowledged writes", "unflushed ones")) > 0
