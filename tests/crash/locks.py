"""When the last process that may write to devices has gone (R22)."""

from __future__ import annotations

import time
from pathlib import Path

from backends.base import DeviceBusy
from backends.lock import lock_for_writing

SECONDS = 10


def wait_until_free(folder: Path) -> None:
    """Return when nobody holds the lock of a device file or directory in `folder`."""
    deadline = time.monotonic() + SECONDS
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in [*files, *folder.glob("*/~lock")]:
        while _is_locked(path):
            assert time.monotonic() < deadline, f"{path} is still locked"
            time.sleep(0.01)


def _is_locked(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            lock_for_writing(file.fileno(), str(path))
        except DeviceBusy:
            return True
    return False
