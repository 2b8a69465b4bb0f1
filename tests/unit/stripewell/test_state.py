"""The state directory: atomic records, clear errors, nothing that the devices don't hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stripewell.errors import UserError
from stripewell.state import PoolRecord, State, default_directory

RECORD = PoolRecord("tank", "0123", ["file:///a", "/dev/sdb"])


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state")


def test_a_record_comes_back(state: State) -> None:
    state.save(RECORD)
    assert state.record("tank") == RECORD
    assert state.records() == [RECORD]
    assert json.loads((state.root / "pools/tank.json").read_text()) == {
        "name": "tank",
        "uuid": "0123",
        "devices": ["file:///a", "/dev/sdb"],
    }


def test_a_record_is_replaced_and_leaves_nothing_behind(state: State) -> None:
    state.save(RECORD)
    newer = PoolRecord("tank", "0123", ["file:///b"])
    state.save(newer)
    assert state.record("tank") == newer
    assert [path.name for path in (state.root / "pools").iterdir()] == ["tank.json"]


def test_a_save_that_fails_leaves_the_old_record(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(RECORD)

    def fail(descriptor: int) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="I/O error"):
        state.save(PoolRecord("tank", "0123", []))
    assert state.records() == [RECORD]


def test_an_unknown_pool_names_the_known_ones(state: State) -> None:
    with pytest.raises(UserError, match="known: none"):
        state.record("tank")
    state.save(RECORD)
    with pytest.raises(UserError, match="known: tank"):
        state.record("pond")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"name": "tank", "uuid": "0123"}',
        b'{"name": "pond", "uuid": "0123", "devices": []}',
        b'{"name": "tank", "uuid": 5, "devices": []}',
        b'{"name": "tank", "uuid": "0123", "devices": [5]}',
        b'{"name": "tank", "uuid": "0123", "devices": 5}',
    ],
)
def test_a_damaged_record_says_what_to_do(state: State, content: bytes) -> None:
    state.save(RECORD)
    (state.root / "pools/tank.json").write_bytes(content)
    with pytest.raises(UserError, match="pool import"):
        state.record("tank")


@pytest.mark.parametrize("name", ["../tank", "", ".", "a/b"])
def test_path_tricks_are_no_pool_names(state: State, name: str) -> None:
    with pytest.raises(UserError, match="no pool name"):
        state.record(name)


@pytest.mark.parametrize(
    ("environment", "uid", "directory"),
    [
        ({"STRIPEWELL_STATE": "/s"}, 0, "/s"),
        ({"HOME": "/root"}, 0, "/var/lib/stripewell"),
        ({"HOME": "/home/u"}, 1000, "/home/u/.local/state/stripewell"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "/x"}, 1000, "/x/stripewell"),
    ],
)
def test_where_state_lives(environment: dict[str, str], uid: int, directory: str) -> None:
    assert default_directory(environment, uid) == Path(directory)
