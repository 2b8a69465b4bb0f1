"""Which root is the pool's: the pure part of opening, and the quorum rules (R19, R20)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pool.errors import PoolError
from pool.format.superblock import Superblock
from pool.words import line


def quorum(members: int, parity: int) -> int:
    """On how many of `members` a root must be synced to be committed (R19)."""
    return max(parity + 1, members // 2 + 1)


def active(root: dict[str, Any]) -> set[int]:
    """Indices of the members that a root counts."""
    return {member["index"] for member in root["members"] if member["state"] == "active"}


@dataclass(frozen=True, slots=True)
class Found:
    """The newest valid superblock of one backend, with the slot it was read from."""

    backend: int
    slot: int
    block: Superblock


def choose_root(found: Iterable[Found]) -> Superblock:
    """The root to open. Raises PoolError for members of several pools and for a fork (R19)."""
    blocks = [item.block for item in found]
    if not blocks:
        raise PoolError("none of the devices belongs to a pool: check the URLs")
    pools = {block.pool for block in blocks}
    if len(pools) > 1:
        names = sorted({block.root["name"] for block in blocks})
        raise PoolError(f"the devices belong to different pools ({', '.join(names)}): name one's")
    newest = max(block.generation for block in blocks)
    rivals: dict[str, list[Superblock]] = {}
    for block in blocks:
        if block.generation == newest:
            rivals.setdefault(block.digest, []).append(block)
    if len(rivals) == 1:
        return next(iter(rivals.values()))[0]
    committed = [
        group[0]
        for group in rivals.values()
        if len({block.index for block in group} & active(group[0].root))
        >= quorum(len(active(group[0].root)), group[0].root["code"]["parity"])
    ]
    if len(committed) == 1:
        return committed[0]
    raise PoolError(
        f"two histories of the pool claim generation {newest}: leave out the devices of the one "
        "that you do not want and import again"
    )


def check_enough(
    root: dict[str, Any], present: set[int], *, writable: bool, remarks: Iterable[str] = ()
) -> None:
    """Raise PoolError, naming the missing by their last known place and with what is known of them,
    unless enough members are there.

    Writing needs n - m of the members that the root counts (R20), and more than m, so that a root
    can be committed and a journal be kept."""
    parity = root["code"]["parity"]
    wanted = active(root)
    missing = [member for member in root["members"] if member["index"] in wanted - present]
    have = len(wanted & present)
    if len(missing) <= parity and (have > parity or not writable):
        return
    if not writable and have:
        return
    names = line(", ".join(member["url"] for member in missing))
    need = max(len(wanted) - parity, parity + 1)
    text = "; ".join(
        (f"{have} of {len(wanted)} devices found, {need} are needed; missing: {names}", *remarks)
    )
    if writable and len(missing) <= parity:
        text += "; `serve --read-only` gives access to what is there"
    raise PoolError(text)
