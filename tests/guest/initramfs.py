"""An initial RAM disk for test guests, built on the spot from what the host has installed.

It holds busybox, the kernel modules of a virtio guest, the file system tools with their shared
libraries, and an agent that runs commands for the host over a virtio port (a UART loses bytes under
load). Nothing is downloaded and nothing is kept: `build` takes a fraction of a second.

Called by `harness.Guest`.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

#: Loaded in this order, each after what `modules.dep` says it needs.
MODULES = (
    "crc32c-intel",
    "crc32c_generic",
    "ext4",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "xfs",
)

#: Programs and their packages. What busybox has as well, its shell takes from here only by path.
TOOLS = {
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "blkdiscard": "util-linux",
}

#: PID 1. The console gets the kernel's messages, the virtio port belongs to the agent.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
mkdir -p /mnt
ln -sf /proc/mounts /etc/mtab
for module in $(cat /lib/modules.order); do insmod "$module"; done
until [ -c /dev/vport0p1 ]; do usleep 10000; done
exec sh /agent <>/dev/vport0p1 >&0 2>/dev/console
"""

#: A request is one line, "id seconds base64(command)"; the answer is framed by lines that carry
#: the id, so that whatever a late or killed command leaves behind is recognised and dropped. The
#: command is in a file, its output too: nothing it prints can be taken for a frame.
AGENT = """echo ready
while read -r id seconds command; do
  echo "$command" | base64 -d >/run/command
  timeout -s KILL "$seconds" sh /run/command </dev/null >/run/output 2>&1
  status=$?
  echo "begin $id $status"
  tail -c 262144 /run/output | base64
  echo "end $id"
done
"""


class MissingParts(Exception):
    """The host lacks something a guest is made of; the text names the package to install."""


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the modules that belong to it."""

    image: Path
    modules: Path


def find_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Kernel:
    """The newest cloud kernel installed. Raises `MissingParts`."""
    for image in sorted(boot.glob("vmlinuz-*-cloud-*"), key=_version, reverse=True):
        kernel = Kernel(image, modules / image.name.removeprefix("vmlinuz-"))
        if (kernel.modules / "modules.dep").exists() and os.access(image, os.R_OK):
            return kernel
    raise MissingParts(f"no readable cloud kernel in {boot}: apt install linux-image-cloud-amd64")


def _version(image: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", image.name))


def build(
    target: Path,
    kernel: Kernel,
    modules: Iterable[str] = (),
    tools: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the archive to `target`, with modules and tools besides the usual ones.

    Raises `MissingParts`.
    """
    busybox = find_program("busybox", "busybox-static")
    if _libraries(busybox):
        raise MissingParts("busybox needs shared libraries: apt install busybox-static")
    files = list(_load_order(kernel.modules, (*MODULES, *modules)))
    archive = Archive()
    for folder in ("proc", "sys", "dev", "run", "etc", "mnt"):
        archive.folder(folder)
    archive.file("init", INIT.encode(), 0o755)
    archive.file("agent", AGENT.encode())
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for module in files:
        archive.file(f"lib/modules/{_plain_name(module)}", _unpacked(kernel.modules / module))
    order = "".join(f"/lib/modules/{_plain_name(module)}\n" for module in files)
    archive.file("lib/modules.order", order.encode())
    _add_tools(archive, {**TOOLS, **tools})
    target.write_bytes(archive.finish())


def _add_tools(archive: Archive, tools: Mapping[str, str]) -> None:
    libraries: set[Path] = set()
    for tool, package in tools.items():
        path = find_program(tool, package)
        archive.file(f"sbin/{tool}", path.read_bytes(), 0o755)
        libraries |= _libraries(path)
    for library in sorted(libraries):
        archive.file(str(library).lstrip("/"), library.read_bytes(), 0o755)
    settings = Path("/etc/mke2fs.conf")
    if settings.exists():
        archive.file("etc/mke2fs.conf", settings.read_bytes())


def find_program(tool: str, package: str) -> Path:
    """Where the host has it. Raises `MissingParts`, which names the package."""
    found = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise MissingParts(f"{tool} is not installed: apt install {package}")
    return Path(found)


def _libraries(program: Path) -> set[Path]:
    """The shared libraries a program needs, where the loader looks; none if it is static."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listing)}


def _load_order(modules: Path, names: Iterable[str] = MODULES) -> Iterator[str]:
    """Paths below `modules`, each once and after everything it depends on."""
    needs = dict(
        line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines() if line
    )
    paths = {Path(_plain_name(path)).stem.replace("-", "_"): path for path in needs}
    loaded: set[str] = set()
    for name in names:
        path = paths.get(name.replace("-", "_"))
        if path is None:  # built into the kernel
            continue
        for step in (*reversed(needs[path].split()), path):
            if step not in loaded:
                loaded.add(step)
                yield step


def _plain_name(module: str) -> str:
    """The file name without the suffix of a compression."""
    return Path(module).name.removesuffix(".xz")


def _unpacked(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


class Archive:
    """A cpio archive in the "newc" form, the one the kernel unpacks at boot."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._known: set[str] = set()

    def folder(self, path: str) -> None:
        """Add a folder and its parents."""
        if path in self._known or path in ("", "."):
            return
        self.folder(os.path.dirname(path))
        self._known.add(path)
        self._entry(path, 0o040755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file and its parents; the first one of a name wins."""
        if path in self._known:
            return
        self.folder(os.path.dirname(path))
        self._known.add(path)
        self._entry(path, 0o100000 | mode, data)

    def finish(self) -> bytes:
        """The archive with its closing entry."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _entry(self, path: str, mode: int, data: bytes) -> None:
        name = path.encode() + b"\0"
        inode = len(self._parts) + 1
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts.append(_padded(header + name) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
