"""The demonstration: a guest works on a volume while its storage is torn apart under it.

Six devices, code 4+2, a QEMU guest with an ext4 file system on a thin volume. The daemon is
killed in mid-write; two devices that hold the journal are deleted with unsynced work in flight;
all local state is deleted and the pool comes back from the four devices left. Every row of the
table at the end is a check that was made; the first one that fails ends the run with exit status
1.

    python -m bench.demo [--folder DIR] [--keep]
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.deployment import CommandFailed, Deployment
from bench.processes import wait_until
from tests.guest.harness import Disk, Guest, GuestError
from tests.guest.initramfs import MissingParts

MIB = 1 << 20
VOLUME = "vm1"

#: Guest scripts. `tree NAME COUNT` writes files of 4 KiB to 388 KiB and a manifest of their sums.
TREE = """cat >/bin/tree <<'END'
set -e
mkdir -p /mnt/$1; cd /mnt/$1
i=0
while [ $i -lt $2 ]; do
  mkdir -p $((i % 8))
  dd if=/dev/urandom of=$((i % 8))/$i bs=4k count=$((1 + i * 37 % 97)) 2>/dev/null
  i=$((i + 1))
done
find . -type f | xargs sha256sum >/run/sums
mv /run/sums /mnt/$1.sha256
END"""

#: `writer NAME` writes, syncs and records one file after the other until /run/stop exists.
WRITER = """cat >/bin/writer <<'END'
set -e
mkdir -p /mnt/$1; cd /mnt/$1
i=0
while [ ! -e /run/stop ] && [ $i -lt 5000 ]; do
  dd if=/dev/urandom of=$i bs=64k count=4 conv=fsync 2>/dev/null
  sha256sum $i >>/mnt/$1.sha256
  i=$((i + 1))
  echo $i >>/run/written
done
END"""

DROP_CACHES = "sync; echo 3 >/proc/sys/vm/drop_caches"

#: Make the guest's kernel hand writes to the disk at once instead of after thirty seconds.
EAGER_WRITEBACK = """cd /proc/sys/vm
echo 1048576 >dirty_background_bytes
echo 10 >dirty_writeback_centisecs"""


class DemoFailed(Exception):
    """Something that had to hold did not; the text says what."""


@dataclass
class Report:
    """Progress on standard output, and the rows of the closing table."""

    started: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def step(self, text: str) -> None:
        """Say what is being done."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def shown(self, what: str, detail: str) -> None:
        """Add a row; the caller has just checked it."""
        self.rows.append((what, detail))

    def table(self) -> str:
        """All rows, aligned."""
        width = max(len(what) for what, _ in self.rows)
        return "\n".join(f"  {what:<{width}}  {detail}" for what, detail in self.rows)


def require(holds: object, complaint: str) -> None:
    """Raises `DemoFailed` unless it holds."""
    if not holds:
        raise DemoFailed(complaint)


def run(folder: Path, report: Report) -> None:
    """All acts. Raises `DemoFailed`, `GuestError`, `CommandFailed`, `TimeoutError`."""
    with Deployment(folder) as site:
        report.step("creating a pool: six sparse files of 2 GiB, code 4+2, and a volume of 2 GiB")
        site.create_pool(devices=6, size="2G", data=4, parity=2)
        site.create_volume(VOLUME, "2G")
        site.serve()
        with _boot(site, report) as guest:
            _fill(site, guest, report)
            _measure(guest, report)
            _kill_the_daemon(site, guest, report)
            survivors = _delete_two_devices(site, guest, report)
            report.step("switching the guest off, stopping the daemon")
            guest.power_off()
        site.stop()
        _come_back(site, survivors, report)


def _boot(site: Deployment, report: Report) -> Guest:
    report.step("booting a guest with the volume as its disk")
    return Guest(site.folder / "guest", Disk(site.socket, VOLUME))


