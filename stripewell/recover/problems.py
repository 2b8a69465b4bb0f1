"""What was found wrong, as lines for the report: only so many. Pure."""

from __future__ import annotations

_MOST = 100


class Problems:
    """Lines, and how many more there were."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.more = 0

    def add(self, line: str) -> None:
        """Note a problem, or count it when there are too many."""
        if len(self.lines) < _MOST:
            self.lines.append(line)
        else:
            self.more += 1
