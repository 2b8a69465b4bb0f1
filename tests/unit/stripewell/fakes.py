"""A pool in memory with the public API that `stripewell` uses, and a caller that obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pool import PoolError
from pool.check import Report


@dataclass
class FakeVolumeInfo:
    name: str
    size: int
    used_bytes: int = 0
    created: float = 1_700_000_000.0
    state: str = "online"


@dataclass
class FakePool:
    name: str = "tank"
    uuid: str = "0123"
    made: dict[str, FakeVolumeInfo] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    failure: BaseException | None = None
    changes: dict[str, object] = field(default_factory=dict)

    def volumes(self) -> list[FakeVolumeInfo]:
        return list(self.made.values())

    async def create_volume(self, name: str, size: int) -> None:
        if self.failure:
            raise self.failure
        if name in self.made:
            raise PoolError(f"there is a volume {name} already")
        self.made[name] = FakeVolumeInfo(name, size)

    async def delete_volume(self, name: str) -> None:
        if name not in self.made:
            raise PoolError(f"there is no volume {name}")
        del self.made[name]

    async def check_report(self, progress: Callable[[int, int], None]) -> Report:
        progress(1, 2)
        progress(2, 2)
        report = Report()
        for text in self.faults:
            report.wrong("live", text)
        return report

    def status(self) -> dict[str, Any]:
        return {key: value for key, value in status(**self.changes).items() if key != "served"}


def status(**changes: object) -> dict[str, Any]:
    """What `pool.status` returns for a small pool with one device missing."""
    device = {
        "index": 0,
        "uuid": "a",
        "url": "file:///a",
        "state": "active",
        "size_bytes": 1 << 30,
        "used_bytes": 1 << 20,
        "free_bytes": 1 << 29,
        "journal": True,
        "labels": {},
        "errors": 0,
        "repaired": 2,
        "written_bytes": 8192,
        "reason": "",
    }
    missing = {"index": 1, "state": "missing", "url": "file:///b", "journal": False, "errors": 3}
    return {
        "name": "tank",
        "uuid": "0123",
        "state": "degraded",
        "data": 1,
        "parity": 1,
        "generation": 7,
        "term": 2,
        "capacity_bytes": 1 << 30,
        "used_bytes": 1 << 20,
        "free_bytes": (1 << 30) - (1 << 20),
        "journal": {
            "size_bytes": 1 << 24,
            "used_bytes": 1 << 12,
            "replicas": [0],
            "target_replicas": 2,
        },
        "devices": [device, device | missing | {"reason": "unlinked"}],
        "stripes": {"total": 4, "degraded": 2, "narrow": 1, "lost": 0},
        "volumes": 1,
        "problems": ["device 1 is missing"],
        "served": True,
        "counters": {"journal_bytes": 4096, "stripes_written": 4, "member_0_bytes": 8192},
        **changes,
    }
