"""R22: one pool, one writer, whatever became of the last one; and how a daemon ends under load.

`tests/cli` shows that a second daemon is refused; here are the cases in between: a predecessor that
is dying, that is stopped, or of which only the worker is left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

from backends.base import BLOCK_SIZE, DeviceBusy
from backends.file import FileDevice, open_file
from pool.format.geometry import layout
from pool.mover import ProcessMover
from tests.cli.conftest import SECONDS, Stripewell, short_path, stripewell
from tests.crash.clients import Clients, judge, read_volume
from tests.crash.writer import Work
from tests.sim.oracle import Oracle

__all__ = ["short_path", "stripewell"]

VOLUME = 8 << 20


@pytest.fixture
def tank(stripewell: Stripewell) -> Stripewell:
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", str(VOLUME))
    return stripewell


@pytest.fixture
def clients() -> Iterator[Clients]:
    with Clients(2, seed=40) as clients:
        yield clients


def test_a_stopped_daemon_still_holds_the_pool(tank: Stripewell, short_path: Path) -> None:
    """One that does not answer may go on at any moment: its devices stay locked."""
    daemon = tank.serve()
    devices = tank.json("pool", "list")[0]["devices"]
    other = short_path / "other"
    tank.ok("pool", "import", *devices, state=other)
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        assert "in use by another process" in tank.refused("serve", "tank", state=other)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert daemon.terminate() == (0, "", "")
    tank.serve(state=other)


async def test_the_lock_is_held_as_long_as_the_worker_lives(tmp_path: Path) -> None:
    """The engine has let go of the device, as if it had died; its worker can still write there."""
    url = str(tmp_path / "d0")
    size, slot_blocks = 16 << 20, 16
    device = await asyncio.to_thread(open_file, url, url=url, size=size, create=True)
    mover = ProcessMover()
    try:
        await mover.add_member(0, device, layout(size, 64 * BLOCK_SIZE, slot_blocks))
        await device.close()
        with pytest.raises(DeviceBusy):
            await _open(url)
    finally:
        await mover.close()
    await (await _open(url)).close()


async def _open(path: str) -> FileDevice:
    return await asyncio.to_thread(open_file, path, url=path)


def test_a_successor_that_comes_at_once_is_refused_or_complete(
    tank: Stripewell, clients: Clients
) -> None:
    """Started while the killed one still dies: either the lock stops it, or it has everything."""
    oracle = Oracle()
    oracle.add_volume("vm1", VOLUME)
    daemon = tank.serve()
    for _ in range(3):
        clients.start(Work(daemon.socket, "vm1"))
        time.sleep(0.3)
        os.kill(daemon.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while (refused := tank("volume", "create", "tank/probe", "--size", "1M")).returncode:
            assert "in use by another process" in refused.stderr
            assert time.monotonic() < deadline
        tank.ok("volume", "delete", "tank/probe")
        life = clients.finish()
        assert life.errors == []
        life.tell(oracle, "vm1")
        daemon = tank.serve()
        judge(oracle, "vm1", read_volume(daemon.socket, "vm1"))


def test_a_socket_that_nobody_listens_on_is_replaced(tank: Stripewell) -> None:
    """It may be of a power failure, on which nothing was removed."""
    run = tank.state / "run"
    for name in ("tank.nbd.sock", "tank.ctl.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(run / name))
    daemon = tank.serve()
    assert read_volume(daemon.socket, "vm1") == bytes(VOLUME)
    assert tank.json("pool", "list")[0]["served"] is True
    assert daemon.terminate() == (0, "", "")
    assert list(run.iterdir()) == []


def test_a_refused_daemon_does_not_take_the_sockets_away(tank: Stripewell) -> None:
    daemon = tank.serve()
    tank.refused("serve", "tank")
    assert read_volume(daemon.socket, "vm1") == bytes(VOLUME)
    assert tank.json("pool", "list")[0]["served"] is True


def test_sigterm_under_load_loses_nothing_and_opens_fast(
    tank: Stripewell, clients: Clients, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = Oracle()
    oracle.add_volume("vm1", VOLUME)
    daemon = tank.serve()
    clients.start(Work(daemon.socket, "vm1"))
    time.sleep(0.8)
    began = time.monotonic()
    assert daemon.terminate() == (0, "", "")
    ended = time.monotonic()
    life = clients.finish()
    assert life.errors == []
    assert life.acknowledged
    assert life.unflushed()
    life.tell(oracle, "vm1")
    status = tank.json("pool", "status", "tank")
    assert (status["state"], status["problems"]) == ("healthy", [])
    opening = time.monotonic()
    daemon = tank.serve()
    opened = time.monotonic()
    judge(oracle, "vm1", read_volume(daemon.socket, "vm1"))
    with capsys.disabled():
        print(f"\nend under load {ended - began:.2f} s, start {opened - opening:.2f} s")
    assert opened - opening < 10
    assert daemon.terminate() == (0, "", "")
    assert tank.json("pool", "check", "tank")["faults"] == []
