"""Records that a guest has fsync'd are there, whatever happened to daemon, power and devices.

A guest with ext4 on one volume and XFS on another appends numbered records to a file on each, every
one with fsync, and tells the host which it has done. Beside them it writes what it never syncs.
Afterwards every record that the host was told of is whole and in its place, and both file systems
are clean (P1, P2, P4, R24).
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from bench.demo import EAGER_WRITEBACK
from bench.deployment import Deployment
from bench.processes import wait_until
from tests.crash.failing import Plan
from tests.crash.locks import wait_until_free
from tests.crash.trace import Power
from tests.guest.harness import Disk, Guest

KILLS = 5
POWER_FAILURES = 3
#: Records on each file system between two disasters, at least.
RECORDS = 15
#: Syncs of the host take up to so many milliseconds, so that more is outstanding.
SLOW = (("tests.crash.trace.SLOWEST", 150),)

SYSTEMS = {"ext4": "/dev/vda", "xfs": "/dev/vdb"}
FSCK = {"ext4": "fsck.ext4 -fn /dev/vda", "xfs": "xfs_repair -n /dev/vdb"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]

#: `recorder NAME` appends and reports records until /run/stop exists. A record is its number twice,
#: once as a multiple; some are longer than a block.
SCRIPTS = """mkdir -p /mnt/ext4 /mnt/xfs
cat >/bin/recorder <<'END'
set -e
touch /mnt/$1/records
i=$(wc -l </mnt/$1/records)
while [ ! -e /run/stop ]; do
  i=$((i + 1))
  printf "%d %$((100 + i * 337 % 6000))d\\\\n" $i $((i * 7919)) >/run/record.$1
  dd if=/run/record.$1 of=/mnt/$1/records bs=64k oflag=append conv=notrunc,fsync 2>/dev/null
  echo $i >/run/last.$1
  mv /run/last.$1 /run/done.$1
done
END
cat >/bin/noise <<'END'
i=0
while [ ! -e /run/stop ]; do
  i=$((i + 1))
  dd if=/dev/urandom of=/mnt/$1/noise.$((i % 7)) bs=64k count=12 2>/dev/null
  usleep 200000
done
END
cat >/bin/count <<'END'
awk '$1 != NR || $2 != NR * 7919 || NF != 2 {exit} {n = NR} END {print n + 0}' /mnt/$1/records
END"""


class Recorder:
    """The guest's work, and what it said of it."""

    def __init__(self) -> None:
        self.told = dict.fromkeys(SYSTEMS, 0)
        self.jobs: list[str] = []

    def format(self, guest: Guest) -> None:
        guest.check("mkfs.ext4 -q /dev/vda && mkfs.xfs -q /dev/vdb", 120)

    def start(self, guest: Guest) -> None:
        """Mount, and begin to write."""
        guest.check(SCRIPTS)
        guest.check(EAGER_WRITEBACK)
        self.mount(guest)
        self.jobs = [guest.start(f"sh /bin/recorder {name}") for name in SYSTEMS]
        for name in SYSTEMS:
            guest.start(f"sh /bin/noise {name}")

    def mount(self, guest: Guest) -> None:
        for name, disk in SYSTEMS.items():
            guest.check(f"mkdir -p /mnt/{name} && mount {disk} /mnt/{name}")

    def unmount(self, guest: Guest) -> None:
        guest.check("umount /mnt/ext4 && umount /mnt/xfs", 120)

    def hear(self, guest: Guest) -> None:
        """Take note of the records that are said to be synced."""
        for name in SYSTEMS:
            said = guest.check(f"if [ -e /run/done.{name} ]; then cat /run/done.{name}; fi")
            self.told[name] = int(said) if said else self.told[name]

    def await_records(self, guest: Guest, count: int = RECORDS) -> None:
        """Return when both have so many more."""
        self.hear(guest)
        goal = {name: told + count for name, told in self.told.items()}

        def reached() -> bool:
            self.hear(guest)
            return all(self.told[name] >= goal[name] for name in SYSTEMS)

        wait_until(reached, 60, 0.05, what=f"{count} records are written")

    def stop(self, guest: Guest) -> None:
        """End the work, which has met no error."""
        guest.check("touch /run/stop")
        for job in self.jobs:
            status, output = guest.finish(job, 60)
            assert status == 0, output
        wait_until(lambda: guest.run("pidof dd")[0] != 0, 30, what="the noise ends")
        time.sleep(0.5)
        self.hear(guest)

    def verify(self, guest: Guest) -> int:
        """Read all records from the disk, and check both file systems; the records lost beyond
        those that were told of must be none. Returns how many there are."""
        guest.check(SCRIPTS)
        self.mount(guest)  # replays the file system's journal
        found = {name: int(guest.check(f"sh /bin/count {name}")) for name in SYSTEMS}
        self.unmount(guest)
        for name in SYSTEMS:
            assert found[name] >= self.told[name], f"{name} lost records: {found} of {self.told}"
            guest.check(FSCK[name], 120)
        assert guest.troubles() == []
        return sum(found.values())


