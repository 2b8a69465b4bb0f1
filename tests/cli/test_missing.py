"""A device that is not where the daemon looks for it: status says what was found, and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Stripewell

Spoil = Callable[[Path], object]


def cut(device: Path) -> None:
    os.truncate(device, 1 << 20)


def blank(device: Path) -> None:
    size = device.stat().st_size
    os.truncate(device, 0)
    os.truncate(device, size)


def tiny(device: Path) -> None:
    device.write_text("not a disk")


@pytest.mark.parametrize(
    ("spoil", "imported", "said"),
    [
        (Path.unlink, False, "d1?size=64M does not exist: correct the path or attach the disk"),
        (Path.unlink, True, "moved does not exist: correct the path or attach the disk"),
        (cut, False, "the file has 1048576 bytes, not 67108864: correct size="),
        (cut, True, "moved has shrunk from 67108864 to 1048576 bytes, restore its size"),
        (tiny, True, "moved: 10 bytes are too few: a device needs at least"),
        (blank, False, "holds nothing of a pool: put the right device there"),
        (blank, True, "moved holds nothing of a pool: put the right device there"),
    ],
)
def test_status_says_what_was_found(
    stripewell: Stripewell, spoil: Spoil, imported: bool, said: str
) -> None:
    """Of a device in its place, and of one that was last imported from another place."""
    stripewell.create()
    device = stripewell.directory / "d1"
    if imported:
        device = device.rename(stripewell.directory / "moved")
        urls = [f"{stripewell.directory}/{name}" for name in ("d0", "moved", "d2")]
        stripewell.ok("pool", "import", *urls)
    spoil(device)
    alone = problem(stripewell)
    assert f"last seen at file://{stripewell.directory}/d1" in alone
    assert said in alone
    daemon = stripewell.serve()
    assert problem(stripewell) == alone
    _, _, err = daemon.terminate()
    [line] = [line for line in err.splitlines() if "device 1" in line]
    assert said in line
    assert problem(stripewell) == alone


def problem(stripewell: Stripewell) -> str:
    """The one line that status has on device 1."""
    text = stripewell.ok("pool", "status", "tank")
    [line] = [line for line in text.splitlines() if "device 1 " in line]
    assert line.startswith("problem: device 1 (")
    return line


def test_a_device_of_another_pool_in_its_place_is_named(stripewell: Stripewell) -> None:
    stripewell.create()
    stripewell.create("pond", prefix="p")
    (stripewell.directory / "p1").replace(stripewell.directory / "d1")
    line = stripewell.refused("pool", "status", "tank")
    assert "pond on file" in line
    assert "/d1" in line.partition("pond on")[2]
