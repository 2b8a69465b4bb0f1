"""What a pool asks of the things it is made of.

Two kinds of backend exist. A `Device` is byte-addressed and can be overwritten: a file, a raw disk,
an NBD export. It can hold superblocks, a journal and slots. An `ObjectStore` keeps named, immutable
objects: a directory on a NAS, a bucket. Decorators (`backends.faults`, `backends.observe`) have the
same interface as what they wrap.

Contract, held by `tests/contract` for every adapter and every decorator:

* Offsets, lengths and buffer sizes handed to a `Device` are multiples of `BLOCK_SIZE`.
* A read returns exactly what was asked for or raises `DeviceError`; a short read is an error.
* What a write left behind before the next successful `sync` may be lost, kept or torn by a crash.
  A `sync` that raised may have dropped any write since the last one that succeeded: the caller must
  not retry it and believe.
* Every error is a `DeviceError`. `DeviceGone` says that the device itself has vanished (unlinked,
  unplugged, closed by the other side) and will not answer again; `DeviceFull` that the storage
  underneath has no room left, although the device's own size says otherwise.
* Methods that start with `try_` and `append` are synchronous and called in the event loop:
  `try_read` never waits for the medium, `append` may wait only for the kernel to take the bytes.
* No method keeps a reference to a buffer after it has returned or raised.

Called by `pool` (engine and mover) and by `stripewell` (to open what a URL names).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

BLOCK_SIZE = 4096

#: What another process needs to rebuild a backend: a description and file descriptors.
WorkerSpec = tuple[dict[str, str | int], list[int]]

#: Anything that exposes bytes without a copy.
Buffer = bytes | bytearray | memoryview


class DeviceError(OSError):
    """An operation of a backend failed; `errno` is set, `str()` names the device and the remedy."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)

    def __str__(self) -> str:
        return self.strerror or ""


class DeviceGone(DeviceError):
    """The backend has vanished and will not answer again."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENODEV, message)


class DeviceFull(DeviceError):
    """The storage under the backend has no room left."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class DeviceBusy(DeviceError):
    """Another process holds the backend: one pool has one writer (R22)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EBUSY, message)


@runtime_checkable
class Device(Protocol):
    """A byte-addressed, overwritable backend of fixed size."""

    @property
    def url(self) -> str:
        """Where it was opened, as the operator would write it."""

    @property
    def size(self) -> int:
        """Usable bytes, a multiple of `BLOCK_SIZE`."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises `DeviceError`."""

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        """Write `buffers` one after the other from `offset`; with `sync`, return when they are
        durable."""

    async def sync(self) -> None:
        """Make every completed write durable. Raises `DeviceError`, also when the device has
        gone."""

    def try_read(self, offset: int, into: memoryview) -> bool:
        """Fill `into` if that needs no waiting for the medium; False if it does. Raises
        `DeviceError`."""

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Hand `buffers` to the operating system, synchronously. Raises `DeviceError`."""

    def worker_spec(self) -> WorkerSpec:
        """A description and the file descriptors from which `backends.open.attach` rebuilds this
        device in another process. The descriptors are the locked ones, so the lock lives as long as
        either."""

    async def close(self) -> None:
        """Release the device and its lock. Idempotent."""


@runtime_checkable
class ObjectStore(Protocol):
    """A backend of named, immutable objects. Names match `[a-z0-9._-]{1,128}`."""

    @property
    def url(self) -> str:
        """Where it was opened, as the operator would write it."""

    @property
    def size(self) -> int:
        """Bytes that may be stored in all."""

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        """Store an object, durable on return: readers see all of it or nothing. Replaces
        atomically."""

    async def get(self, name: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises `DeviceError` (ENOENT when there is no such
        object)."""

    async def delete(self, name: str) -> None:
        """Remove an object; removing what is not there succeeds."""

    async def list(self, prefix: str = "") -> list[str]:
        """Sorted names that start with `prefix`, without temporary ones."""

    def worker_spec(self) -> WorkerSpec:
        """As `Device.worker_spec`. Raises `DeviceError` if it exists in this process only."""

    async def close(self) -> None:
        """Release the store and its lock. Idempotent."""
