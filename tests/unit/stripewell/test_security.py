"""TLS options: what fits together, what can be read, and who may see what."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import pytest

from stripewell.certificates import folders, making
from stripewell.errors import UserError
from stripewell.security import Mode, load


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    now = datetime.now(UTC)
    authority = making.make_authority("ours", now)
    leaf = making.make_server(authority, ["localhost"], now)
    for name, content in folders.leaf_files(authority, "server", leaf).items():
        (folder / name).write_bytes(content)
    return folder


def test_off_is_nothing(server: Path) -> None:
    assert load(Mode.OFF, None, verify_clients=False, allow=None) is None
    with pytest.raises(UserError, match="add --tls required"):
        load(Mode.OFF, server, verify_clients=False, allow=None)


@pytest.mark.parametrize("mode", [Mode.ALLOWED, Mode.REQUIRED])
def test_everybody_sees_everything_without_a_list(server: Path, mode: Mode) -> None:
    tls = load(mode, server, verify_clients=False, allow=None)
    assert tls is not None
    assert tls.required is (mode is Mode.REQUIRED)
    assert tls.permits(None, "any")


def test_patterns_of_volumes_by_subject(server: Path, tmp_path: Path) -> None:
    allow = tmp_path / "allow"
    allow.write_text("# hosts\n\nvmhost1: vm1 web-*  # two kinds\nvmhost1: vm9\nco: lon: vm2\n")
    tls = load(Mode.REQUIRED, server, verify_clients=True, allow=allow)
    assert tls is not None
    pairs = product(("vmhost1", "co: lon", "x", None), ("vm1", "web-7", "vm9", "vm2", "VM1"))
    seen = {pair for pair in pairs if tls.permits(*pair)}
    assert seen == {
        ("vmhost1", "vm1"),
        ("vmhost1", "web-7"),
        ("vmhost1", "vm9"),
        ("co: lon", "vm2"),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vmhost1 vm1\n", "line 1: write SUBJECT: VOLUME"),
        ("a: b\n: vm1\n", "line 2: write SUBJECT"),
        ("vmhost1:\n", "line 1"),
        ("# nobody\n", "allows nobody anything"),
        ("\udcff", "cannot read"),
    ],
)
def test_lists_that_make_no_sense(server: Path, tmp_path: Path, text: str, said: str) -> None:
    allow = tmp_path / "allow"
    allow.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=said):
        load(Mode.REQUIRED, server, verify_clients=True, allow=allow)


def test_what_does_not_fit_together(server: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --tls-certificates DIR"):
        load(Mode.REQUIRED, None, verify_clients=False, allow=None)
    with pytest.raises(UserError, match="add --tls-verify-clients"):
        load(Mode.REQUIRED, server, verify_clients=False, allow=tmp_path / "x")
    with pytest.raises(UserError, match="cannot read .*x"):
        load(Mode.REQUIRED, server, verify_clients=True, allow=tmp_path / "x")
    with pytest.raises(UserError, match=r"has no server-cert\.pem: make certificates"):
        load(Mode.REQUIRED, tmp_path, verify_clients=False, allow=None)
    for name in ("server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("no certificate")
    with pytest.raises(UserError, match="cannot be used"):
        load(Mode.REQUIRED, tmp_path, verify_clients=False, allow=None)