@pytest.fixture
def site(folder: Path) -> Iterator[Deployment]:
    """A pool 4+2 with a volume for each file system, not served yet."""
    with Deployment(folder / "site") as deployment:
        deployment.create_pool(6, "192M", 4, 2, ("--journal-size", "8M"))
        for name in SYSTEMS:
            deployment.create_volume(name, "400M")
        yield deployment


def boot(site: Deployment) -> Guest:
    return Guest(site.folder / "guest", *(Disk(site.socket, name) for name in SYSTEMS))


def tell(capsys: pytest.CaptureFixture[str], what: str) -> None:
    with capsys.disabled():
        print(f"\nguest: {what}")


def test_kills_go_unnoticed(site: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    """P1: `kill -9` at random moments; the guest sees no error and has every record."""
    rng = Random(60)
    recorder = Recorder()
    site.serve()
    with boot(site) as guest:
        recorder.format(guest)
        recorder.start(guest)
        for _ in range(KILLS):
            recorder.await_records(guest)
            time.sleep(rng.uniform(0, 0.5))
            assert site.kill() == []
            site.serve()
        recorder.await_records(guest)
        recorder.stop(guest)
        assert guest.troubles() == []
        recorder.unmount(guest)
        found = recorder.verify(guest)
        assert found == sum(recorder.told.values())
        guest.power_off()
    site.stop()
    tell(capsys, f"{KILLS} kills, {found} records fsync'd, all there; ext4 and XFS clean")


def test_power_fails(site: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    """P2, P3: guest and daemon are gone, unsynced writes of the host's files kept, lost or torn."""
    rng = Random(61)
    recorder = Recorder()
    power = Power(site.folder / "traces", site.devices)
    fates: Counter[str] = Counter()
    found = 0
    for number in range(POWER_FAILURES + 1):
        site.serve(program=Plan(trace=power.next_life(), constants=SLOW).command())
        with boot(site) as guest:
            if number:
                found = recorder.verify(guest)
            else:
                recorder.format(guest)
            if number == POWER_FAILURES:
                guest.power_off()
                break
            recorder.start(guest)
            recorder.await_records(guest)
            time.sleep(rng.uniform(0, 0.5))
            recorder.hear(guest)
            assert site.kill() == []
        wait_until_free(site.folder / "devices")
        fates += power.fail(rng)
    assert site.query("pool", "check", site.pool)["faults"] == []
    site.stop()
    assert min(fates[fate] for fate in ("kept", "lost", "torn")) > 0
    tell(
        capsys,
        f"{POWER_FAILURES} power failures, {dict(fates)} unsynced writes of the host, "
        f"{sum(recorder.told.values())} records told, {found} found; ext4 and XFS clean",
    )


def test_devices_go_and_one_comes_back_old(
    site: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    """P2, P7, R24: two devices with the journal are deleted; one returns as it was long ago, and
    when it has caught up a third one goes."""
    recorder = Recorder()
    site.serve()
    with boot(site) as guest:
        recorder.format(guest)
        recorder.start(guest)
        recorder.await_records(guest, 5)
        first, second = site.journal_devices()[:2]
        old = shutil.copy(first, first.with_suffix(".old"))
        recorder.await_records(guest)
        first.unlink()
        second.unlink()
        wait_gone(site, first, second)
        recorder.await_records(guest)
        assert site.kill() == []
        Path(old).rename(first)
        site.serve()
        wait_until(lambda: not catching_up(site), 60, 0.2, what="the old device catches up")
        assert site.device_states()[first] == "active"
        recorder.await_records(guest)
        third = next(path for path in site.journal_devices() if path != first)
        third.unlink()
        wait_gone(site, second, third)
        recorder.await_records(guest)
        recorder.stop(guest)
        assert guest.troubles() == []
        recorder.unmount(guest)
        found = recorder.verify(guest)
        assert found == sum(recorder.told.values())
        guest.power_off()
    site.stop()
    tell(capsys, f"3 devices deleted, 1 back old, {found} records fsync'd, all there")


def wait_gone(site: Deployment, *paths: Path) -> None:
    """Return when the pool has gone on without these devices, with a whole journal."""

    def gone() -> bool:
        states = site.device_states()
        replicas = site.status()["journal"]["replicas"]
        return all(states[path] != "active" for path in paths) and len(replicas) == 3

    wait_until(gone, 60, 0.2, what="devices are expelled")


def catching_up(site: Deployment) -> bool:
    return any("catching up" in line for line in site.status()["problems"])
