"""A QEMU guest with an NBD export as its disk, driven from the host.

    with Guest(folder, Disk(socket, "vm1")) as guest:
        status, output = guest.run("mkfs.ext4 -q /dev/vda", timeout=60)

The guest runs the host's installed cloud kernel under TCG, so it needs neither KVM nor an image.
Commands travel over a port of their own: the console carries only what the kernel says and is read
back as the log. Leaving the block kills QEMU by its process id; `power_off` is the clean way.

Called by the tests in this folder and by `demo`.
"""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from .buses import VIRTIO_BLK, Bus
from .initramfs import MissingParts, build, find_kernel
from .qmp import Qmp

#: What the kernel or a file system says when a disk failed it.
TROUBLE = re.compile(
    r"I/O error|critical (medium|target|space)|EXT4-fs (error|warning)|XFS .*(error|corrupt|shut)"
    r"|JBD2.*error|Remounting filesystem read-only|blocked for more than|Kernel panic|Call Trace"
    r"|exception Emask|hard resetting|nvme.*timeout|nbd\d.*(failed|timed out|error)",
    re.IGNORECASE,
)

#: Bytes of a command; what is longer belongs in a file of the guest.
COMMAND_LIMIT = 65536


class GuestError(Exception):
    """The guest did not boot, did not answer, or a command that had to succeed failed."""


@dataclass(frozen=True)
class Disk:
    """An NBD export on a unix socket, and how QEMU treats its loss and its errors."""

    socket: Path
    export: str
    reconnect_delay: int = 60
    #: The device's policies; None leaves QEMU's defaults (stop on ENOSPC, report the rest).
    write_errors: str | None = None
    read_errors: str | None = None
    bus: Bus = VIRTIO_BLK

    def arguments(self, index: int) -> list[str]:
        """The QEMU options that attach it; on virtio-blk the guest sees /dev/vda for index 0."""
        policy = f",werror={self.write_errors}" if self.write_errors else ""
        policy += f",rerror={self.read_errors}" if self.read_errors else ""
        return [
            "-blockdev",
            f"driver=nbd,node-name=nbd{index},server.type=unix,server.path={self.socket},"
            f"export={self.export},reconnect-delay={self.reconnect_delay},discard=unmap",
            "-blockdev",
            f"driver=raw,node-name=disk{index},file=nbd{index},discard=unmap",
            *self.bus.arguments(f"disk{index}", policy),
        ]


@dataclass(frozen=True)
class Extras:
    """What a guest has besides its disks."""

    modules: tuple[str, ...] = ()
    #: Programs of the host, each with the package it is from.
    tools: Mapping[str, str] = field(default_factory=dict)
    #: For QEMU, as they are.
    arguments: tuple[str, ...] = ()


NOTHING = Extras()


