"""A memory export served by a process of its own, for clients that others have written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64 << 20


@dataclass(frozen=True)
class Served:
    """Where the export is."""

    socket: Path
    port: int

    @property
    def uri(self) -> str:
        return f"nbd+unix:///memory?socket={self.socket}"

    @property
    def tcp_uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/memory"


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


@pytest.fixture(params=["uvloop", "asyncio", "slow"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """A writable export: on either event loop, and with every request answered from a task."""
    flags = {"uvloop": [], "asyncio": ["--plain"], "slow": ["--slow"]}[request.param]
    yield from serve(tmp_path, *flags)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Served]:
    """A read-only export."""
    yield from serve(tmp_path, "--read-only")
