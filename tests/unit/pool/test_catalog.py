"""Volumes and layers by name: changes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pool.catalog import MAX_SIZE, VOLUMES_MAX, Catalog
from pool.errors import FormatError, PoolError


def creation(number: int, name: str) -> dict[str, Any]:
    return {
        "do": "create", "name": name, "size": 8192, "volume": number, "layer": number + 10,
        "created": 1.5,
    }  # fmt: skip


def make_catalog(*names: str) -> Catalog:
    catalog = Catalog()
    for number, name in enumerate(names, start=1):
        catalog.apply(creation(number, name))
    return catalog


def test_ids_are_never_reused() -> None:
    catalog = make_catalog("a", "b")
    assert (catalog.next_volume, catalog.next_layer) == (3, 13)
    catalog.apply({"do": "delete", "name": "b"})
    catalog.apply({"do": "forget-layer", "layer": 12})
    assert (catalog.next_volume, catalog.next_layer) == (3, 13)
    assert list(catalog.layers) == [11]


def test_a_deleted_volume_leaves_its_layer_until_that_is_taken_apart() -> None:
    catalog = make_catalog("a")
    catalog.apply({"do": "delete", "name": "a"})
    assert catalog.volumes == {}
    assert catalog.layers[11].dropped
    catalog.check_new("a", 4096)


def test_a_volume_grows() -> None:
    catalog = make_catalog("a")
    catalog.apply({"do": "resize", "name": "a", "size": 1 << 30})
    assert catalog.volumes["a"].size == 1 << 30


def test_json_round_trip() -> None:
    catalog = make_catalog("a", "b", "c")
    catalog.volumes["b"].labels["for"] = "test"
    catalog.apply({"do": "delete", "name": "a"})
    data = json.loads(json.dumps(catalog.to_json()))
    again = Catalog.from_json(data)
    assert again.to_json() == catalog.to_json()
    assert again.volumes == catalog.volumes
    assert again.layers == catalog.layers


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"do": "explode"},
        {"do": "delete", "name": "nobody"},
        {"do": "resize", "name": "nobody", "size": 1},
        {"do": "create", "name": "x"},
        {"do": "create", "name": "x", "size": 1, "volume": None, "layer": 1, "created": 0},
        [],
        None,
    ],
)
def test_a_change_that_does_not_fit_is_refused(change: Any) -> None:
    with pytest.raises(FormatError, match="catalog change"):
        make_catalog("a").apply(change)


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"volumes": 3}, {"volumes": [1]}, {"volumes": [{"name": "a"}]},
     {"volumes": [], "layers": [{"id": 1, "color": "red"}]}, {"volumes": [], "layers": []},
     *(sound | change for sound in [make_catalog("a", "b").to_json()] for change in (
         {"next_volume": 2}, {"next_layer": 1}, {"next_layer": True}, {"layers": []},
         {"volumes": sound["volumes"] * 2}, {"layers": sound["layers"] * 2}, {"volumes": []},
         *({"volumes": [sound["volumes"][0] | wrong, sound["volumes"][1]]} for wrong in (
             {"size": 4097}, {"size": 0}, {"size": 1 << 60}, {"name": "b"}, {"name": "../x"},
             {"name": 7}, {"layer": 2}, {"layer": 9}, {"id": 2}, {"created": float("nan")},
             {"created": "now"}, {"labels": []}, {"labels": {"a": 1}}, {"color": "red"},
         )),
         *({"layers": [sound["layers"][0] | wrong, sound["layers"][1]]} for wrong in (
             {"parent": 1}, {"merged_into": 2}, {"dropped": 1}, {"dropped": True}, {"id": 0},
         )),
     ))],
)  # fmt: skip
def test_a_damaged_catalog_is_refused(data: Any) -> None:
    with pytest.raises(FormatError, match="^catalog"):
        Catalog.from_json(data)


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a b", "a/b", "ä", "x" * 65, "a\n", "a@snap"]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(PoolError, match="is no volume name: use letters"):
        Catalog().check_new(name, 4096)


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, MAX_SIZE + 4096])
def test_bad_sizes_are_refused(size: int) -> None:
    with pytest.raises(PoolError, match="is no volume size: use a multiple of 4 KiB"):
        Catalog().check_new("a", size)


def test_good_ones_are_taken() -> None:
    for name in ("a", "0", "vm1.disk_2-b", "x" * 64):
        make_catalog("other").check_new(name, MAX_SIZE)


def test_duplicates_and_too_many_are_refused() -> None:
    catalog = make_catalog("a")
    with pytest.raises(PoolError, match="'a' exists already: choose another name"):
        catalog.check_new("a", 4096)
    catalog.volumes = dict.fromkeys(map(str, range(VOLUMES_MAX)), catalog.volumes["a"])
    with pytest.raises(PoolError, match="has 10000 volumes already: delete some"):
        catalog.check_new("a", 4096)
