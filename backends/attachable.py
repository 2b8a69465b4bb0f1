"""Stores that a worker process can open too, by the descriptors that it inherits.

Every `Device` can be attached; of the stores only those whose data lie behind descriptors. The
decorators of stores ask through `worker_spec_of`, since what they wrap may be either.
"""

from __future__ import annotations

import errno
from typing import Protocol, runtime_checkable

from .base import DeviceError, ObjectStore

WorkerSpec = tuple[dict[str, str | int], list[int]]


@runtime_checkable
class AttachableStore(ObjectStore, Protocol):
    """An `ObjectStore` that `backends.open.attach` can rebuild in another process."""

    def worker_spec(self) -> WorkerSpec:
        """As `Device.worker_spec`."""


def worker_spec_of(store: ObjectStore) -> WorkerSpec:
    """Return what `attach` needs. Raises `DeviceError` when no other process can reach it."""
    if isinstance(store, AttachableStore):
        return store.worker_spec()
    text = f"{store.url} lives in this process only: move its data here, without a worker"
    raise DeviceError(errno.EOPNOTSUPP, text)
