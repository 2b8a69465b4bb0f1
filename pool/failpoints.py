"""Named places between two steps whose order a rule demands: where a crash must do no harm.

Nothing happens at a failpoint unless somebody has called `install`, which only tests do: the
simulation ends its world there, and a test's own launcher kills the daemon. The table is the
specification of the orders that recovery relies on; `docs/testing.md` shows it with the tests that
crash at each.

Invariant: a failpoint is no part of a step. It neither waits nor changes anything.
"""

from __future__ import annotations

from collections.abc import Callable

#: Failpoint → the rule whose order it interrupts. Named `<what>_after_<step>_before_<step>`.
FAILPOINTS: dict[str, str] = {
    "term_after_count_before_root": "R1",
    "term_after_root_before_copy": "R1",
    "sync_after_device_before_durable": "R2",
    "append_after_headers_before_primary": "R3",
    "append_after_primary_before_map": "R3",
    "append_after_map_before_answer": "R3",
    "failure_after_mark_before_report": "R4",
    "expulsion_after_report_before_replicas": "R4",
    "expulsion_after_root_before_replace": "R4",
    "expulsion_after_replace_before_close": "R4",
    "flush_after_durable_before_answer": "R5",
    "expulsion_after_replicas_before_root": "R5",
    "recovery_after_chain_before_term": "R6",
    "recovery_after_copy_before_next": "R6",
    "recovery_after_copies_before_naming": "R6",
    "recovery_after_naming_before_serving": "R6",
    "recovery_after_replay_before_mark": "R6",
    "recovery_after_mark_before_flush": "R6",
    "recovery_after_flush_before_serving": "R6",
    "catalog_after_commit_before_apply": "R7",
    "catalog_after_apply_before_flush": "R7",
    "catalog_after_flush_before_answer": "R7",
    "destage_after_choice_before_flush": "R9",
    "destage_after_flush_before_move": "R9",
    "full_after_mark_before_narrowing": "R10",
    "move_after_sync_before_switch": "R11",
    "move_after_switch_before_next": "R11",
    "collect_after_choice_before_move": "R12",
    "stripe_after_gather_before_encode": "R13",
    "repair_after_decode_before_write": "R14",
    "repair_after_write_before_count": "R14",
    "stripe_after_shard_before_next": "R15",
    "stripe_after_shards_before_sync": "R16",
    "stripe_after_sync_before_outcome": "R16",
    "drop_after_leaf_before_next": "R17",
    "range_after_stage_before_commit": "R18",
    "range_after_piece_before_next": "R18",
    "root_after_front_before_end": "R19",
    "root_after_member_before_next": "R19",
    "root_after_members_before_commit": "R19",
    "opening_after_root_before_checkpoint": "R20",
    "opening_after_checkpoint_before_journal": "R20",
    "checkpoint_after_freeze_before_flush": "R21",
    "checkpoint_after_flush_before_pages": "R21",
    "checkpoint_after_pages_before_store": "R21",
    "checkpoint_after_store_before_root": "R21",
    "checkpoint_after_root_before_release": "R21",
    "checkpoint_after_release_before_next": "R21",
    "trash_after_root_before_delete": "R21",
    "close_after_checkpoint_before_unlock": "R22",
    "delete_after_hiding_before_journal": "R23",
    "delete_after_flush_before_closing": "R23",
    "delete_after_closing_before_space": "R23",
    "catch_up_after_look_before_rebuild": "R24",
    "catch_up_after_rebuild_before_sync": "R24",
    "catch_up_after_sync_before_done": "R24",
}

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of every failpoint that is reached; None ends that."""
    global _hook
    _hook = hook


def reached(name: str) -> None:
    """Execution has come to a failpoint."""
    if _hook is not None:
        _hook(name)
