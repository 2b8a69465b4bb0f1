"""Volumes and layers ("Top page", "Journal" in `docs/format.md`). Pure; called by `checkpoint` and
`journal`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stripewell.recover.problems import Problems
from stripewell.recover.root import BLOCK
from stripewell.recover.values import U32, U64, Unusable, integer, mapping, plain, sequence, text

#: Names are at most 64 bytes; this is for what a terminal has to bear.
_NAME_MAX = 255


@dataclass(slots=True)
class Volume:
    """A name, a size and the layer with its map."""

    name: str
    layer: int
    size: int


@dataclass(slots=True)
class Catalog:
    """What the checkpoint says, and after it the journal. `layers` maps a layer to its parent."""

    problems: Problems
    volumes: dict[str, Volume] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)

    def load(self, value: object) -> None:
        """Take the checkpoint's catalog; what makes no sense is left out and named. Raises Unusable
        if nothing does."""
        found = mapping(value, "the catalog")
        for row in sequence(found.get("layers"), "layers"):
            self._guarded(self._load_layer, row)
        for row in sequence(found.get("volumes"), "volumes"):
            self._guarded(self._load_volume, row)

    def _guarded(self, load: Any, row: object) -> None:
        try:
            load(mapping(row, "an entry of the catalog"))
        except Unusable as error:
            self.problems.add(f"the catalog has an entry that cannot be used: {error}")

    def _load_layer(self, row: dict[str, Any]) -> None:
        number = integer(row.get("id"), "a layer's id", U32)
        parent = integer(row.get("parent"), f"parent of layer {number}", U32)
        heir = integer(row.get("merged_into"), f"merged_into of layer {number}", U32)
        self.layers[number] = parent or heir

    def _load_volume(self, row: dict[str, Any]) -> None:
        self._add(
            text(row.get("name"), "a volume's name"),
            integer(row.get("layer"), "a volume's layer", U32),
            integer(row.get("size"), "a volume's size", U64),
        )

    def _add(self, name: str, layer: int, size: int) -> None:
        if len(name) > _NAME_MAX or name in self.volumes:
            raise Unusable(f"volume {plain(name)} is there twice, or its name is too long")
        self.volumes[name] = Volume(name, layer, size)

    # -- changes ---------------------------------------------------------------------------------

    def apply(self, change: dict[str, Any]) -> None:
        """Make a change that `check_change` accepted. One that does not fit is named, and left out:
        the engine would not have written it."""
        name = change.get("name", "")
        match change["do"]:
            case "create":
                self.layers[change["layer"]] = 0
                try:
                    self._add(name, change["layer"], change["size"])
                except Unusable as error:
                    self.problems.add(f"the journal has a change that does not fit: {error}")
            case "delete" if name in self.volumes:
                del self.volumes[name]
            case "resize" if name in self.volumes:
                self.volumes[name].size = change["size"]
            case "forget-layer":
                self.layers.pop(change["layer"], None)
            case _:
                self.problems.add(f"the journal changes volume {plain(name)}, which is not there")


def check_change(change: dict[str, Any]) -> None:
    """Raises Unusable for a change that this version does not know, or that lacks something."""
    what = text(change.get("do"), "a catalog change's kind")
    if what not in ("create", "delete", "resize", "forget-layer"):
        raise Unusable(f"a catalog change of the unknown kind {plain(what)}")
    if what in ("create", "delete", "resize"):
        text(change.get("name"), "a catalog change's name")
    if what in ("create", "forget-layer"):
        integer(change.get("layer"), "a catalog change's layer", U32)
    if what in ("create", "resize"):
        integer(change.get("size"), "a catalog change's size", U64)


#: The largest volume, 32 PiB, in blocks.
MAX_BLOCKS = (1 << 55) // BLOCK


def objection(catalog: Catalog, volume: Volume) -> str:
    """Why a volume cannot be read at all; "" if it can."""
    if volume.layer not in catalog.layers:
        return "its layer does not exist"
    if catalog.layers[volume.layer]:
        return "it has a parent layer, made by something newer: use the stripewell that made it"
    if not 0 < volume.size <= MAX_BLOCKS * BLOCK or volume.size % BLOCK:
        return f"{volume.size} bytes is no volume's size"
    return ""
