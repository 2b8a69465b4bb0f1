"""`python -m tests.sim`: what is asked wrongly gets one line, and what is run is said."""

from __future__ import annotations

import pytest

from .__main__ import main
from .cases import SEEDS_FOR_ALL, crashes, parse
from .scenarios import SCENARIOS, crash_at, operations


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("SEED", "abc", "write a number, as in SEED=12345"),
        ("SEED", "-1", "write a number"),
        ("CRASH", "brief", "as in CRASH=brief:417"),
        ("CRASH", "brief:0", "as in CRASH=brief:417"),
        ("CRASH", "brief:x", "as in CRASH=brief:417"),
        ("CRASH", "nope:3", "write one of brief, eventful"),
        ("CRASH", "brief:99999999", "the workload brief has only"),
        ("FAILPOINT", "x", "as in FAILPOINT="),
        ("FAILPOINT", "x:1:power", "there is no failpoint 'x'"),
        ("FAILPOINT", "term_after_root_before_copy:1:fire", "power or kill"),
        ("FAILPOINT", "term_after_root_before_copy:999:kill", "comes by it only"),
        ("MINUTES", "x", "write a number above 0"),
        ("MINUTES", "nan", "write a number above 0"),
        ("MINUTES", "0", "write a number above 0"),
        ("JOBS", "0", "write a whole number from 1 on"),
        ("JOBS", "two", "write a whole number from 1 on"),
    ],
)
def test_a_mistake_is_one_line(
    variable: str, value: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([], {variable: value}) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == ""
    assert f"{variable}={value}" in line
    assert remedy in line


@pytest.mark.parametrize(
    "arguments", [["--seeds", "x"], ["--seeds", "0"], ["--first", "-2"], ["--what"], ["more"]]
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, {}) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)


def test_two_cases_are_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], {"SEED": "1", "CRASH": "brief:1"}) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    [("SEED", "7"), ("CRASH", "brief:40"), ("FAILPOINT", "term_after_root_before_copy:1:kill")],
)
def test_one_case_prints_what_happened_in_it(
    case: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([], dict([case])) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{case[0]}={case[1]}: nothing went wrong"
    assert rest
    assert not [line for line in rest if "nothing came by" in line or line.split()[0] == "0"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_workload_crashes_at_its_last_operation_and_at_none_behind(name: str) -> None:
    count = operations(name)
    _, completed = crash_at(name, count)
    assert not completed
    _, completed = crash_at(name, count + 1)
    assert completed


def test_few_seeds_take_a_share_of_the_crashes() -> None:
    text, few = crashes(3, first=1)
    _, same = crashes(3, first=1)
    _, others = crashes(3, first=2)
    whole, every = crashes(SEEDS_FOR_ALL, first=1)
    assert few == same != others
    assert len(few) < 30
    for kind in ("CRASH=brief", "CRASH=eventful", "FAILPOINT="):
        assert any(case.startswith(kind) for case in few)
    brief = [case for case in every if case.startswith("CRASH=brief")]
    assert brief == [f"CRASH=brief:{nth}" for nth in range(1, operations("brief") + 1)]
    assert text.startswith(f"{len(brief) * 3 // SEEDS_FOR_ALL} of {len(brief)} crashes of brief")
    assert whole.startswith(f"{len(brief)} of {len(brief)} crashes of brief")
    assert all(parse(case) for case in every)