def _fill(site: Deployment, guest: Guest, report: Report) -> None:
    """An ext4 file system, a tree of files, and what they cost."""
    for script in (TREE, WRITER):
        guest.check(script)
    report.step("mkfs.ext4, a tree of 200 files with their checksums")
    guest.check("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
    guest.check("sh /bin/tree first 200 && sync", 120)
    files = _verify(guest, "first")
    report.shown("a guest's ext4 on the volume", f"{files} files read back cold, all sums right")
    used = int(guest.check("df -k /mnt | tail -1").split()[2]) * 1024
    pool_used = int(site.status()["used_bytes"])
    require(pool_used > 0, "the pool says that it holds nothing")
    report.shown(
        "space",
        f"{_mib(used)} in the guest's files, {_mib(pool_used)} of the pool in use, "
        f"{_mib(site.allocated_bytes())} on the host's disk with journal",
    )


def _measure(guest: Guest, report: Report) -> None:
    """Throughput as the emulated guest sees it."""
    report.step("throughput seen by the guest")
    size = 96
    write = _seconds(guest, f"dd if=/dev/zero of=/mnt/speed bs=1M count={size} conv=fsync 2>&1")
    guest.check(DROP_CACHES)
    read = _seconds(guest, "cat /mnt/speed >/dev/null")
    guest.check("rm /mnt/speed && sync && fstrim /mnt", 120)
    report.shown(
        "throughput in the guest (emulated processor)",
        f"write + fsync {size / write:.0f} MiB/s, cold read {size / read:.0f} MiB/s",
    )


def _kill_the_daemon(site: Deployment, guest: Guest, report: Report) -> None:
    """P1: what was answered survives; the guest notices a pause and nothing else."""
    report.step("a writer that syncs every file; kill -9 of the daemon in mid-write")
    job = guest.start("sh /bin/writer second")
    wait_until(lambda: _written(guest) >= 5, 60, 0.2, what="the guest's writer starts")
    left = site.kill()
    died = time.monotonic()
    require(not left, f"processes outlived the daemon: {left}")
    require(not guest.poll(job), "the guest's writer ended when the daemon died")
    opening = site.serve()
    before = _written(guest)
    wait_until(lambda: _written(guest) > before + 1, 60, 0.2, what="the guest writes again")
    pause = time.monotonic() - died
    report.step(f"daemon back after {opening:.1f} s, the guest wrote again {pause:.1f} s after")
    guest.check("touch /run/stop")
    status, output = guest.finish(job, 60)
    require(status == 0, f"the guest's writer failed: {output}")
    _require_no_trouble(guest, "after kill -9 of the daemon")
    files = _verify(guest, "first") + _verify(guest, "second")
    report.shown(
        "kill -9 of the daemon in mid-write",
        f"no error in the guest, writing again after {pause:.1f} s, {files} files right",
    )


def _delete_two_devices(site: Deployment, guest: Guest, report: Report) -> list[Path]:
    """P2: two of six devices go while work is in flight. Returns the devices left."""
    holders = site.journal_devices()
    require(len(holders) >= 2, f"the journal is on {len(holders)} devices only")
    victims = holders[:2]
    report.step("unsynced work in flight; deleting " + " and ".join(v.name for v in victims))
    guest.check(EAGER_WRITEBACK)
    job = guest.start("sh /bin/tree third 160")
    wait_until(lambda: _entries(guest, "third") > 0, 60, 0.2, what="the guest's files appear")
    for victim in victims:
        victim.unlink()
    require(not guest.poll(job), "the work ended before the devices were deleted")
    status, output = guest.finish(job, 120)
    require(status == 0, f"the guest's work failed after the loss: {output}")
    guest.check("sync", 120)
    wait_until(lambda: _all_lost(site, victims), 30, 0.5, what="the loss shows in pool status")
    _require_no_trouble(guest, "after the loss of two devices")
    files = sum(_verify(guest, tree) for tree in ("first", "second", "third"))
    replicas = site.journal_devices()
    require(replicas and not set(replicas) & set(victims), "the journal still is on lost devices")
    report.shown(
        "two devices with journal replicas deleted under load",
        f"no error in the guest, sync answered, {files} files right",
    )
    report.shown(
        "the pool afterwards",
        f"{site.status()['state']}, journal on {len(replicas)} devices that are left",
    )
    return [device for device in site.devices if device not in victims]


def _come_back(site: Deployment, survivors: list[Path], report: Report) -> None:
    """P8: the devices left hold everything, without any local state."""
    report.step("deleting all local state; importing the pool from the four devices left")
    site.forget()
    site.import_pool(survivors)
    opening = site.serve()
    with _boot(site, report) as guest:
        report.step("fsck and all checksums")
        status, output = guest.run("fsck.ext4 -fn /dev/vda", 120)
        require(status == 0, f"fsck found damage (exit status {status}): {output}")
        guest.check("mount /dev/vda /mnt")
        files = sum(_verify(guest, tree) for tree in ("first", "second", "third"))
        _require_no_trouble(guest, "after the import")
        guest.power_off()
    site.stop()
    report.shown(
        "state deleted, pool imported from four of six devices",
        f"open in {opening:.1f} s, fsck clean, all {files} files right",
    )


def _verify(guest: Guest, tree: str) -> int:
    """Read a tree cold and compare it with its manifest; the number of files."""
    guest.check(DROP_CACHES, 120)
    status, output = guest.run(f"cd /mnt/{tree} && sha256sum -c ../{tree}.sha256", 120)
    right = len(re.findall(r": OK$", output, re.MULTILINE))
    listed = int(guest.check(f"wc -l </mnt/{tree}.sha256"))
    bad = [line for line in output.splitlines() if not line.endswith(": OK")]
    require(status == 0 and right == listed > 0, f"wrong bytes in {tree}: {' | '.join(bad[:5])}")
    return right


def _require_no_trouble(guest: Guest, when: str) -> None:
    troubles = guest.troubles()
    require(not troubles, f"the guest's kernel complains {when}: {' | '.join(troubles[:5])}")


def _all_lost(site: Deployment, victims: list[Path]) -> bool:
    states = site.device_states()
    return all(states[victim] != "active" for victim in victims)


def _written(guest: Guest) -> int:
    return int(guest.check("touch /run/written; wc -l </run/written"))


def _entries(guest: Guest, tree: str) -> int:
    return int(guest.check(f"ls /mnt/{tree} 2>/dev/null | wc -l"))


def _seconds(guest: Guest, command: str) -> float:
    started = time.monotonic()
    guest.check(command, 120)
    return time.monotonic() - started


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def _exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the stack, so that every process is stopped."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def perform(action: Callable[[Path, Report], None], folder: Path, report: Report) -> int:
    """Run the acts and print the table; the exit status."""
    try:
        action(folder, report)
    except (DemoFailed, GuestError, CommandFailed, MissingParts, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    report.step("done; what was shown:")
    print(report.table(), flush=True)
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave devices and logs behind")
    options = parser.parse_args()
    _exit_on_signals()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="stripewell-"))
    try:
        return perform(run, folder, Report())
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
