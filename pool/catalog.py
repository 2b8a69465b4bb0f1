"""Volumes and layers: what the pool hands out, by name. Pure.

A volume is a name, a size and a top layer; a layer owns map entries. Changes are journal records
(kind catalog, a JSON object) and are applied here in journal order, at run time and in replay
alike; checkpoints keep the whole catalog on the top page. Ids are never reused.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from pool.errors import FormatError, PoolError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SIZE = 1 << 55
VOLUMES_MAX = 10_000


@dataclass(slots=True)
class Layer:
    """`parent` 0 is none. A dropped layer waits for its map to be taken apart."""

    id: int
    parent: int = 0
    merged_into: int = 0
    dropped: bool = False


@dataclass(slots=True)
class VolumeEntry:
    """`size` in bytes, `created` in seconds since the epoch."""

    id: int
    name: str
    layer: int
    size: int
    created: float
    labels: dict[str, str] = field(default_factory=dict)


class Catalog:
    """All volumes and layers of a pool."""

    def __init__(self) -> None:
        self.volumes: dict[str, VolumeEntry] = {}
        self.layers: dict[int, Layer] = {}
        self.next_volume = 1
        self.next_layer = 1

    def check_new(self, name: str, size: int) -> None:
        """Raise PoolError unless a volume of that name and size can be created."""
        if not NAME.fullmatch(name):
            raise PoolError(
                f"{name!r} is no volume name: use letters, digits, '.', '_' and '-', at most 64, "
                "beginning with a letter or digit"
            )
        if name in self.volumes:
            raise PoolError(f"volume {name!r} exists already: choose another name")
        if not 0 < size <= MAX_SIZE or size % 4096:
            raise PoolError(f"{size} is no volume size: use a multiple of 4 KiB up to 32 PiB")
        if len(self.volumes) >= VOLUMES_MAX:
            raise PoolError(f"the pool has {VOLUMES_MAX} volumes already: delete some")

    def apply(self, change: dict[str, Any]) -> None:
        """Make one change. Raises FormatError for one that does not fit (a bug or a damaged
        journal)."""
        try:
            match change["do"]:
                case "create":
                    self._create(change)
                case "delete":
                    volume = self.volumes.pop(change["name"])
                    self.layers[volume.layer].dropped = True
                case "forget-layer":
                    self.layers.pop(change["layer"], None)
                case "resize":
                    self.volumes[change["name"]].size = change["size"]
                case other:
                    raise FormatError(f"catalog change {other!r} is unknown")
        except (KeyError, TypeError) as error:
            raise FormatError(f"catalog change does not fit: {error!r}") from error

    def _create(self, change: dict[str, Any]) -> None:
        volume = VolumeEntry(
            change["volume"], change["name"], change["layer"], change["size"], change["created"]
        )
        self.volumes[volume.name] = volume
        self.layers[volume.layer] = Layer(volume.layer)
        self.next_volume = max(self.next_volume, volume.id + 1)
        self.next_layer = max(self.next_layer, volume.layer + 1)

    def to_json(self) -> dict[str, Any]:
        """The catalog as the top page keeps it."""
        return {
            "volumes": [asdict(volume) for volume in self.volumes.values()],
            "layers": [asdict(layer) for layer in self.layers.values()],
            "next_volume": self.next_volume,
            "next_layer": self.next_layer,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Catalog:
        """Inverse of `to_json`. Raises FormatError."""
        catalog = cls()
        try:
            for row in data["volumes"]:
                catalog.volumes[row["name"]] = VolumeEntry(**row)
            for row in data["layers"]:
                catalog.layers[row["id"]] = Layer(**row)
            catalog.next_volume = data["next_volume"]
            catalog.next_layer = data["next_layer"]
        except (KeyError, TypeError) as error:
            raise FormatError(f"catalog is damaged: {error!r}") from error
        return catalog
