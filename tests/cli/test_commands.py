"""Every command, without a daemon and through one: the same results."""

from __future__ import annotations

import json
import shutil
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import Stripewell


def test_a_pool_from_creation_to_import(stripewell: Stripewell) -> None:
    stripewell.create()
    [pool] = stripewell.json("pool", "list")
    assert (pool["name"], pool["served"]) == ("tank", False)
    status = stripewell.json("pool", "status", "tank")
    assert (status["state"], status["data"], status["parity"]) == ("healthy", 2, 1)
    assert status["uuid"] == pool["uuid"]
    stripewell.ok("volume", "create", "tank/vm1", "--size", "20G")

    shutil.rmtree(stripewell.state)
    assert stripewell.json("pool", "list") == []
    imported = stripewell.json("pool", "import", *pool["devices"])
    assert (imported["name"], imported["uuid"], imported["missing"]) == ("tank", pool["uuid"], [])
    [volume] = stripewell.json("volume", "list", "tank")
    assert (volume["pool"], volume["name"], volume["size"]) == ("tank", "vm1", 20 << 30)


@pytest.mark.parametrize("served", [False, True], ids=["direct", "served"])
def test_volumes(stripewell: Stripewell, served: bool) -> None:
    stripewell.create()
    if served:
        stripewell.serve()
    made = stripewell.json("volume", "create", "tank/vm1", "--size", "1G")
    assert (made["name"], made["size"]) == ("vm1", 1 << 30)
    stripewell.ok("volume", "create", "tank/vm2", "--size", "512M")
    listed = stripewell.json("volume", "list")
    assert [(volume["name"], volume["size"]) for volume in listed] == [
        ("vm1", 1 << 30),
        ("vm2", 512 << 20),
    ]
    assert "exists" in stripewell.refused(
        "volume", "create", "tank/vm1", "--size", "1G"
    ) or "already" in stripewell.refused("volume", "create", "tank/vm1", "--size", "1G")
    stripewell.ok("volume", "delete", "tank/vm1")
    assert [volume["name"] for volume in stripewell.json("volume", "list", "tank")] == ["vm2"]
    assert "vm1" in stripewell.refused("volume", "delete", "tank/vm1")


@pytest.mark.parametrize("served", [False, True], ids=["direct", "served"])
def test_status_and_check(stripewell: Stripewell, served: bool) -> None:
    stripewell.create()
    if served:
        stripewell.serve()
        assert stripewell.json("pool", "list")[0]["served"] is True
    status = stripewell.json("pool", "status", "tank")
    assert [device["state"] for device in status["devices"]] == ["active"] * 3
    assert "healthy" in stripewell.ok("pool", "status", "tank")
    found = stripewell.json("pool", "check", "tank")
    assert (found["name"], found["faults"], found["findings"]) == ("tank", [], [])
    assert (found["checked"]["members"], found["checked"]["superblocks"]) == (3, 12)
    assert "tank: no faults; looked at 3 members" in stripewell.ok("pool", "check", "tank")


def test_looking_changes_nothing(stripewell: Stripewell) -> None:
    stripewell.create()
    before = [path.read_bytes() for path in sorted(stripewell.directory.iterdir())]
    stripewell.ok("pool", "status", "tank")
    stripewell.ok("pool", "check", "tank")
    stripewell.ok("volume", "list")
    stripewell.ok("pool", "import", *(str(path) for path in stripewell.directory.iterdir()))
    assert [path.read_bytes() for path in sorted(stripewell.directory.iterdir())] == before


def test_attach_without_a_daemon_says_so(stripewell: Stripewell) -> None:
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "1G")
    done = stripewell("attach", "tank/vm1", "--json")
    assert "stripewell serve tank" in done.stderr
    socket = f"{stripewell.state}/run/tank.nbd.sock"
    assert json.loads(done.stdout)["uris"] == [f"nbd+unix:///vm1?socket={socket}"]


def test_attach_names_where_the_daemon_listens(stripewell: Stripewell) -> None:
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "1G")
    socket = stripewell.directory / "nbd.sock"
    daemon = stripewell.serve("tank", "--unix", "nbd.sock", "--tcp", "127.0.0.1:0")
    assert "(1 volume)" in daemon.ready
    lines = stripewell.json("attach", "tank/vm1")
    assert json.loads(lines["qemu"][1])["server"] == {"type": "unix", "path": str(socket)}
    assert ElementTree.fromstring(lines["libvirt"]).find("source/host").get("socket") == str(socket)
    unix, tcp = lines["uris"]
    assert unix == f"nbd+unix:///vm1?socket={socket}"
    assert tcp.startswith("nbd://127.0.0.1:")
    assert not tcp.startswith("nbd://127.0.0.1:0/")
    assert unix in stripewell.ok("attach", "tank/vm1")


def test_import_with_a_device_missing(stripewell: Stripewell) -> None:
    stripewell.create()
    (stripewell.directory / "d1").unlink()
    left = [str(path) for path in sorted(stripewell.directory.iterdir())]
    shutil.rmtree(stripewell.state)
    imported = stripewell.json("pool", "import", *left)
    assert imported["state"] == "degraded"
    [missing] = imported["missing"]
    assert "/d1" in missing


def test_a_device_that_went_away_is_warned_of(stripewell: Stripewell) -> None:
    stripewell.create()
    (stripewell.directory / "d1").unlink()
    done = stripewell("pool", "status", "tank")
    assert done.returncode == 0
    assert "warning" in done.stderr
    assert "/d1" in done.stderr
    assert "missing" in done.stdout


def test_relative_device_paths_work_from_anywhere(stripewell: Stripewell) -> None:
    stripewell.create()
    shutil.rmtree(stripewell.state)
    stripewell.ok("pool", "import", "d0", "file:d1", "./d2")
    stripewell.directory = stripewell.directory.parent
    assert stripewell.json("pool", "status", "tank")["state"] == "healthy"
