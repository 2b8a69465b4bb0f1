"""The table of failpoints and the calls in the engine are the same, and cost nothing unarmed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from pool import failpoints

CALL = re.compile(r'\breached\("(\w+)"\)')
NAME = re.compile(r"[a-z]+(_[a-z]+)*_after_[a-z]+(_[a-z]+)*_before_[a-z]+")


def test_every_failpoint_stands_in_the_engine_once() -> None:
    folder = Path(failpoints.__file__).parent
    calls = Counter(
        name for path in folder.rglob("*.py") for name in CALL.findall(path.read_text())
    )
    assert calls == Counter(list(failpoints.FAILPOINTS))


def test_names_say_what_they_are_between() -> None:
    for name, rule in failpoints.FAILPOINTS.items():
        assert NAME.fullmatch(name), name
        assert re.fullmatch(r"R([1-9]|1\d|2[0-4])", rule), name


def test_a_hook_hears_of_them_until_it_is_taken_away() -> None:
    heard: list[str] = []
    failpoints.install(heard.append)
    try:
        failpoints.reached("term_after_count_before_root")
    finally:
        failpoints.install(None)
    failpoints.reached("term_after_count_before_root")
    assert heard == ["term_after_count_before_root"]
