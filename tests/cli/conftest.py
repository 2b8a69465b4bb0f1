"""The real command in subprocesses, on files in a temporary directory.

Sockets live below a short directory: a unix socket's path has at most 107 bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
DEVICE_SIZE = "64M"
PROGRAM = (sys.executable, "-m", "stripewell")


@dataclass
class Daemon:
    """`stripewell serve` in a subprocess; `ready` is its one line on stdout."""

    process: subprocess.Popen[str]
    ready: str

    @property
    def uri(self) -> str:
        return re.findall(r"nbd\S*://[^\s,]+", self.ready)[0]

    @property
    def socket(self) -> str:
        return self.uri.partition("socket=")[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=SECONDS)

    def terminate(self) -> tuple[int, str, str]:
        """Exit status, further stdout, stderr."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


@dataclass
class Stripewell:
    """Runs commands with one state directory and working directory."""

    state: Path
    directory: Path
    daemons: list[Daemon] = field(default_factory=list)

    def __call__(
        self, *arguments: str, state: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. No command may ever show a traceback."""
        done = subprocess.run(
            self._command(arguments, state),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def ok(self, *arguments: str, state: Path | None = None) -> str:
        """The output of a command that has to succeed."""
        done = self(*arguments, state=state)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str, state: Path | None = None) -> Any:
        return json.loads(self.ok(*arguments, "--json", state=state))

    def refused(self, *arguments: str, state: Path | None = None, status: int = 1) -> str:
        """The one line of a command that has to fail, without the program's name."""
        done = self(*arguments, state=state)
        assert (done.returncode, done.stdout) == (status, ""), done.stdout + done.stderr
        [line] = done.stderr.splitlines()
        assert line.startswith("stripewell: ")
        return line.removeprefix("stripewell: ")

    def devices(self, count: int, prefix: str = "d") -> list[str]:
        """URLs of devices that `pool create` makes."""
        return [f"file://{self.directory}/{prefix}{n}?size={DEVICE_SIZE}" for n in range(count)]

    def create(self, name: str = "tank", data: int = 2, parity: int = 1, prefix: str = "d") -> None:
        code = ("--data", str(data), "--parity", str(parity))
        self.ok("pool", "create", name, *code, *self.devices(data + parity, prefix))

    def serve(
        self, name: str = "tank", *arguments: str, state: Path | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> Daemon:  # fmt: skip
        """A daemon that is ready."""
        daemon = self.start("serve", name, *arguments, state=state, program=program)
        process = daemon.process
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], SECONDS)
        daemon.ready = process.stdout.readline() if readable else ""
        if not daemon.ready:
            process.kill()
            _, said = process.communicate(timeout=SECONDS)
            pytest.fail(f"the daemon was not ready: status {process.returncode}: {said}")
        return daemon

    def start(
        self, *arguments: str, state: Path | None = None, program: Sequence[str] = PROGRAM
    ) -> Daemon:
        """A daemon that may not be ready yet, run by `program`."""
        process = subprocess.Popen(
            self._command(arguments, state, program),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        daemon = Daemon(process, "")
        self.daemons.append(daemon)
        return daemon

    def end(self) -> None:
        """End every daemon."""
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.kill()
            for stream in (daemon.process.stdout, daemon.process.stderr):
                if stream:
                    stream.close()

    def _command(
        self, arguments: tuple[str, ...], state: Path | None, program: Sequence[str] = PROGRAM
    ) -> list[str]:
        return [*program, "--state", str(state or self.state), *arguments]


@pytest.fixture
def short_path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sw-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def stripewell(short_path: Path) -> Iterator[Stripewell]:
    (short_path / "devices").mkdir()
    runner = Stripewell(short_path / "state", short_path / "devices")
    yield runner
    runner.end()


def gone(pid: int, seconds: float = 10) -> bool:
    """True once a process that is not our child has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(pid, 0)
            time.sleep(0.05)
            continue
        return True
    return False
