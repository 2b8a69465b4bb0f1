"""What is left of a pool: root, checkpoint and journal together, and how complete that is.

Called by `command` and `restore`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from stripewell.errors import UserError
from stripewell.recover.catalog import Catalog, Volume, objection
from stripewell.recover.checkpoint import Checkpoint
from stripewell.recover.choice import Candidate, candidates, choose, is_committed, unusable
from stripewell.recover.content import Content, Part
from stripewell.recover.damage import in_words
from stripewell.recover.journal import Chain, Follower, Ring
from stripewell.recover.overlay import Changes
from stripewell.recover.problems import Problems
from stripewell.recover.ranges import Ranges
from stripewell.recover.root import BLOCK, Member, Root, parse_root
from stripewell.recover.sources import Source, find_superblocks
from stripewell.recover.stripes import Stripes
from stripewell.recover.values import Unusable, plain

Progress = Callable[[int, int], None]
WRITTEN_TO = "the pool was written to meanwhile: stop its daemon and try again"
#: Shards that are looked for on a device without a superblock.
_SAMPLE = 32


@dataclass(slots=True)
class Finding:
    """What a volume is, in blocks: how much of it is mapped, and what of that is lost."""

    volume: Volume
    objection: str
    data: int = 0
    zeros: int = 0
    lost: Ranges = field(default_factory=Ranges)
    #: All of it was read. Else blocks may still prove lost.
    verified: bool = False


@dataclass(slots=True)
class Remains:
    """A pool as far as its devices tell; `assemble` makes it."""

    sources: list[Source]
    candidates: list[Candidate]
    chosen: Candidate
    root: Root
    members: dict[int, Source]
    catalog: Catalog
    problems: Problems
    checkpoint: Checkpoint
    stripes: Stripes
    ring: Ring
    chain: Chain
    changes: dict[int, Changes]
    #: Members without a superblock, known by their stripes.
    headless: set[int]
    #: Somebody wrote to the pool since it was opened.
    torn: bool = False

    def missing(self) -> list[Member]:
        """Members that count and are not there."""
        return absent(self.root, self.members)

    def carriers(self) -> int:
        """How many of the members that count have the root; copies of one are one."""
        active = {self.root.members[index].uuid for index in self.root.active()}
        there = {block.head.device for one in self.chosen.on for block in one.superblocks[:1]}
        return len(active & there)

    def rivals(self) -> list[Candidate]:
        """Roots that may count instead: newer ones, and as new ones unless the chosen one is on
        its quorum."""
        chosen = self.chosen
        least = chosen.generation + is_committed(chosen)
        return [c for c in self.candidates if c is not chosen and c.generation >= least]

    def gaps(self) -> list[str]:
        """Why this may not be all that was ever flushed; nothing if it is."""
        found = []
        if rivals := self.rivals():
            found.append(f"the root was chosen by hand; there is another: {rivals[0]}")
        lacking = len(self.missing()) + len(self.headless & self.root.active())
        if lacking > self.root.parity:
            found.append(
                f"{lacking} devices are missing, or have no superblock, more than the "
                f"{self.root.parity} that may be: what was flushed last may be on them"
            )
        elif lacking + len(hiding := self._hiding()) > self.root.parity:
            found.append(
                f"root slots of {len(hiding)} devices cannot be read (members "
                f"{', '.join(map(str, hiding))}): a newer root may have been there, if it is not "
                "that a crash tore it"
            )
        if not self.ring.fresh:
            found.append(
                "no device with a good copy of the journal is there: what was written after the "
                f"checkpoint at position {self.root.stream.replay} may be missing"
            )
        if self.chain.damage:
            found.append(f"the journal is damaged, {self.chain.damage}")
        return found

    def _hiding(self) -> list[int]:
        """Members that count, have a superblock, and may have had a newer one."""
        there = self.members.keys() & self.root.active() - self.headless
        return sorted(index for index in there if self.members[index].hides_a_root)

    def doubts(self) -> list[str]:
        """Why nothing of this is restored as if it were all: the gaps, and what makes no sense."""
        found = self.gaps()
        if lines := self.problems.lines:
            others = len(lines) - 1 + self.problems.more
            more = f" (and {others} more)" if others else ""
            found.append(f"parts of the map make no sense: {lines[0]}{more}")
        if self.torn:
            found.append(WRITTEN_TO)
        return found

    def damaged(self) -> list[str]:
        """What proved wrong so far, device by device."""
        return damaged(self.sources, self.members)

    def volume(self, name: str) -> Volume:
        """The volume named VOLUME or POOL/VOLUME. Raises UserError if there is none, or it
        cannot be read."""
        volume = self.catalog.volumes.get(name) or self.catalog.volumes.get(self._bare(name))
        if volume is None:
            names = plain(", ".join(sorted(self.catalog.volumes)[:20])) or "none"
            raise UserError(f"there is no volume {name!r} (there are: {names})")
        if reason := objection(self.catalog, volume):
            raise UserError(f"volume {name!r} cannot be restored: {reason}")
        return volume

    def _bare(self, path: str) -> str:
        """VOLUME of POOL/VOLUME. Raises UserError if these are the devices of another pool."""
        pool, slash, name = path.partition("/")
        if slash and pool != self.root.name:
            here = plain(self.root.name)
            raise UserError(f"these devices hold pool {here}, not {pool!r}: write {here}/VOLUME")
        return name if slash else path

    def content(self, volume: Volume) -> Content:
        """The volume's map and bytes."""
        changes = self.changes.get(volume.layer, Changes())
        blocks = volume.size // BLOCK
        return Content(volume.layer, blocks, self.checkpoint, changes, self.stripes, self.ring)

    async def examine(
        self, volume: Volume, progress: Progress | None = None, *, verify: bool = False
    ) -> Finding:
        """What there is of a volume: by its map and the devices that are there, or, to `verify`, by
        reading all of it."""
        finding = Finding(volume, objection(self.catalog, volume), verified=verify)
        if finding.objection:
            return finding
        content = self.content(volume)
        async for part in content.parts():
            count(finding, part)
            lost = content.lost(part)
            if verify and part.locations is not None:
                _, lost = await content.read(part)
            finding.lost.add_blocks(part.first, lost)
            if progress is not None:
                progress(part.first + part.count, content.blocks)
        return finding

    async def changed(self) -> bool:
        """Whether somebody has written to the pool since it was opened."""
        for source in self.members.values():
            again = Source(source.url, source.backend)
            if not source.hangs:
                await find_superblocks(again)
            source.hangs = source.hangs or again.hangs
            newest = [block.digest for block in again.superblocks[:1]]
            if newest and newest != [block.digest for block in source.superblocks[:1]]:
                self.torn = True
        return self.torn


