"""What proved wrong on one device: each place once, and only so many of them. Pure.

A place is wrong if another one proves it so, a checksum as a rule. What may rightly be missing, as
behind the last sync, is not counted. Filled by `sources` (superblocks), `stripes` and `journal`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

#: Places of a kind that are kept: with so many the number does not matter any more.
MOST = 10_000


@dataclass(slots=True)
class Damage:
    """Superblocks by number, headers and blocks of shards by location, journal by position."""

    superblocks: int = 0
    headers: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)
    journal: set[int] = field(default_factory=set)

    def counts(self) -> dict[str, int]:
        """How many places of each kind; `MOST` stands for more, too."""
        return {
            "superblocks": self.superblocks,
            "shard_headers": len(self.headers),
            "shard_blocks": len(self.blocks),
            "journal_blocks": len(self.journal),
        }


def note(places: set[int], found: Iterable[int]) -> None:
    """Add places, as long as there is room."""
    for place in found:
        if len(places) < MOST:
            places.add(place)


def in_words(counts: dict[str, int]) -> str:
    """As in "1 superblock, 7 shard blocks wrong or unreadable"; "" for no damage."""
    named = ", ".join(_counted(number, kind) for kind, number in counts.items() if number)
    return f"{named} wrong or unreadable" if named else ""


def _counted(number: int, kind: str) -> str:
    words = kind.replace("_", " ")
    if number == 1:
        words = words.removesuffix("s")
    return f"{number}{' or more' if number >= MOST else ''} {words}"
