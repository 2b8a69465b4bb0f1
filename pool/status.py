"""Describes an open pool for people and programs. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.base import BLOCK_SIZE
from pool.member import Member
from pool.state import State
from pool.table import NOWHERE


def describe(state: State, *, volumes: int, stopped: str | None) -> dict[str, Any]:
    """A JSON-able picture of the pool; sizes in bytes. `stopped` says why writes are refused, if
    they should not be."""
    journal = state._journal
    degraded, narrow = _stripe_health(state)
    problems = _problems(state, stopped)
    used = state.used * BLOCK_SIZE
    capacity = state.limit * BLOCK_SIZE
    replicas = [r.member for r in journal.replicas if not r.failed] if journal else []
    return {
        "name": state.name,
        "uuid": state.uuid.hex(),
        "state": _state(state, stopped, degraded, problems),
        "data": state.data,
        "parity": state.parity,
        "generation": state.generation,
        "term": state.term,
        "capacity_bytes": capacity,
        "used_bytes": used,
        "free_bytes": max(0, capacity - used),
        "journal": {
            "size_bytes": state.journal_blocks * BLOCK_SIZE,
            "used_bytes": journal.used * BLOCK_SIZE if journal else 0,
            "unpacked_bytes": sum(e[3] for e in state.fifo) * BLOCK_SIZE,
            "replicas": replicas,
            "target_replicas": state.parity + 1,
        },
        "devices": [_device(state, member, replicas) for member in state.members.values()],
        "stripes": {"total": len(state.table), "degraded": degraded, "narrow": narrow},
        "volumes": volumes,
        "problems": problems,
        "counters": dict(sorted(state.counters.items())),
    }


def _stripe_health(state: State) -> tuple[int, int]:
    """(stripes with a shard that is not at hand, stripes narrower than the pool's code)."""
    widths, devices = state.table.shapes()
    if not len(widths):
        return 0, 0
    present = np.array([m.index for m in state.active()], np.uint16)
    stored = devices != NOWHERE
    away = (stored & ~np.isin(devices, present)).any(axis=1)
    return int(away.sum()), int((widths < state.data).sum())


def _problems(state: State, stopped: str | None) -> list[str]:
    found = [stopped] if stopped else []
    found += list(state.problems.values())
    for member in state.members.values():
        if member.state == "gone" or member.backend is None:
            found.append(f"device {member.index} ({member.url}) is missing: {member.reason}")
        elif member.full:
            found.append(f"the storage under device {member.index} ({member.url}) is full")
    journal = state._journal
    if journal is not None:
        have = sum(not r.failed for r in journal.replicas)
        if have < state.parity + 1:
            found.append(
                f"the journal has {have} replicas instead of {state.parity + 1}: until they are "
                f"packed into stripes, writes survive the loss of {max(0, have - 1)} devices only"
            )
    return found


def _state(state: State, stopped: str | None, degraded: int, problems: list[str]) -> str:
    if stopped:
        return "read-only"
    if state.used >= state.limit:
        return "full"
    return "degraded" if degraded or problems else "healthy"


def _device(state: State, member: Member, replicas: list[int]) -> dict[str, Any]:
    slot = member.layout.slot_bytes
    present = member.present
    return {
        "index": member.index,
        "uuid": member.uuid.hex(),
        "url": member.url,
        "state": "active" if present else ("missing" if member.backend is None else "expelled"),
        "size_bytes": member.layout.size,
        "used_bytes": member.slots.used * slot,
        "free_bytes": member.slots.free * slot,
        "written_bytes": state.counters[f"member_{member.index}_bytes"],
        "journal": member.index in replicas,
        "labels": member.labels,
        "errors": member.errors,
        "repaired": member.repaired,
        "reason": member.reason,
    }
