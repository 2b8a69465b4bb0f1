"""Exports for clients that others have written, each served by a process of its own: one in memory,
and a volume of the real daemon."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.deployment import Deployment

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64 << 20


@dataclass(frozen=True)
class Served:
    """Where the export is."""

    socket: Path
    port: int
    name: str = "memory"
    description: str = "a volume in memory"
    #: Beside base:allocation.
    contexts: tuple[str, ...] = ("test:written",)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    @property
    def tcp_uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/{self.name}"


def serve(folder: Path, *flags: str) -> Generator[Served, None, None]:
    """Serve from the first `next` on; closing stops the server with SIGTERM."""
    path = folder / "nbd.sock"
    command = [sys.executable, "-m", "tests.interop.memory_server", "--tcp", *flags]
    command += ["--unix", str(path), "--size", str(SIZE)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready, port = process.stdout.readline().split()
        assert ready == "ready"
        try:
            yield Served(path, int(port))
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert not path.exists()


@pytest.fixture(scope="session")
def site() -> Iterator[Deployment]:
    """A daemon with a pool 4+2. What clients did to it leaves no fault."""
    folder = Path(tempfile.mkdtemp(prefix="swinterop-"))
    try:
        with Deployment(folder) as deployment:
            deployment.create_pool(6, "192M", 4, 2)
            deployment.serve(options=("--tcp", "127.0.0.1:0"))
            yield deployment
            assert deployment.query("pool", "check", deployment.pool)["faults"] == []
            deployment.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def volume(site: Deployment) -> Iterator[Served]:
    """A fresh volume."""
    site.create_volume("disk", str(SIZE))
    contexts = ("qemu:allocation-depth", "stripewell:redundancy")
    yield Served(site.socket, site.tcp_port, "disk", "stripewell volume tank/disk", contexts)
    site.run("volume", "delete", "tank/disk")


@pytest.fixture(params=["uvloop", "asyncio", "slow", "daemon"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A writable export: of the daemon, or in memory on either event loop, and with every request
    answered from a task."""
    if request.param == "daemon":
        with volume(request.getfixturevalue("site")) as served:
            yield served
        return
    flags = {"uvloop": [], "asyncio": ["--plain"], "slow": ["--slow"]}[request.param]
    yield from serve(tmp_path, *flags)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Served]:
    """A read-only export."""
    yield from serve(tmp_path, "--read-only")