def count(finding: Finding, part: Part) -> None:
    """Add a part to what is mapped."""
    if part.locations is not None:
        tags = np.bincount(part.tags.astype(np.int64), minlength=4)
        finding.data += int(tags[1] + tags[2])
        finding.zeros += int(tags[3])


async def assemble(
    sources: list[Source], generation: int | None = None, digest: str | None = None
) -> Remains:
    """Read all but the leaves and the data. Raises UserError if there is nothing to go on."""
    for source in sources:
        if source.newer:
            raise UserError(f"{source.url}: {source.trouble}, or leave this device out")
    found = candidates(sources)
    chosen = choose(found, generation, digest)
    problems = Problems()
    try:
        root = parse_root(chosen.block.body)
    except Unusable as error:
        raise unusable(chosen, str(error), found) from None
    members = attach(root, sources)
    catalog = Catalog(problems)
    stripes = Stripes(root, chosen.block.head.pool, members)
    checkpoint = Checkpoint(stripes, catalog, problems)
    try:
        headless = await recognise(root, stripes, sources, members)
        await checkpoint.load(root)
        headless |= await recognise(root, stripes, sources, members)
    except Unusable as error:
        missing = [one.url for one in absent(root, members)]
        reason = "; ".join([f"its checkpoint is lost: {error}", *damaged(sources, members)])
        raise unusable(chosen, reason, found, missing) from None
    ring = Ring(root.stream, fresh_members(root, chosen, members), members)
    follower = Follower(ring, root.stream, catalog)
    chain = await follower.follow()
    return Remains(
        sources, found, chosen, root, members, catalog, problems, checkpoint, stripes, ring, chain,
        follower.changes, headless,
    )  # fmt: skip


def attach(root: Root, sources: Sequence[Source]) -> dict[int, Source]:
    """Which source is which member, by uuid; of copies of one device the newest is used."""
    by_uuid = {member.uuid: member.index for member in root.members.values()}
    found: dict[int, Source] = {}
    for source in sorted(sources, key=_newest, reverse=True):
        if not source.superblocks:
            continue
        index = by_uuid.get(source.superblocks[0].head.device)
        if index is None:
            source.trouble = source.trouble or "it is no member of the pool as of that root"
        elif index in found:
            source.trouble = f"it is a copy of {found[index].url}, or was named twice"
        else:
            found[index] = source
    return found


async def recognise(
    root: Root, stripes: Stripes, sources: Sequence[Source], members: dict[int, Source]
) -> set[int]:
    """Find out which members devices without a superblock are, by stripes that they have where the
    table says. Adds them to `members`; their journal is believed only as far as the chain is."""
    found = set()
    for source in sources:
        if source.superblocks or source.backend is None or source in members.values():
            continue
        for member in absent(root, members):
            shards = stripes.some_on(member.index, _SAMPLE)
            if any([await stripes.has(source, row, number) for row, number in shards]):
                stripes.adopt(member.index, source)
                members[member.index] = source
                source.trouble = "no superblock is left on it, it is known by its stripes"
                found.add(member.index)
                break
    return found


def absent(root: Root, there: dict[int, Source]) -> list[Member]:
    """Members that count and are not there."""
    return [member for i, member in root.members.items() if member.active and i not in there]


def damaged(sources: Sequence[Source], members: dict[int, Source]) -> list[str]:
    """Which devices proved wrong, where and how often, a line for each."""
    index = {source: number for number, source in members.items()}
    return [
        f"device {index.get(source, 'unknown')} at {plain(source.url)} has {words}"
        for source in sources
        if (words := in_words(source.damage.counts()))
    ]


def _newest(source: Source) -> int:
    return source.superblocks[0].head.generation if source.superblocks else -1


def fresh_members(root: Root, chosen: Candidate, members: dict[int, Source]) -> list[int]:
    """Members whose journal has all that was synced: those that carry the root, if it says so."""
    behind = {replica.member for replica in root.stream.replicas if replica.behind}
    return [
        index
        for index, source in members.items()
        if source in chosen.on and root.members[index].active and index not in behind
    ]
