"""Promises as a guest sees them: P1 and P2 after kill -9, P5 when the pool is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.deployment import Deployment
from bench.processes import wait_until
from tests.guest.harness import Disk, Guest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_synced_data_outlives_daemon_and_guest(folder: Path, site: Deployment) -> None:
    """P2: both are killed; what fsync had answered is there for the next guest."""
    with Guest(folder / "guest", Disk(site.socket, "vm1")) as guest:
        guest.check("mkfs.xfs -q /dev/vda && mount /dev/vda /mnt")
        guest.check("dd if=/dev/urandom of=/mnt/synced bs=1M count=24 conv=fsync; sync")
        total = guest.check("sha256sum </mnt/synced")
        guest.start("dd if=/dev/urandom of=/mnt/unsynced bs=64k count=4000")
        wait_until(lambda: guest.run("test -s /mnt/unsynced")[0] == 0, 30, 0.1, what="work starts")
        assert site.kill() == []
    site.serve()
    with Guest(folder / "guest", Disk(site.socket, "vm1")) as guest:
        guest.check("mount /dev/vda /mnt")  # replays the journal of XFS
        assert guest.check("sha256sum </mnt/synced") == total
        guest.check("umount /mnt && xfs_repair -n /dev/vda")
        assert guest.troubles() == []
        guest.power_off()
    site.stop()


def test_a_guest_survives_several_kills(folder: Path, site: Deployment) -> None:
    """P1: with reconnect-delay nothing but time is lost."""
    with Guest(folder / "guest", Disk(site.socket, "vm1")) as guest:
        guest.check("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
        script = "for i in $(seq 60); do dd if=/dev/urandom of=/mnt/$i bs=128k count=8 conv=fsync"
        job = guest.start(f"set -e; {script}; sha256sum /mnt/$i >>/mnt/sums; done")
        for goal in (4, 12, 20):
            _await_lines(guest, goal)
            assert site.kill() == []
            site.serve()
        assert guest.finish(job, 120)[0] == 0
        guest.check("sync; echo 3 >/proc/sys/vm/drop_caches")
        guest.check("sha256sum -c /mnt/sums")
        assert _lines(guest) == 60
        assert guest.troubles() == []
        guest.power_off()


def _await_lines(guest: Guest, goal: int) -> None:
    wait_until(lambda: _lines(guest) >= goal, 60, 0.1, what=f"{goal} files are written")


def _lines(guest: Guest) -> int:
    return int(guest.check("touch /mnt/sums; wc -l </mnt/sums"))


def test_a_full_pool_pauses_the_guest_and_deleting_resumes_it(folder: Path) -> None:
    """P5: ENOSPC stops the guest before anything is lost; with space again `cont` goes on."""
    with Deployment(folder / "site") as site:
        site.create_pool(devices=6, size="64M", data=4, parity=2)
        free = int(site.status()["free_bytes"])
        site.create_volume("ballast", str(free // 2 >> 20 << 20))
        site.create_volume("vm1", "1G")
        site.serve()
        ballast = Disk(site.socket, "ballast")
        with Guest(folder / "guest", Disk(site.socket, "vm1"), ballast) as guest:
            guest.check("dd if=/dev/urandom of=/dev/vdb bs=1M; sync", 120)
            pieces = free * 3 // 4 >> 18
            job = guest.start(
                f"yes pool | dd iflag=fullblock oflag=direct of=/dev/vda bs=256k count={pieces}"
            )
            event = guest.qmp.wait_event("BLOCK_IO_ERROR", 120)
            assert event["data"]["nospace"]
            assert guest.qmp.call("query-status")["status"] == "io-error"
            site.run("volume", "delete", f"{site.pool}/ballast")
            _resume(guest)
            status, output = guest.finish(job, 120)
            assert status == 0, output
            guest.check("sync; echo 3 >/proc/sys/vm/drop_caches")
            written = guest.check(
                f"dd if=/dev/vda bs=256k count={pieces} 2>/dev/null | sha256sum", 120
            )
            assert written == guest.check(f"yes pool | head -c {pieces << 18} | sha256sum", 120)
        site.stop()


def _resume(guest: Guest) -> None:
    """Let the guest go on until it stays running: freed space returns over a little while."""

    def running() -> bool:
        if guest.qmp.call("query-status")["status"] != "running":
            guest.qmp.call("cont")
            return False
        return True

    wait_until(running, 60, 1.0, what="the guest runs again")
