"""A volume as a disk on every bus that the guest's kernel has a driver for.

One guest has four volumes: virtio-blk, virtio-scsi, IDE and NVMe. Each is written, synced, trimmed
and zeroed, raw and beneath ext4, and read back past all caches; the host asks the daemon what
arrived of it. In the end all are written at once, and the daemon is killed in between (P1).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.deployment import Deployment
from bench.processes import wait_until
from tests.guest.buses import BUSES, IDE, Bus
from tests.guest.conftest import short_folder
from tests.guest.harness import Disk, Guest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

MIB = 1 << 20
RAW = 4 * MIB
TRIMMED = slice(1 * MIB, 2 * MIB)
ZEROED = slice(2 * MIB + 4096, 3 * MIB)
KILLS = 3
#: Pieces of 256 KiB on each disk between two kills, at least.
PIECES = 4

#: `load DISK` writes pieces that are all different, each with a flush, and reads each back, until
#: /run/stop exists. `again DISK` reads all of them once more.
SCRIPTS = """
dd if=/dev/urandom of=/run/noise bs=1M count=8
cat >/bin/piece <<'END'
dd if=/run/noise bs=4k skip=$1 count=64 2>/dev/null
END
cat >/bin/load <<'END'
set -e
i=0
while [ ! -e /run/stop ]; do
  sh /bin/piece $i >/run/piece.$1
  dd if=/run/piece.$1 of=/dev/$1 bs=256k seek=$i oflag=direct conv=notrunc,fsync 2>/run/dd.$1
  dd if=/dev/$1 bs=256k skip=$i count=1 iflag=direct 2>/run/dd.$1 | cmp - /run/piece.$1
  i=$((i + 1))
  echo $i >/run/next.$1
  mv /run/next.$1 /run/done.$1
done
END
cat >/bin/again <<'END'
done=$(cat /run/done.$1)
for i in $(seq 0 $((done - 1))); do sh /bin/piece $i; done | sha256sum >/run/wanted.$1
dd if=/dev/$1 bs=256k count=$done iflag=direct 2>/run/dd.$1 | sha256sum | cmp - /run/wanted.$1
END"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Deployment]:
    """A pool 4+2 with a volume for each bus."""
    with Deployment(folder / "site") as deployment:
        deployment.create_pool(6, "256M", 4, 2)
        for bus in BUSES:
            deployment.create_volume(bus.name, "256M")
        deployment.serve()
        yield deployment
        assert deployment.query("pool", "check", deployment.pool)["faults"] == []
        deployment.stop()


@pytest.fixture(scope="module")
def guest(folder: Path, site: Deployment) -> Iterator[Guest]:
    with Guest(
        folder / "guest", *(Disk(site.socket, bus.name, bus=bus) for bus in BUSES)
    ) as machine:
        yield machine


def disk_name(guest: Guest, bus: Bus) -> str:
    """What the guest calls its disk on a bus."""
    return guest.check(bus.find).strip()


def states(site: Deployment, volume: str, part: slice) -> set[tuple[bool, bool]]:
    """What the daemon says of a part of a volume: (is there data, does it read as zeros)."""
    return {
        (extent["data"], extent["zero"])
        for extent in mapped(site, volume)
        if extent["start"] < part.stop and extent["start"] + extent["length"] > part.start
    }


def data_bytes(site: Deployment, volume: str) -> int:
    return sum(extent["length"] for extent in mapped(site, volume) if extent["data"])


