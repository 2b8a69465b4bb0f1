"""How often rare things happened: printed by every suite, which fails if one never did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

#: What the fixed workloads must go through, and what to call it.
RARE: Mapping[str, str] = {
    "journal_laps": "journal laps",
    "checkpoints": "checkpoints",
    "collector_overtaken": "blocks overwritten while the collector moved them",
    "trims_overwritten": "trims whose journal space was used again",
    "slots_reused": "deleted volumes whose slots were used again",
    "replicas_replaced": "journal replicas lost and replaced",
    "members_expelled": "devices expelled",
    "returned_stale": "expelled devices that came back with old content",
    "crashes_in_recovery": "crashes inside recovery",
    "lost_unflushed": "acknowledged operations that power loss took, as it may",
}


def report(title: str, events: Counter[str], wanted: Mapping[str, str] | None = None) -> None:
    """Print the histogram. Raises AssertionError if something wanted never happened."""
    wanted = RARE if wanted is None else wanted
    print(f"\n{title}")
    for name, text in wanted.items():
        print(f"{events[name]:8d}  {text}")
    missing = [text for name, text in wanted.items() if not events[name]]
    assert not missing, f"{title}: never happened: {', '.join(missing)}"