class Guest:
    """One QEMU process. `folder` receives its sockets, console log and initial RAM disk."""

    def __init__(
        self, folder: Path, *disks: Disk, memory_mib: int = 512, extras: Extras = NOTHING
    ) -> None:
        self.folder = folder
        self.disks = disks
        self.memory_mib = memory_mib
        self.extras = extras
        self._ids = itertools.count(1)
        self._buffer = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: socket.socket | None = None
        self._qmp: Qmp | None = None

    def __enter__(self) -> Guest:
        try:
            self.boot()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise GuestError("the guest was never started")
        return self._process.pid

    @property
    def qmp(self) -> Qmp:
        """QEMU's control socket."""
        if self._qmp is None:
            raise GuestError("the guest is not running")
        return self._qmp

    def boot(self, timeout: float = 60) -> None:
        """Start QEMU and return when the agent inside answers.

        Raises `GuestError`, `MissingParts`.
        """
        deadline = time.monotonic() + timeout
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = self._arguments()
        with (
            _listen(self.folder / "qmp.sock") as control,
            _listen(self.folder / "agent.sock") as agent,
            (self.folder / "qemu.log").open("ab") as log,
        ):
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            self._agent = self._accept(agent, deadline)
            self._qmp = self._control(control, deadline)
        while self._line(deadline, "the guest did not boot") != "ready":
            pass

    def run(self, command: str, timeout: float = 60) -> tuple[int, str]:
        """Run a shell command: its exit status and what it printed (the last 256 KiB).

        After `timeout` seconds the agent kills it and the status is 137. Raises `GuestError` when
        the agent itself is silent for ten seconds more.
        """
        if self._agent is None:
            raise GuestError("the guest is not running")
        encoded = base64.b64encode(command.encode()).decode()
        if len(encoded) > COMMAND_LIMIT:
            raise GuestError(f"the command is too long for the agent: {len(encoded)} bytes")
        number = next(self._ids)
        deadline = time.monotonic() + timeout + 10
        self._agent.sendall(f"{number} {max(1, round(timeout))} {encoded}\n".encode())
        return self._answer(number, deadline, f"no answer from the guest to: {command}")

    def check(self, command: str, timeout: float = 60) -> str:
        """What a command printed. Raises `GuestError` unless it exits with 0."""
        status, output = self.run(command, timeout)
        if status != 0:
            raise GuestError(f"exit status {status} in the guest from: {command}\n{output}")
        return output

    def start(self, command: str) -> str:
        """Run a shell command in the background; returns the job for `poll` and `finish`."""
        job = f"/run/job{next(self._ids)}"
        self.check(f"( ( {command}\n) >{job}.out 2>&1; echo $? >{job}.status ) </dev/null &")
        return job

    def poll(self, job: str) -> bool:
        """Has the job ended?"""
        return self.run(f"test -s {job}.status")[0] == 0

    def finish(self, job: str, timeout: float = 60) -> tuple[int, str]:
        """A job's exit status and output. Raises `GuestError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.poll(job):
            if time.monotonic() > deadline:
                raise GuestError(f"the guest's job did not end in {timeout:.0f} s")
            time.sleep(0.2)
        return int(self.check(f"cat {job}.status")), self.check(f"cat {job}.out")

    def troubles(self) -> list[str]:
        """Lines of the kernel's log that speak of a disk or file system in trouble."""
        return [line for line in self.check("dmesg").splitlines() if TROUBLE.search(line)]

    def power_off(self, timeout: float = 60) -> None:
        """Unmount, sync and switch off; returns when QEMU has exited. Raises `GuestError`."""
        if self._agent is None or self._process is None:
            raise GuestError("the guest is not running")
        self.check("if grep -q ' /mnt ' /proc/mounts; then umount /mnt; fi && sync", timeout)
        command = base64.b64encode(b"poweroff -f").decode()
        self._agent.sendall(f"{next(self._ids)} 60 {command}\n".encode())
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"QEMU did not exit in {timeout:.0f} s after poweroff") from None
        self.kill()

    def kill(self) -> None:
        """End QEMU at once, like pulling the plug. Idempotent."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def console(self) -> str:
        """Everything the kernel wrote to the console so far."""
        log = self.folder / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _arguments(self) -> list[str]:
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            raise MissingParts("qemu-system-x86_64 is not installed: apt install qemu-system-x86")
        kernel, ramdisk = find_kernel(), self.folder / "initramfs.cpio"
        modules = [module for disk in self.disks for module in disk.bus.modules]
        build(ramdisk, kernel, (*modules, *self.extras.modules), self.extras.tools)
        machine = "-nodefaults -no-user-config -display none -no-reboot -machine q35"
        speed = f"-accel tcg,thread=multi -cpu max -smp 2 -m {self.memory_mib}"
        arguments = [qemu, *machine.split(), *speed.split()]
        arguments += ["-kernel", str(kernel.image), "-initrd", str(ramdisk)]
        arguments += ["-append", "console=ttyS0 panic=-1 mitigations=off nokaslr tsc=reliable"]
        arguments += ["-serial", f"file:{self.folder / 'console.log'}"]
        arguments += ["-chardev", f"socket,id=agent,path={self.folder / 'agent.sock'}"]
        arguments += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"]
        arguments += ["-qmp", f"unix:{self.folder / 'qmp.sock'}"]
        for index, disk in enumerate(self.disks):
            arguments += disk.arguments(index)
        return [*arguments, *self.extras.arguments]

    def _accept(self, listener: socket.socket, deadline: float) -> socket.socket:
        """QEMU's connection, which it makes as it starts."""
        listener.settimeout(0.1)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if self._process is None or self._process.poll() is not None:
                    raise GuestError(f"QEMU did not start: {self._tail('qemu.log')}") from None
                if time.monotonic() > deadline:
                    raise GuestError("QEMU did not connect to its sockets") from None

    def _control(self, listener: socket.socket, deadline: float) -> Qmp:
        try:
            return Qmp(self._accept(listener, deadline))
        except OSError:
            raise GuestError(f"QEMU did not start: {self._tail('qemu.log')}") from None

    def _answer(self, number: int, deadline: float, what: str) -> tuple[int, str]:
        """The framed answer to a request; frames of older requests are dropped."""
        status, body, inside = 0, "", False
        while True:
            line = self._line(deadline, what)
            if line.startswith(f"begin {number} "):
                status, body, inside = int(line.split()[2]), "", True
            elif line == f"end {number}":
                return status, base64.b64decode(body).decode(errors="replace")
            elif inside:
                body += line

    def _line(self, deadline: float, what: str) -> str:
        if self._agent is None:
            raise GuestError("the guest is not running")
        while b"\n" not in self._buffer:
            self._agent.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._agent.recv(65536)
            except TimeoutError:
                raise GuestError(f"{what}; {self._tail('console.log')}") from None
            if not data:
                raise GuestError(f"QEMU has ended: {self._tail('qemu.log')}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode(errors="replace").strip()

    def _tail(self, name: str) -> str:
        log = self.folder / name
        text = log.read_text(errors="replace").strip() if log.exists() else ""
        return text[-600:] or f"{name} is empty"


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    return listener
