"""Processes and disks as the kernel shows them, and ending processes by their id.

Called by `deployment`, `servers` and the measurements.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")


def family(pid: int) -> list[int]:
    """A process and all its descendants that are alive."""
    members = [pid] if alive(pid) else []
    for child in _children(pid):
        members += family(child)
    return members


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in (PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def alive(pid: int) -> bool:
    """Does the process run? One that has ended but was not waited for does not."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def resident_bytes(pids: list[int]) -> int:
    """Memory of the processes, pages they share counted once (Pss)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def disk_written_bytes(folder: Path) -> int | None:
    """Bytes ever written to a folder's disk, by everybody; None if the kernel doesn't say."""
    device = folder.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    try:
        return int(stat.read_text().split()[6]) * 512
    except OSError:
        return None


def end(process: subprocess.Popen[bytes], grace: float = 10) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds. Idempotent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_until(
    condition: Callable[[], bool], timeout: float, step: float = 0.02, *, what: str
) -> float:
    """Wait for a condition; the seconds it took. Raises `TimeoutError` with `what` in its text."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(step)
    return time.monotonic() - started


def drop_page_cache() -> bool:
    """Write back and forget cached file data; False without the right to."""
    subprocess.run(["sync"], check=True)
    try:
        (PROC / "sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


class MemoryPeak:
    """Samples the memory of a process family while its block runs; `bytes` is the most seen."""

    def __init__(self, pid: int, period: float = 0.5) -> None:
        self.bytes = 0
        self._pid = pid
        self._period = period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, resident_bytes(family(self._pid)))
            if self._stop.wait(self._period):
                return
