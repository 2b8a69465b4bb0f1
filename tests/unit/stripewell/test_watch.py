"""What the daemon logs: each change once, the cause before the effect, and nothing while all is
the same."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from pool import Health
from stripewell import watch
from stripewell.watch import changes, watched

WELL = Health()
MISSING = Health("degraded", {"missing 1": "device 1 (/d1) is missing: it has vanished"})


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (WELL, WELL, []),
        (MISSING, MISSING, []),
        (
            WELL,
            MISSING,
            [
                "warning: device 1 (/d1) is missing: it has vanished",
                "warning: pool tank is degraded (it was healthy)",
            ],
        ),
        (
            MISSING,
            Health("full", {**MISSING.problems, "full": "the pool is full"}),
            ["warning: the pool is full", "warning: pool tank is full (it was degraded)"],
        ),
        (MISSING, WELL, ["pool tank is healthy again (it was degraded)"]),
        (
            WELL,
            Health("degraded", {"catching up": "9 shards to go"}, {"device 1 (/d1)": False}),
            [
                "warning: 9 shards to go",
                "device 1 (/d1) is back; what it missed is rebuilt",
                "warning: pool tank is degraded (it was healthy)",
            ],
        ),
        (
            Health("degraded", {"catching up": "9 shards to go"}, {"device 1 (/d1)": False}),
            Health("healthy", {}, {"device 1 (/d1)": True}),
            [
                "device 1 (/d1) has everything again",
                "pool tank is healthy again (it was degraded)",
            ],
        ),
    ],
)
def test_what_changed_is_told(before: Health, after: Health, lines: list[str]) -> None:
    assert changes("tank", before, after) == lines


def test_other_numbers_are_no_change() -> None:
    before, after = (Health("degraded", {"catching up": f"{n} shards to go"}) for n in (9, 8))
    assert changes("tank", before, after) == []


@dataclass
class Looked:
    """A pool that is as `now` says."""

    name: str = "tank"
    now: Health = WELL
    looks: int = 0
    lines: list[str] = field(default_factory=list)

    def health(self) -> Health:
        self.looks += 1
        return self.now


async def test_a_pool_is_looked_at_from_the_beginning_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.001)
    pool = Looked(now=MISSING)
    async with watched(pool, pool.lines.append):  # type: ignore[arg-type]
        assert len(pool.lines) == 2
        await asyncio.sleep(0.05)
        assert pool.looks > 2
        assert len(pool.lines) == 2
        pool.now = WELL
    assert pool.lines[2:] == ["pool tank is healthy again (it was degraded)"]
