"""The harness itself, against qemu-nbd: what it reports must be trusted by the other tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import QemuNbd
from tests.guest.harness import Disk, Guest, GuestError


@pytest.fixture
def server(folder: Path) -> Iterator[QemuNbd]:
    peer = QemuNbd(folder / "peer")
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


def test_commands_files_systems_and_power(folder: Path, server: QemuNbd) -> None:
    with Guest(folder / "guest", Disk(server.socket, "")) as guest:
        assert guest.run("echo 'end 1'; echo begin 2 0; exit 3") == (3, "end 1\nbegin 2 0\n")
        assert guest.run("cd /; sleep 30", timeout=1)[0] == 137
        assert guest.check("seq 1 3000").split() == [str(number) for number in range(1, 3001)]
        with pytest.raises(GuestError, match="exit status 1"):
            guest.check("false")
        for system, fsck in (("ext4", "fsck.ext4 -fn"), ("xfs -f", "xfs_repair -n")):
            guest.check(f"mkfs.{system} -q /dev/vda && mount /dev/vda /mnt")
            guest.check("dd if=/dev/urandom of=/mnt/file bs=1M count=4 conv=fsync; umount /mnt")
            guest.check(f"{fsck} /dev/vda")
        assert guest.troubles() == []
        guest.power_off()
        with pytest.raises(GuestError, match="not running"):
            guest.run("true")


def test_a_lost_server_is_reported_and_not_before_the_delay(folder: Path, server: QemuNbd) -> None:
    with Guest(folder / "guest", Disk(server.socket, "", reconnect_delay=3)) as guest:
        server.kill()
        started = time.monotonic()
        job = guest.start("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct")
        status, _ = guest.finish(job, 30)
        assert status != 0
        assert time.monotonic() - started > 2
        assert guest.troubles()


def test_a_restarted_server_goes_unnoticed(folder: Path, server: QemuNbd) -> None:
    with Guest(folder / "guest", Disk(server.socket, "")) as guest:
        job = guest.start("dd if=/dev/zero of=/dev/vda bs=64k count=1500 oflag=direct")
        time.sleep(0.3)
        server.kill()
        server.start()
        assert guest.finish(job, 60)[0] == 0
        assert guest.troubles() == []


def test_a_missing_export_is_an_error_not_a_hang(folder: Path) -> None:
    guest = Guest(folder / "guest", Disk(folder / "nothing.sock", "vm1"))
    with pytest.raises(GuestError, match="did not start"):
        guest.boot()
    guest.kill()
