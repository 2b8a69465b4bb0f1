"""How often rare things happened: printed by every suite, which fails if one never did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from pool.failpoints import FAILPOINTS

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
#: What random lives must go through, in as many seeds as a test run has.
RARE_IN_LIVES: Mapping[str, str] = {
    **RARE,
    "deaths_at_failpoints": "deaths at a failpoint",
    "clean_ends": "clean ends",
    "old_copies": "devices replaced by old copies of themselves",
    "members_full": "devices whose storage was full",
    "rotten": "devices on which bits rot",
    "bad_blocks": "blocks whose checksum was wrong",
    "repaired_blocks": "blocks repaired",
    "reconstructed_blocks": "blocks reconstructed from parity",
    "caught_up_shards": "shards that a returned device had missed",
    "scrubbed": "wrong shards found by a scrub",
    "leaves_loaded": "map leaves paged in",
    "overtaken_blocks": "blocks overwritten while they were moved",
    "merge_retries": "read-modify-writes that lost a race",
    "refused_full": "writes refused by a full pool",
    "cut_with_requests": "connections cut with requests under way",
    "resent": "requests sent again",
    "handed_over": "connections handed to a successor",
    "fua_writes": "writes with FUA",
    "shut_down": "requests of deleted volumes",
    "babblers": "strangers that talked nonsense",
    "objects_deleted": "objects deleted from stores",
    "beyond": "runs with more faults than parity can bear",
    "honest_errors": "honest errors then",
}


def table(events: Counter[str], wanted: Mapping[str, str]) -> str:
    """One line per event."""
    return "\n".join(f"{events[name]:10d}  {text}" for name, text in wanted.items())


def happened(events: Counter[str], wanted: Mapping[str, str]) -> str:
    """The same without what never happened."""
    return table(events, {name: text for name, text in wanted.items() if events[name]})


def report(title: str, events: Counter[str], wanted: Mapping[str, str] | None = None) -> None:
    """Print the histogram. Raises AssertionError if something wanted never happened."""
    wanted = RARE if wanted is None else wanted
    print(f"\n{title}\n{table(events, wanted)}")
    missing = [text for name, text in wanted.items() if not events[name]]
    assert not missing, f"{title}: never happened: {', '.join(missing)}"


def never_reached(events: Counter[str]) -> list[str]:
    """Failpoints that nothing came by."""
    return [name for name in FAILPOINTS if not events[f"at {name}"]]


def merged(events: Iterable[Counter[str]]) -> Counter[str]:
    """All of them together."""
    total: Counter[str] = Counter()
    for one in events:
        total.update(one)
    return total
