"""P1 with a foreign judge: fio writes and verifies through QEMU's client, the daemon is killed.

fio's nbd engine does not reconnect, so it talks to a qemu-storage-daemon whose client does, exactly
as that of a guest: what was not answered is sent again, what was answered is not. fio keeps its own
checksums and verifies everything it was told was written, some of it while it goes on writing and
all of it at the end; no request may fail. Kills come while it writes and while it verifies.
"""

from __future__ import annotations

import faulthandler
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from bench.processes import end, wait_until
from tests.cli.conftest import SECONDS, Stripewell
from tests.crash.locks import wait_until_free

JOBS = 4
KILLS = 4
VOLUME = 24 << 20
DEVICES = 6

#: One job. Blocks of each size are aligned to it, and none is written twice while the first write
#: of it is under way.
JOB = {
    "ioengine": "nbd",
    "rw": "randwrite",
    "bssplit": "4k/60:16k/25:64k/15",
    "iodepth": "16",
    "fsync": "50",
    "size": str(VOLUME),
    "io_size": str(VOLUME),
    "serialize_overlap": "1",
    "verify": "crc32c",
    "do_verify": "1",
    "verify_fatal": "1",
    "verify_backlog": "300",
    #: So slow that a job lasts through its kills.
    "rate": "5m,5m",
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    for tool in ("fio", "qemu-storage-daemon"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@contextmanager
def reconnecting(folder: Path, server: str) -> Iterator[str]:
    """The URI of an export behind which QEMU's client keeps trying for a minute."""
    socket = folder / "qsd.sock"
    blockdev = (
        f"driver=nbd,node-name=disk,server.type=unix,server.path={server},export=vm1,"
        "reconnect-delay=60"
    )
    command = ["qemu-storage-daemon", "--blockdev", blockdev]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    command += ["--export", "type=nbd,id=disk,node-name=disk,name=,writable=on"]
    process = subprocess.Popen(command)
    try:
        wait_until(socket.exists, 10, what="qemu-storage-daemon starts")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        end(process)


def start_fio(folder: Path, uri: str, seed: int) -> subprocess.Popen[str]:
    options = {**JOB, "name": "job", "uri": uri, "randseed": str(seed)}
    command = ["fio", *(f"--{key}={value}" for key, value in options.items())]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(fio: subprocess.Popen[str]) -> tuple[int, int]:
    """Requests written and verified."""
    said, _ = fio.communicate(timeout=SECONDS)
    assert fio.returncode == 0, said
    assert "err= 0" in said
    found = re.search(r"issued rwts: total=(\d+),(\d+)", said)
    assert found is not None, said
    return int(found[2]), int(found[1])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_fio_verifies_through_kills(
    stripewell: Stripewell, capsys: pytest.CaptureFixture[str]
) -> None:
    faulthandler.cancel_dump_traceback_later()
    rng = Random(50)
    urls = [f"file://{stripewell.directory}/d{n}?size=16M" for n in range(DEVICES)]
    code = ("--data", "4", "--parity", "2", "--journal-size", "4M", "--slot-size", "64K")
    stripewell.ok("pool", "create", "tank", *code, *urls)
    stripewell.ok("volume", "create", "tank/vm1", "--size", str(VOLUME))
    daemon = stripewell.serve()
    folder = stripewell.directory.parent
    kills = written = verified = 0
    with reconnecting(folder, daemon.socket) as uri:
        for job in range(JOBS):
            fio = start_fio(folder, uri, job)
            for _ in range(KILLS):
                time.sleep(rng.uniform(0.3, 1.2))
                kills += fio.poll() is None
                daemon.kill()
                wait_until_free(stripewell.directory)
                daemon = stripewell.serve()
            writes, reads = finish(fio)
            written, verified = written + writes, verified + reads
    checkpoints = stripewell.json("pool", "status", "tank")["counters"].get("checkpoints", 0)
    assert stripewell.json("pool", "check", "tank")["faults"] == []
    assert daemon.terminate()[0] == 0
    laps = JOBS * VOLUME // (4 << 20)
    with capsys.disabled():
        print(
            f"\nfio: {kills} kills in {JOBS} jobs, {written} writes, {verified} verified,"
            f" {laps} laps of the journal; in the last life {checkpoints} checkpoints"
        )
    # On a fast machine a job may end before its last kills.
    assert kills >= JOBS * KILLS // 2
    assert verified >= written > 0
