"""Device URLs: one device is found under every name, and names outlive the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from stripewell.errors import UserError
from stripewell.opening import absolute, refuse_twice


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    (tmp_path / "symlink").symlink_to("a")
    (tmp_path / "hardlink").hardlink_to("a")
    return tmp_path


@pytest.mark.parametrize(
    "again",
    [
        "a",
        "./a",
        "{here}/a",
        "file:a",
        "file://{here}/a",
        "file:///{here}/../{name}/a?size=1G",
        "file://{here}/%61",
        "block:{here}/a",
        "a?size=1G",
        "symlink",
        "hardlink",
    ],
)
def test_one_device_twice(disks: Path, again: str) -> None:
    url = again.format(here=disks, name=disks.name)
    with pytest.raises(UserError, match="given twice"):
        refuse_twice([f"{disks}/a", "b", url])


def test_the_same_store_twice() -> None:
    with pytest.raises(UserError, match="given twice"):
        refuse_twice(["s3://bucket/x", "s3://bucket/y", "s3://bucket/x"])


@pytest.mark.usefixtures("disks")
def test_different_devices() -> None:
    refuse_twice(["a", "b", "not-there", "not-there-either", "s3://bucket/a", "s3://bucket/b"])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("a", "{here}/a"),
        ("./x/../a?size=1G", "{here}/a?size=1G"),
        ("/a", "/a"),
        ("file:a?size=1G", "file:{here}/a?size=1G"),
        ("file:///a", "file:///a"),
        ("dir:x", "dir:{here}/x"),
        ("block:/dev/sdb", "block:/dev/sdb"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("nbd+unix:///x?socket=y", "nbd+unix:///x?socket=y"),
    ],
)
def test_absolute(disks: Path, url: str, expected: str) -> None:
    assert absolute(url) == expected.format(here=disks)
