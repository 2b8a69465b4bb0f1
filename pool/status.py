"""Describes an open pool for people and programs. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from backends.base import BLOCK_SIZE
from pool.member import Member
from pool.state import State
from pool.table import NOWHERE
from pool.words import counted


def describe(state: State, *, volumes: int, stopped: str | None) -> dict[str, Any]:
    """A JSON-able picture of the pool; sizes in bytes. `stopped` says why writes are refused, if
    they should not be."""
    journal = state._journal
    stripes = _stripe_health(state)
    health = _judge(state, stopped, stripes.lost)
    used = state.used * BLOCK_SIZE
    capacity = state.limit * BLOCK_SIZE
    replicas = [r.member for r in journal.replicas if not r.failed] if journal else []
    return {
        "name": state.name,
        "uuid": state.uuid.hex(),
        "state": health.state,
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
        "stripes": {"total": len(state.table), **asdict(stripes)},
        "volumes": volumes,
        "problems": list(health.problems.values()),
        "counters": dict(sorted(state.counters.items())),
    }


@dataclass(frozen=True, slots=True)
class Health:
    """How a pool is: the worst that is true, and all of it."""

    state: str = "healthy"
    #: By kind: the numbers in a text may change while it is the same problem.
    problems: dict[str, str] = field(default_factory=dict)
    #: Devices that the pool had gone on without, and whether they have everything again.
    returned: dict[str, bool] = field(default_factory=dict)


def health(state: State, *, stopped: str | None) -> Health:
    """The part of `describe` that is cheap whatever the size of the pool: stripes have parity, so
    that none is lost, and none need be counted, while no more devices are missing than that."""
    missing = sum(not member.present for member in state.members.values())
    lost = _stripe_health(state).lost if missing > state.parity else 0
    return _judge(state, stopped, lost)


def _judge(state: State, stopped: str | None, lost: int) -> Health:
    problems = _problems(state, stopped, lost)
    returned = {
        f"device {member.index} ({member.url})": not member.missed
        for member in state.members.values()
        if member.index in state.returned
    }
    return Health(_state(state, stopped, lost, problems), problems, returned)


@dataclass(frozen=True, slots=True)
class _Stripes:
    """Stripes that miss a shard, that have fewer data shards than the pool's code, and that miss
    more shards than they have parity: what was on those cannot be read."""

    degraded: int = 0
    narrow: int = 0
    lost: int = 0


def _stripe_health(state: State) -> _Stripes:
    widths, devices = state.table.shapes()
    if not len(widths):
        return _Stripes()
    present = np.array([m.index for m in state.active()], np.uint16)
    stored = devices != NOWHERE
    at_hand = stored & np.isin(devices, present)
    away = (stored & ~at_hand).any(axis=1)
    lost = at_hand.sum(axis=1) < widths
    return _Stripes(int(away.sum()), int((widths < state.data).sum()), int(lost.sum()))


def _nearly_full(state: State) -> bool:
    """Less is left than a stripe and than 0.5 %, or than the last write that was refused wanted."""
    left = state.limit - state.used
    few = min(state.data * state.slot_blocks, state.limit // 200)
    return left <= 0 or left < max(few, state.refused)


def _problems(state: State, stopped: str | None, lost: int) -> dict[str, str]:
    """What an operator should know, by kind."""
    found = {"stopped": stopped} if stopped else {}
    if lost:
        missing = sum(not member.present for member in state.members.values())
        verb = "is" if missing == 1 else "are"
        found["lost stripes"] = (
            f"{counted(missing, 'device')} {verb} missing, {state.parity} can be: "
            f"{counted(lost, 'stripe')} cannot be read: bring devices back, restart the daemon"
        )
    if _nearly_full(state):
        found["full"] = (
            "the pool is full: delete volumes, or TRIM in the guests, then let guests go on"
        )
    found |= state.problems
    for member in state.members.values():
        if not member.present:
            found[f"missing {member.index}"] = _missing(member)
        elif member.full:
            found[f"full {member.index}"] = (
                f"the storage under device {member.index} ({member.url}) is full"
            )
    journal = state._journal
    if journal is not None:
        have = sum(not r.failed for r in journal.replicas)
        if have < state.parity + 1:
            safe = counted(max(0, have - 1), "device")
            found["replicas"] = (
                f"the journal has {counted(have, 'replica')} instead of {state.parity + 1}: until "
                f"they are packed into stripes, writes survive the loss of {safe} only"
            )
    return found


def _missing(member: Member) -> str:
    where = f"last seen at {member.url}" if member.finding else member.url
    return f"device {member.index} ({where}) is missing: {member.trouble or 'it was not found'}"


def _state(state: State, stopped: str | None, lost: int, problems: dict[str, str]) -> str:
    """The worst that is true. Devices that are missing are among the problems."""
    if lost:
        return "failed"
    if stopped:
        return "read-only"
    if _nearly_full(state):
        return "full"
    return "degraded" if problems else "healthy"


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
        "free_bytes": member.room * slot,
        "written_bytes": state.counters[f"member_{member.index}_bytes"],
        "journal": member.index in replicas,
        "labels": member.labels,
        "errors": member.errors,
        "repaired": member.repaired,
        "reason": member.trouble,
    }
