"""Local state: which devices a pool was last opened from, and where its daemon listens.

It holds nothing that the devices don't: `pool import` makes it again. A record is replaced
atomically, so a crash leaves the old one or the new one. Called by the CLI and the daemon.

    STATE/pools/NAME.json      {"name", "uuid", "devices": [URL, ...]}
    STATE/run/NAME.nbd.sock    NBD clients connect here
    STATE/run/NAME.ctl.sock    commands reach the daemon here
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stripewell.errors import UserError
from stripewell.names import check_name


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """Where a pool was last seen."""

    name: str
    uuid: str
    devices: list[str]


def default_directory(environment: Mapping[str, str], uid: int) -> Path:
    """STRIPEWELL_STATE, or the system's place for root and the XDG state directory for others."""
    if given := environment.get("STRIPEWELL_STATE"):
        return Path(given)
    if uid == 0:
        return Path("/var/lib/stripewell")
    home = environment.get("XDG_STATE_HOME") or Path(environment.get("HOME", "/")) / ".local/state"
    return Path(home) / "stripewell"


class State:
    """The state directory. Made when something is first written to it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def nbd_socket(self, pool: str) -> Path:
        return self.root / "run" / f"{pool}.nbd.sock"

    def control_socket(self, pool: str) -> Path:
        return self.root / "run" / f"{pool}.ctl.sock"

    def make_directories(self) -> None:
        """What can fail for want of permission, before anything else is changed."""
        for name in ("pools", "run"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def records(self, warn: Callable[[str], None] = lambda line: None) -> list[PoolRecord]:
        """Every pool known here, by name; `warn` is told which records are damaged."""
        found = []
        for path in sorted((self.root / "pools").glob("*.json")):
            try:
                found.append(_load(path))
            except UserError as error:
                warn(str(error))
        return found

    def find(self, name: str) -> PoolRecord | None:
        """The record of a pool, or None. Raises `UserError` for a bad name or a damaged record."""
        path = self._path(name)
        return _load(path) if path.exists() else None

    def record(self, name: str) -> PoolRecord:
        """The record of a pool. Raises `UserError` when it is unknown here."""
        if found := self.find(name):
            return found
        known = ", ".join(record.name for record in self.records()) or "none"
        raise UserError(
            f"no pool {name!r} is known in {self.root} (known: {known});"
            " `stripewell pool import URL...` makes one known"
        )

    def save(self, record: PoolRecord) -> None:
        """Write a record, durable and atomic."""
        path = self._path(record.name)
        self.make_directories()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w") as file:
            json.dump(asdict(record), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)

    def _path(self, name: str) -> Path:
        return self.root / "pools" / f"{check_name('pool', name)}.json"


def _load(path: Path) -> PoolRecord:
    try:
        fields = json.loads(path.read_bytes())
        record = PoolRecord(fields["name"], fields["uuid"], list(fields["devices"]))
        sound = record.name == path.stem and all(
            isinstance(text, str) for text in (record.name, record.uuid, *record.devices)
        )
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: remove it and run `stripewell pool import URL...`")
    return record


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
