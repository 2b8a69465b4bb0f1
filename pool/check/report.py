"""What a check found: faults by kind and weight, remarks, and how much was looked at. Pure.

A fault is one line for people and the same in fields for programs. A remark is no fault: something
that a crash may leave behind and the pool mends by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from pool.words import line

#: More faults than this are counted, not kept.
FAULTS_MAX = 1000


class Severity(StrEnum):
    """What a fault means for the data; the worst first."""

    #: It cannot be read any more: EIO.
    LOST = "lost"
    #: Structures contradict each other: a bug, or a device that was tampered with.
    WRONG = "wrong"
    #: A copy or a shard is bad; everything is still readable.
    DEGRADED = "degraded"
    #: It could not be looked at.
    UNCHECKED = "unchecked"


_ORDER = {severity: number for number, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong. Fields that say nothing about it are None."""

    kind: str
    severity: Severity
    text: str
    member: int | None = None
    stripe: int | None = None
    shard: int | None = None
    position: int | None = None
    layer: int | None = None
    block: int | None = None


@dataclass(slots=True)
class Checked:
    """How much was looked at."""

    members: int = 0
    superblocks: int = 0
    stripes: int = 0
    shards: int = 0
    blocks: int = 0
    pages: int = 0
    entries: int = 0
    records: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    """The result of a check; see the module."""

    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    #: Faults that were found beyond those that are kept.
    more: int = 0

    def add(self, fault: Fault) -> None:
        """Note a fault, once."""
        fault = replace(fault, text=line(fault.text))
        if len(self.faults) >= FAULTS_MAX:
            self.more += 1
        elif fault not in self.faults[-8:]:
            self.faults.append(fault)

    def lost(self, kind: str, text: str, **where: int | None) -> None:
        """Note data that cannot be read; `where` are fields of `Fault`."""
        self.add(Fault(kind, Severity.LOST, text, **where))

    def wrong(self, kind: str, text: str, **where: int | None) -> None:
        """Note structures that contradict each other."""
        self.add(Fault(kind, Severity.WRONG, text, **where))

    def degraded(self, kind: str, text: str, **where: int | None) -> None:
        """Note a bad copy of what is still readable."""
        self.add(Fault(kind, Severity.DEGRADED, text, **where))

    def remark(self, text: str) -> None:
        """Note something that is no fault."""
        if len(self.remarks) < FAULTS_MAX:
            self.remarks.append(line(text))

    @property
    def full(self) -> bool:
        """Whether looking for more faults is pointless."""
        return len(self.faults) >= FAULTS_MAX

    def finish(self, seconds: float) -> None:
        """Put the faults in order, the worst first."""
        self.faults.sort(key=lambda fault: _ORDER[fault.severity])
        self.checked.seconds = round(seconds, 3)

    def lines(self) -> list[str]:
        """The faults for people."""
        lines = [fault.text for fault in self.faults]
        return [*lines, f"{self.more} more faults were found"] if self.more else lines

    def to_json(self) -> dict[str, Any]:
        """What `pool check --json` prints, but for the name."""
        return {
            "faults": self.lines(),
            "findings": [asdict(fault) for fault in self.faults],
            "remarks": self.remarks,
            "checked": asdict(self.checked),
        }