def mapped(site: Deployment, volume: str) -> list[dict[str, Any]]:
    command = ["qemu-img", "map", "--output=json", "-f", "raw", site.uri(volume)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    extents: list[dict[str, Any]] = json.loads(done.stdout)
    return extents


buses = pytest.mark.parametrize("bus", BUSES, ids=[bus.name for bus in BUSES])


@buses
def test_raw(guest: Guest, site: Deployment, bus: Bus) -> None:
    """Written, trimmed and zeroed ranges are what the host makes of the same pattern."""
    disk, first = disk_name(guest, bus), 10_000_000 + 1_000_000 * BUSES.index(bus)
    guest.check(f"seq {first} {first + 600_000} | head -c {RAW} >/run/raw")
    guest.check(f"dd if=/run/raw of=/dev/{disk} bs=1M conv=fsync && rm /run/raw")
    assert states(site, bus.name, slice(0, RAW)) == {(True, False)}
    for option, part in (("", TRIMMED), ("-z", ZEROED)):
        place = f"-o {part.start} -l {part.stop - part.start}"
        guest.check(f"/sbin/blkdiscard {option} {place} /dev/{disk}")
    wanted = bytearray("".join(f"{n}\n" for n in range(first, first + 600_000)).encode()[:RAW])
    for part in (TRIMMED, ZEROED):
        wanted[part] = bytes(part.stop - part.start)
    found = guest.check(f"dd if=/dev/{disk} bs=1M count=4 iflag=direct 2>/dev/null | sha256sum")
    assert found.split()[0] == hashlib.sha256(wanted).hexdigest()
    assert states(site, bus.name, TRIMMED) == {(False, True)}
    if bus is not IDE:  # its driver has no command for it and writes zeros
        assert all(zero for _, zero in states(site, bus.name, ZEROED))
    assert guest.troubles() == []


@buses
def test_ext4(guest: Guest, site: Deployment, bus: Bus) -> None:
    """Files are there after fstrim has given back what another one had, and fsck is clean."""
    disk = disk_name(guest, bus)
    guest.check(f"mkfs.ext4 -q -F /dev/{disk} && mount /dev/{disk} /mnt", 120)
    for name in ("kept", "gone"):
        guest.check(f"dd if=/dev/urandom of=/mnt/{name} bs=1M count=12 conv=fsync")
    guest.check("sha256sum /mnt/kept >/run/sums; sync")
    before = data_bytes(site, bus.name)
    guest.check("rm /mnt/gone && sync && fstrim /mnt")
    assert before - data_bytes(site, bus.name) > 11 * MIB  # ext4 writes some metadata, too
    guest.check("umount /mnt && echo 3 >/proc/sys/vm/drop_caches")
    guest.check(f"mount -o ro /dev/{disk} /mnt && sha256sum -c /run/sums && umount /mnt")
    guest.check(f"fsck.ext4 -fn /dev/{disk}", 120)
    assert guest.troubles() == []


def test_kills_go_unnoticed_on_every_bus(guest: Guest, site: Deployment) -> None:
    """P1: SIGKILL while all disks have requests in flight: these wait for the next daemon."""
    guest.check(SCRIPTS)
    disks = [disk_name(guest, bus) for bus in BUSES]
    jobs = {disk: guest.start(f"sh /bin/load {disk}") for disk in disks}
    rng = Random(70)
    for _ in range(KILLS):
        await_pieces(guest, jobs, PIECES)
        time.sleep(rng.uniform(0, 0.5))
        assert site.kill() == []
        wait_until(lambda: all(waiting(guest, disk) for disk in jobs), 10, what="requests wait")
        site.serve()
    await_pieces(guest, jobs, PIECES)
    guest.check("touch /run/stop")
    for disk, job in jobs.items():
        assert guest.finish(job) == (0, "")
        guest.check(f"sh /bin/again {disk}")
    assert guest.troubles() == []


def await_pieces(guest: Guest, jobs: dict[str, str], count: int) -> None:
    """Return when every disk has so many more."""
    goals = {disk: written(guest, disk) + count for disk in jobs}

    def reached() -> bool:
        for disk, job in jobs.items():
            assert not guest.poll(job), f"{disk}: {guest.finish(job)[1]}"
        return all(written(guest, disk) >= goal for disk, goal in goals.items())

    wait_until(reached, 60, 0.1, what=f"{count} pieces are written and verified on each disk")


def written(guest: Guest, disk: str) -> int:
    return int(guest.check(f"cat /run/done.{disk} 2>/dev/null || echo 0"))


def waiting(guest: Guest, disk: str) -> bool:
    """Does a process of its load wait for the disk?"""
    return guest.run(f"ps -o stat,args | grep '^D.*load {disk}'")[0] == 0
