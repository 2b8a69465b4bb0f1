"""The servers that are measured side by side, behind one small interface.

Each serves one volume of `VOLUME_BYTES` on a unix socket from files in its own folder on the same
file system: stripewell a 4+2 pool on six sparse files, the peers one raw file.

Called by `compare`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.deployment import Deployment
from bench.processes import end, wait_until

VOLUME_BYTES = 1 << 30


class Server(Protocol):
    """One NBD server with one export."""

    name: str

    @property
    def uri(self) -> str:
        """What a client connects to."""

    def start(self) -> None:
        """Serve; returns when clients can connect."""

    def stop(self) -> None:
        """End the processes. Idempotent."""

    def backlog(self) -> int | None:
        """Bytes answered that still have to be moved to their place.

        None if the server has no such thing, because the page cache plays that role.
        """


class Stripewell:
    """A pool 4+2 on six sparse files."""

    name = "stripewell"

    def __init__(self, folder: Path) -> None:
        self.site = Deployment(folder)

    @property
    def uri(self) -> str:
        return self.site.uri("bench")

    def start(self) -> None:
        self.site.folder.mkdir(parents=True)
        self.site.create_pool(devices=6, size="4G", data=4, parity=2)
        self.site.create_volume("bench", str(VOLUME_BYTES))
        self.site.serve()

    def stop(self) -> None:
        self.site.__exit__(None, None, None)

    def backlog(self) -> int | None:
        return int(self.site.status()["journal"]["unpacked_bytes"])

    def journal_bytes(self) -> int:
        """Size of the journal."""
        return int(self.site.status()["journal"]["size_bytes"])


class RawFileServer:
    """A peer that serves one sparse raw file."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "raw.img"
        self.socket = folder / "nbd.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def command(self) -> Sequence[str]:
        """The command line that serves `image` on `socket` in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        with self.image.open("ab"):
            os.truncate(self.image, VOLUME_BYTES)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self.socket.exists, 10, what=f"{self.name} listens")

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        if self._process is not None:
            end(self._process)

    def backlog(self) -> int | None:
        return None


class QemuNbd(RawFileServer):
    """QEMU's server with the cache mode its guests use."""

    name = "qemu-nbd"

    def command(self) -> Sequence[str]:
        mode = ["--format=raw", "--cache=writeback", "--discard=unmap", "--persistent"]
        return ["qemu-nbd", *mode, "--shared=32", f"--socket={self.socket}", str(self.image)]


class Nbdkit(RawFileServer):
    """nbdkit's file plugin, as it comes."""

    name = "nbdkit"

    def command(self) -> Sequence[str]:
        return ["nbdkit", "--foreground", "--unix", str(self.socket), "file", str(self.image)]


def missing_tools() -> list[str]:
    """Programs the comparison needs and the host lacks."""
    return [tool for tool in ("fio", "qemu-nbd", "qemu-io", "nbdkit") if shutil.which(tool) is None]
