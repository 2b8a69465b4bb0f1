"""A pool on sparse files with its daemon, driven through the `stripewell` command alone.

    with Deployment(folder) as site:
        site.create_pool(devices=6, size="2G", data=4, parity=2)
        site.create_volume("vm1", "2G")
        site.serve()

Everything lives below `folder`. Leaving the block ends the daemon by its process id.

Called by `demo`, the measurements and `tests/guest`.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.processes import alive, end, family, wait_until

Json = Any


class CommandFailed(Exception):
    """A `stripewell` command failed or the daemon did; the text carries what it printed."""


def stripewell_command() -> list[str]:
    """The command of the environment this interpreter belongs to."""
    script = Path(sys.executable).with_name("stripewell")
    return [str(script)] if script.exists() else [sys.executable, "-m", "stripewell"]


class Deployment:
    """One pool, at most one daemon."""

    def __init__(
        self, folder: Path, pool: str = "tank", command: Sequence[str] | None = None
    ) -> None:
        self.folder = folder
        self.pool = pool
        self.state = folder / "state"
        self.socket = folder / "nbd.sock"
        self.log = folder / "daemon.log"
        self.devices: list[Path] = []
        self._command = list(command or stripewell_command())
        self._urls: dict[Path, str] = {}
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._daemon is not None:
            end(self._daemon)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self._daemon is None:
            raise CommandFailed("the daemon was never started")
        return self._daemon.pid

    def run(self, *arguments: str, timeout: float = 60) -> str:
        """What a command printed. Raises `CommandFailed` unless it exits with 0 in time."""
        command = [*self._command, "--state", str(self.state), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"{' '.join(arguments)}: no end in {timeout:.0f} s") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise CommandFailed(f"{' '.join(arguments)}: exit {done.returncode}: {said}")
        return done.stdout

    def query(self, *arguments: str, timeout: float = 60) -> Json:
        """What a command prints with --json."""
        return json.loads(self.run(*arguments, "--json", timeout=timeout))

    def create_pool(
        self,
        devices: int = 6,
        size: str = "2G",
        data: int = 4,
        parity: int = 2,
        options: Sequence[str] = (),
    ) -> None:
        """Make sparse files and a pool of them."""
        (self.folder / "devices").mkdir(parents=True, exist_ok=True)
        self.devices = [self.folder / "devices" / f"disk{n}.img" for n in range(devices)]
        self._urls = {path: f"file://{path}?size={size}" for path in self.devices}
        code = ["--data", str(data), "--parity", str(parity)]
        self.run("pool", "create", self.pool, *code, *options, *self._urls.values())

    def import_pool(self, devices: Sequence[Path]) -> None:
        """Make the pool known from some of its devices."""
        self.run("pool", "import", *(self._urls[path] for path in devices))

    def create_volume(self, name: str, size: str) -> None:
        """Make a thin volume."""
        self.run("volume", "create", f"{self.pool}/{name}", "--size", size)

    def status(self) -> Json:
        """`pool status --json`."""
        return self.query("pool", "status", self.pool)

    def journal_devices(self) -> list[Path]:
        """The files that hold replicas of the journal."""
        status = self.status()
        urls = {device["index"]: device["url"] for device in status["devices"]}
        replicas = [urls[index] for index in status["journal"]["replicas"]]
        return [path for path in self.devices if any(str(path) in url for url in replicas)]

    def device_states(self) -> dict[Path, str]:
        """The state of every device file, "missing" for one the pool does not list."""
        listed = [(device["url"], device["state"]) for device in self.status()["devices"]]
        return {
            path: next((state for url, state in listed if str(path) in url), "missing")
            for path in self.devices
        }

    def allocated_bytes(self) -> int:
        """What the device files occupy on the host's disk."""
        return sum(path.stat().st_blocks * 512 for path in self.devices if path.exists())

    def uri(self, volume: str) -> str:
        """The NBD URI of a volume."""
        return f"nbd+unix:///{volume}?socket={self.socket}"

    @property
    def tcp_port(self) -> int:
        """Where the daemon listens on loopback, if it was told to."""
        found = re.findall(r" nbd://127\.0\.0\.1:(\d+)/", self.log.read_text())
        if not found:
            raise CommandFailed("the daemon does not listen on TCP")
        return int(found[-1])

    def serve(
        self,
        timeout: float = 60,
        program: Sequence[str] | None = None,
        options: Sequence[str] = (),
    ) -> float:
        """Start the daemon, as `program` if given; seconds until it said that it serves. Raises
        `CommandFailed`."""
        said = self.log.stat().st_size if self.log.exists() else 0
        command = [*(program or self._command), "--state", str(self.state), "serve", self.pool]
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [*command, "--unix", str(self.socket), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        while b": serving " not in (output := self.log.read_bytes()[said:]):
            if self._daemon.poll() is not None or time.monotonic() - started > timeout:
                end(self._daemon)
                raise CommandFailed(f"serve {self.pool}: {output.decode(errors='replace').strip()}")
            time.sleep(0.01)
        return time.monotonic() - started

    def take_over(self, options: Sequence[str] = ()) -> None:
        """Start a successor that goes on with the daemon's connections; the daemon ends. Raises
        `CommandFailed`."""
        predecessor = self._daemon
        self.serve(options=("--take-over", *options))
        if predecessor is not None and predecessor.wait(60) != 0:
            raise CommandFailed(f"the predecessor failed: {self.complaints()}")

    def kill(self) -> list[int]:
        """SIGKILL the daemon; ids of processes of its family that still run five seconds later."""
        members = family(self.pid)
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGKILL)
            self._daemon.wait()
        try:
            wait_until(lambda: not any(map(alive, members)), 5, what="processes end")
        except TimeoutError:
            return [pid for pid in members if alive(pid)]
        return []

    def stop(self, timeout: float = 60) -> None:
        """SIGTERM the daemon. Raises `CommandFailed` unless it exits with 0 in time."""
        if self._daemon is None:
            return
        self._daemon.terminate()
        try:
            status = self._daemon.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"the daemon ignored SIGTERM for {timeout:.0f} s") from None
        if status != 0:
            raise CommandFailed(f"the daemon ended with {status}: {self.complaints()}")

    def complaints(self) -> str:
        """The end of what the daemon printed."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""

    def forget(self) -> None:
        """Delete all local state."""
        shutil.rmtree(self.state)
