"""The root to use ("Which root counts" in `docs/format.md`), and what to say when none is. Pure.

Called by `remains`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stripewell.errors import UserError
from stripewell.recover.root import parse_root, quorum
from stripewell.recover.sources import Source
from stripewell.recover.superblock import Superblock
from stripewell.recover.values import Unusable, plain


@dataclass(slots=True)
class Candidate:
    """A root, and the sources that have it: `on` all, `newest` those that have no newer one."""

    block: Superblock
    newest: list[Source] = field(default_factory=list)
    on: list[Source] = field(default_factory=list)

    @property
    def generation(self) -> int:
        return self.block.head.generation

    def __str__(self) -> str:
        where = ", ".join(plain(source.url) for source in self.on)
        return f"generation {self.generation}, digest {self.block.digest[:8]}, on {where}"


def candidates(sources: Sequence[Source]) -> list[Candidate]:
    """All roots there are, the newest first. Raises UserError for none, and for several pools."""
    found: dict[tuple[str, str], Candidate] = {}
    for source in sources:
        for number, block in enumerate(source.superblocks):
            candidate = found.setdefault((block.head.pool, block.digest), Candidate(block))
            candidate.on.append(source)
            if number == 0 or block.head.generation == source.superblocks[0].head.generation:
                candidate.newest.append(source)
    if not found:
        reasons = plain_list([f"{plain(one.url)}: {one.trouble}" for one in sources])
        raise UserError(f"none of these holds a pool ({reasons}): check the URLs")
    pools: dict[str, list[str]] = {}
    for candidate in found.values():
        pools.setdefault(candidate.block.head.pool, []).extend(
            plain(one.url) for one in candidate.on
        )
    if len(pools) > 1:
        each = "; ".join(f"{pool[:8]} on {', '.join(urls)}" for pool, urls in pools.items())
        raise UserError(f"these belong to different pools ({each}): name the devices of one")
    return sorted(found.values(), key=lambda one: (-one.generation, one.block.digest))


def choose(
    found: Sequence[Candidate], generation: int | None = None, digest: str | None = None
) -> Candidate:
    """The root to use: the newest, or that of the wanted generation and digest. Raises UserError
    if there is none, or if several claim a generation and none is on its quorum (R19)."""
    wanted = [
        one
        for one in found
        if generation in (None, one.generation) and one.block.digest.startswith(digest or "")
    ]
    if not wanted:
        raise UserError(f"no device has that root; there are: {_listed(found)}")
    rivals = [one for one in wanted if one.generation == wanted[0].generation]
    if len(rivals) == 1:
        return rivals[0]
    committed = [one for one in rivals if is_committed(one)]
    if len(committed) == 1:
        return committed[0]
    raise UserError(
        f"two histories of the pool claim one generation: {_listed(rivals)}: say which to restore "
        "with --digest, or leave out the devices of the other"
    )


def is_committed(candidate: Candidate) -> bool:
    """Whether a root is on a quorum of the members that it counts."""
    try:
        root = parse_root(candidate.block.body)
    except Unusable:
        return False
    active = {root.members[index].uuid for index in root.active()}
    there = {block.head.device for source in candidate.newest for block in source.superblocks[:1]}
    return len(active & there) >= quorum(root)


def _listed(found: Sequence[Candidate]) -> str:
    return plain_list([str(one) for one in found])


def plain_list(items: Sequence[str], most: int = 8) -> str:
    """So many of them, and how many more there are."""
    more = len(items) - most
    shown = "; ".join(items[:most])
    return f"{shown}; and {more} more" if more > 0 else shown


def unusable(
    candidate: Candidate, reason: str, found: Sequence[Candidate], missing: Sequence[str] = ()
) -> UserError:
    """What to say when the chosen root leads nowhere. `missing`: where absent devices were."""
    remedies = []
    if missing:
        remedies.append(f"bring back the devices last seen at {plain(', '.join(missing))}")
    if others := [one for one in found if one is not candidate]:
        remedies.append(f"choose another root with --generation ({_listed(others)})")
    remedy = ", or ".join(remedies or ["restore what there is in a backup"])
    return UserError(f"the root ({candidate}) cannot be used, {plain(reason)}: {remedy}")
