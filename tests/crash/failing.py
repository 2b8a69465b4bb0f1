"""The real command line, and the real worker, with a crash or a record of writes built in.

    python -m tests.crash.failing --kill NAME:NTH -- --state DIR serve tank

kills the process with SIGKILL when the failpoint is reached for the NTH time. If the worker process
reaches it, both it and its daemon die; with --spare-daemon the worker alone. --trace DIR records
in `tests.crash.trace` what is written to files, by either process. --set MODULE.NAME=N changes a
constant, so that something rare happens soon. The worker is started with the same options and
--worker in front.

Everything is put in place by calls from here: production code knows none of it. Called by tests,
through `Plan`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import backends.open
from backends.base import Device
from pool import failpoints, mover, worker
from stripewell import daemon, opening
from stripewell.__main__ import run
from tests.crash.trace import Recorder, TracedDevice

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the launcher is to do; without anything, only to call the command line."""

    #: Failpoint and count, "name:3".
    kill: str = ""
    spare_daemon: bool = False
    #: The directory that receives the records of writes.
    trace: Path | None = None
    #: ("tests.crash.trace.SLOWEST", 150) and the like.
    constants: tuple[tuple[str, int], ...] = ()

    def command(self) -> list[str]:
        """What to put in front of the arguments of `stripewell`, in any working directory."""
        return ["env", f"PYTHONPATH={ROOT}", *self._program(), "--"]

    def worker_command(self) -> list[str]:
        """The same in front of a worker's arguments; the environment is the daemon's."""
        return [*self._program(), "--worker", "--"]

    def _program(self) -> list[str]:
        options = [f"--kill={self.kill}"] if self.kill else []
        options += ["--spare-daemon"] if self.spare_daemon else []
        options += [f"--trace={self.trace}"] if self.trace else []
        options += [f"--set={name}={value}" for name, value in self.constants]
        return [sys.executable, "-m", __spec__.name, *options]


def main() -> int:
    """Put the plan in place, then be the daemon or the worker."""
    plan, is_worker, arguments = _parse()
    for name, value in plan.constants:
        module, _, constant = name.rpartition(".")
        target = importlib.import_module(module)
        assert isinstance(getattr(target, constant), int)
        setattr(target, constant, value)
    if plan.kill:
        failpoints.install(_killer(plan, is_worker))
    if plan.trace:
        _trace(plan.trace)
    if is_worker:
        sys.argv[1:] = arguments
        worker.main()
        return 0

    class ArmedMover(mover.ProcessMover):
        command = plan.worker_command()

    daemon.ProcessMover = ArmedMover  # type: ignore[misc]
    return run(arguments)


def _parse() -> tuple[Plan, bool, list[str]]:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--kill", default="", metavar="NAME:NTH")
    parser.add_argument("--spare-daemon", action="store_true")
    parser.add_argument("--trace", type=Path, metavar="DIR")
    parser.add_argument("--set", action="append", default=[], metavar="MODULE.NAME=N")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    constants = tuple(
        (name, int(value)) for name, _, value in (s.partition("=") for s in given.set)
    )
    plan = Plan(given.kill, given.spare_daemon, given.trace, constants)
    return plan, given.worker, given.arguments


def _killer(plan: Plan, is_worker: bool) -> Callable[[str], None]:
    wanted, _, nth = plan.kill.partition(":")
    if wanted not in failpoints.FAILPOINTS:
        raise SystemExit(f"there is no failpoint {wanted!r}")
    left = int(nth)

    def hook(name: str) -> None:
        nonlocal left
        if name == wanted:
            left -= 1
            if left == 0:
                if is_worker and not plan.spare_daemon:
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _trace(folder: Path) -> None:
    """Record the writes of every device that is opened, here or by descriptors in the worker."""
    attach, open_backend = backends.open.attach, backends.open.open_backend

    def traced(backend: backends.open.Backend) -> backends.open.Backend:
        if not isinstance(backend, Device):
            return backend
        return TracedDevice(backend, Recorder(folder, backend.url))

    def attach_traced(*given: object) -> backends.open.Backend:
        return traced(attach(*given))  # type: ignore[arg-type]

    async def open_traced(url: str, **options: bool) -> backends.open.Backend:
        return traced(await open_backend(url, **options))

    worker.attach = attach_traced  # type: ignore[attr-defined]
    opening.open_backend = open_traced  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
