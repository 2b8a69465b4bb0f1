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
from pool.format.fields import Fields

NAME_MAX = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SIZE = 1 << 55
VOLUMES_MAX = 10_000
#: Layers have 32 bits in the map's pages and in journal records.
LAYER_MAX = (1 << 32) - 1
ID_MAX = 1 << 62


LAYER_KEYS = ("id", "parent", "merged_into", "dropped")
VOLUME_KEYS = ("id", "name", "layer", "size", "created", "labels")


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
        #: Volumes by their top layer.
        self._tops: dict[int, VolumeEntry] = {}
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

    def apply(self, change: object) -> None:
        """Make one change. Raises FormatError for one that does not fit (a bug or a damaged
        journal)."""
        fields = Fields(change, "catalog change")
        match fields.text("do", NAME_MAX):
            case "create":
                self._create(fields)
            case "delete":
                volume = self._named(fields)
                del self.volumes[volume.name], self._tops[volume.layer]
                self.layers[volume.layer].dropped = True
            case "forget-layer":
                self.layers.pop(fields.number("layer", 1, LAYER_MAX), None)
            case "resize":
                self._named(fields).size = _size(fields)
            case other:
                raise FormatError(f"catalog change {other!r} is unknown")

    def _named(self, fields: Fields) -> VolumeEntry:
        """The volume that a change is about."""
        name = fields.text("name", NAME_MAX)
        if name not in self.volumes:
            raise FormatError(f"{fields.where} is about a volume that there is not, {name!r}")
        return self.volumes[name]

    def _create(self, fields: Fields) -> None:
        volume = _volume(fields, "volume")
        if volume.name in self.volumes or len(self.volumes) >= VOLUMES_MAX:
            raise FormatError(f"{fields.where} makes volume {volume.name!r} again, or too many")
        # Ids are never used again.
        if volume.id < self.next_volume or volume.layer < self.next_layer:
            raise FormatError(f"{fields.where} uses an id that was used before")
        self.volumes[volume.name] = self._tops[volume.layer] = volume
        self.layers[volume.layer] = Layer(volume.layer)
        self.next_volume = volume.id + 1
        self.next_layer = volume.layer + 1

    def top_of(self, layer: int) -> VolumeEntry | None:
        """The volume whose top layer this is."""
        return self._tops.get(layer)

    def blocks(self, layer: int) -> int | None:
        """How many blocks the volume of a layer has; None if there is no such volume."""
        volume = self._tops.get(layer)
        return None if volume is None else volume.size // 4096

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
        catalog, fields = cls(), Fields(data, "catalog")
        catalog.next_volume = fields.number("next_volume", 1, ID_MAX)
        catalog.next_layer = fields.number("next_layer", 1, LAYER_MAX + 1)
        for row in fields.objects("layers"):
            layer = _layer(row, catalog.next_layer)
            if layer.id in catalog.layers:
                raise FormatError(f"{row.where} is there twice")
            catalog.layers[layer.id] = layer
        ids: set[int] = set()
        live = {layer.id for layer in catalog.layers.values() if not layer.dropped}
        for row in fields.objects("volumes"):
            volume = _volume(row, "id")
            row.only(VOLUME_KEYS)
            volume.labels = row.texts("labels")
            if volume.layer not in live or volume.id in ids or volume.id >= catalog.next_volume:
                raise FormatError(f"{row.where}: its id or its layer is not its own")
            if volume.name in catalog.volumes or len(ids) >= VOLUMES_MAX:
                raise FormatError(f"{row.where} is there twice, or one too many")
            live.remove(volume.layer)
            ids.add(volume.id)
            catalog.volumes[volume.name] = catalog._tops[volume.layer] = volume
        if live:
            raise FormatError(f"catalog: layer {min(live)} belongs to no volume")
        return catalog


def _layer(row: Fields, next_layer: int) -> Layer:
    """A layer of the catalog. Parents are for later: a reader that ignored one would show zeros."""
    row.only(LAYER_KEYS)
    return Layer(
        row.number("id", 1, next_layer - 1), row.number("parent", 0, 0),
        row.number("merged_into", 0, 0), row.flag("dropped"),
    )  # fmt: skip


def _volume(row: Fields, key: str) -> VolumeEntry:
    """A volume of the catalog, or of the change that makes it."""
    name = row.text("name", NAME_MAX)
    if not NAME.fullmatch(name):
        raise FormatError(f"{row.where}: {name!r} is no volume name")
    created = row.real("created")
    layer = row.number("layer", 1, LAYER_MAX)
    return VolumeEntry(row.number(key, 1, ID_MAX), name, layer, _size(row), created)


def _size(row: Fields) -> int:
    size = row.number("size", 4096, MAX_SIZE)
    if size % 4096:
        raise FormatError(f"{row.where}.size is {size}, not a multiple of 4096")
    return size
