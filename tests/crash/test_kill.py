"""P1: the real daemon is killed fifty times under load, and every acknowledged write is there.

The page cache survives the death of a process, so nothing acknowledged may be missing, flushed or
not. The volume is read back after every restart, judged, and pinned: the next life builds on it.
"""

from __future__ import annotations

import faulthandler
import subprocess
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

from tests.cli.conftest import Daemon, Stripewell, gone
from tests.crash.clients import Clients, judge, read_volume
from tests.crash.writer import Work
from tests.sim.oracle import SECTOR, Oracle

KILLS = 50
VOLUME = 16 << 20
JOURNAL = 4 << 20
CLIENTS = 4


def create(stripewell: Stripewell) -> None:
    """A pool so small that its journal laps and its stripes have to be collected."""
    urls = [f"file://{stripewell.directory}/d{n}?size=16M" for n in range(6)]
    code = ("--data", "4", "--parity", "2", "--journal-size", "4M", "--slot-size", "64K")
    stripewell.ok("pool", "create", "tank", *code, *urls)
    stripewell.ok("volume", "create", "tank/vm1", "--size", str(VOLUME))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_all(daemon: Daemon) -> None:
    """Kill the daemon; its worker has to follow by itself."""
    [worker] = children_of(daemon.process.pid)
    daemon.kill()
    assert gone(worker)


def kill_early(stripewell: Stripewell, seconds: float) -> bool:
    """Start a daemon and kill it so many seconds later; True if it was not ready yet."""
    command = stripewell._command(("serve", "tank"), None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        time.sleep(seconds)
        workers = children_of(process.pid)
        process.kill()
        ready = process.stdout.read()
    assert all(gone(worker) for worker in workers)
    return ready == ""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_acknowledged_writes_survive_fifty_kills(
    stripewell: Stripewell, capsys: pytest.CaptureFixture[str]
) -> None:
    # It takes longer than what pytest takes for a hang; the timeout above is the limit.
    faulthandler.cancel_dump_traceback_later()
    rng = Random(20)
    create(stripewell)
    oracle = Oracle()
    oracle.add_volume("vm1", VOLUME)
    happened: Counter[str] = Counter()
    unflushed, restarts, written = [], [], 0
    with Clients(CLIENTS, seed=21) as clients:
        daemon = stripewell.serve()
        for number in range(KILLS):
            clients.start(Work(daemon.socket, "vm1", depth=16))
            time.sleep(rng.uniform(0.2, 0.8))
            status = stripewell.json("pool", "status", "tank")
            time.sleep(rng.uniform(0.0, 0.1))
            kill_all(daemon)
            life = clients.finish()
            assert life.errors == []
            assert status["state"] == "healthy"
            happened.update(status["counters"])
            unflushed.append(life.unflushed())
            written += life.acknowledged_sectors * SECTOR
            if number % 5 == 4:
                happened["killed_in_recovery"] += kill_early(stripewell, rng.uniform(0.25, 0.5))
            began = time.monotonic()
            daemon = stripewell.serve()
            restarts.append(time.monotonic() - began)
            life.tell(oracle, "vm1")
            judge(oracle, "vm1", read_volume(daemon.socket, "vm1"))
    assert stripewell.json("pool", "check", "tank")["faults"] == []
    assert daemon.terminate() == (0, "", "")
    laps = written // JOURNAL
    with capsys.disabled():
        print(
            f"\n{KILLS} kills under load, {happened['killed_in_recovery']} more in recovery;"
            f" unflushed acknowledged writes at a kill: {min(unflushed)} to {max(unflushed)};"
            f" {written >> 20} MiB, {laps} laps of the journal, {happened['checkpoints']}"
            f" checkpoints, {happened['collected_stripes']} stripes collected; restart"
            f" {np.median(restarts):.2f} s, at most {max(restarts):.2f} s"
        )
    # A kill may come right behind a flush, but nearly all of them find something outstanding.
    assert sum(count > 0 for count in unflushed) >= KILLS * 9 // 10
    assert min(laps, happened["checkpoints"]) > KILLS
    assert happened["collected_stripes"] > 0
