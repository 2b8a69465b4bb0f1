"""Progress: nothing for what is quick, lines now and then for what is not."""

from __future__ import annotations

import io

from stripewell.progress import shown


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(seconds_per_step: float, steps: int) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with shown("check tank", stream, clock) as progress:
        for done in range(steps + 1):
            progress(done, steps)
            clock.now += seconds_per_step
    return stream.getvalue().splitlines()


def test_what_is_quick_shows_nothing() -> None:
    assert run(0.01, 100) == []


def test_lines_come_every_few_seconds() -> None:
    lines = run(1.0, 20)
    assert lines[0] == "check tank: 10 %"
    assert len(lines) == 4


def test_nothing_to_do_is_no_division_by_zero() -> None:
    assert run(3.0, 0) == []


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, clock = Terminal(), Clock()
    with shown("check tank", stream, clock) as progress:
        clock.now = 3.0
        progress(1, 2)
        progress(2, 2)
    assert "check tank" in stream.getvalue()
