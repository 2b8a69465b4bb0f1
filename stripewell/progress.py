"""Progress of what takes longer than two seconds: a bar on a terminal, lines elsewhere.

On stderr, so that stdout stays data. Called by the CLI; rich is loaded when a bar is first drawn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from stripewell.control import Progress

_SILENT_SECONDS = 2.0
_LINE_SECONDS = 5.0


@contextmanager
def shown(
    label: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """A callback for (done, total) that shows itself once it is worth it."""
    stream = stream or sys.stderr
    with ExitStack() as stack:
        draw = _bar(label, stream, stack) if stream.isatty() else _lines(label, stream, clock)
        visible_from = clock() + _SILENT_SECONDS

        def progress(done: int, total: int) -> None:
            if clock() >= visible_from:
                draw(done, total)

        yield progress


def _lines(label: str, stream: TextIO, clock: Callable[[], float]) -> Progress:
    due = 0.0

    def draw(done: int, total: int) -> None:
        nonlocal due
        if clock() >= due:
            due = clock() + _LINE_SECONDS
            print(f"{label}: {100 * done // max(total, 1)} %", file=stream, flush=True)

    return draw


def _bar(label: str, stream: TextIO, stack: ExitStack) -> Progress:
    update: Progress | None = None

    def start() -> Progress:
        from rich.console import Console
        from rich.progress import Progress as Bars

        bars = stack.enter_context(Bars(console=Console(file=stream), transient=True))
        task = bars.add_task(label)
        return lambda done, total: bars.update(task, completed=done, total=total)

    def draw(done: int, total: int) -> None:
        nonlocal update
        update = update or start()
        update(done, total)

    return draw
