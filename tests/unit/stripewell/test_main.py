"""The command line's edges: exit statuses and one line per mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stripewell.__main__ import run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stripewell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = run(["--state", str(tmp_path / "state"), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


USAGE = [
    ("nonsense",),
    ("pool", "nonsense"),
    ("pool", "create"),
    ("pool", "create", "tank", "/x"),
    ("pool", "create", "tank", "/x", "--data", "0", "--parity", "1"),
    ("pool", "create", "tank", "/x", "--data", "65", "--parity", "1"),
    ("pool", "create", "tank", "/x", "--data", "1", "--parity", "-1"),
    ("pool", "create", "tank", "/x", "--data", "1", "--parity", "17"),
    ("pool", "create", "tank", "/x", "--data", "x", "--parity", "1"),
    ("pool", "create", "tank", "/x", "--data", "1", "--parity", "0", "--slot-size", "big"),
    ("pool", "import"),
    ("pool", "status"),
    ("pool", "status", "tank", "--bogus"),
    ("volume", "create", "tank/vm1"),
    ("volume", "create", "tank/vm1", "--size", "20X"),
    ("volume", "create", "tank/vm1", "--size", "-5"),
    ("volume", "create", "tank/vm1", "--size", "0"),
    ("serve", "tank", "--tcp", "host:99999"),
    ("serve", "tank", "--http", "host"),
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_is_one_line_and_status_2(stripewell: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = stripewell(*arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("stripewell: ")
    assert "--help" in err


REFUSED = [
    ("pool", "status", "tank"),
    ("pool", "check", "tank"),
    ("pool", "status", "../../etc/passwd"),
    ("pool", "create", "../tank", "/x", "--data", "1", "--parity", "0"),
    ("pool", "create", "tank", "/x", "--data", "4", "--parity", "2"),
    ("serve", "tank"),
    ("serve", "a/b"),
    ("volume", "list", "tank"),
    ("volume", "create", "tank/vm1", "--size", "1G"),
    ("volume", "create", "tank", "--size", "1G"),
    ("volume", "create", "tank/../vm1", "--size", "1G"),
    ("volume", "delete", "tank/vm1"),
    ("attach", "tank/vm1"),
    ("attach", "tank"),
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_can_not_be_done_is_one_line_and_status_1(
    stripewell: Run, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    status, out, err = stripewell(*arguments)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("stripewell: ")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("pool",), ("volume",), ("tls",)],
    ids=["", "pool", "volume", "tls"],
)
def test_no_command_shows_the_help(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), ("pool", "create", "-h"), ("--version",)])
def test_help_and_version(stripewell: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = stripewell(*arguments)
    assert (status, err) == (0, "")
    assert "stripewell" in out


def test_nothing_known_yet(stripewell: Run) -> None:
    assert stripewell("pool", "list", "--json") == (0, "[]\n", "")
    assert stripewell("volume", "list", "--json") == (0, "[]\n", "")
    assert stripewell("pool", "list")[1].startswith("no pool known in ")


def test_state_may_be_named_after_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pool", "list", "--state", str(tmp_path / "other")]) == 0
    assert str(tmp_path / "other") in capsys.readouterr().out


def test_state_comes_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRIPEWELL_STATE", str(tmp_path / "other"))
    assert run(["pool", "list"]) == 0
    assert str(tmp_path / "other") in capsys.readouterr().out


def test_a_state_directory_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    state = str(tmp_path / "file" / "below")
    create = ["pool", "create", "tank", str(tmp_path / "d"), "--data", "1", "--parity", "0"]
    assert run(["--state", state, *create]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "Not a directory" in err
