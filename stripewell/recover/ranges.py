"""Ranges of blocks, merged as they come in ascending order: only so many are kept. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_MOST = 10_000


@dataclass(slots=True)
class Ranges:
    """`blocks` counts all of them, `more` the ranges that were not kept."""

    kept: list[tuple[int, int]] = field(default_factory=list)
    blocks: int = 0
    more: int = 0

    def add(self, first: int, end: int) -> None:
        """Add the blocks from `first` to before `end`."""
        self.blocks += end - first
        if self.kept and self.kept[-1][1] == first:
            self.kept[-1] = self.kept[-1][0], end
        elif len(self.kept) < _MOST:
            self.kept.append((first, end))
        else:
            self.more += 1

    def add_blocks(self, first: int, which: npt.NDArray[np.bool_]) -> None:
        """Add those of the blocks from `first` on."""
        padded = np.concatenate(([False], which, [False])).astype(np.int8)
        edges = np.flatnonzero(np.diff(padded)).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            self.add(first + start, first + end)
