"""What the command says: as data for --json, and in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stripewell.output import table
from stripewell.recover.choice import plain_list
from stripewell.recover.damage import Damage
from stripewell.recover.ranges import Ranges
from stripewell.recover.remains import Finding, Remains
from stripewell.recover.root import BLOCK, Member
from stripewell.recover.sources import Source
from stripewell.recover.values import plain
from stripewell.sizes import format_size

#: Ranges that a line names.
_NAMED = 5


#: In words, whether a volume would be restored.
RESTORABLE = {
    "yes": "yes",
    "unverified": "unless damaged",
    "incomplete": "with --incomplete",
    "no": "no",
}


def pool_data(remains: Remains, findings: Sequence[Finding] = ()) -> dict[str, Any]:
    """The pool: which root, which devices, how far the journal goes, and whether that is all, by
    what was found of its volumes."""
    root, chain = remains.root, remains.chain
    gaps = shortfalls(remains, findings)
    return {
        "name": root.name,
        "uuid": remains.chosen.block.head.pool,
        "data": root.data,
        "parity": root.parity,
        "complete": not gaps,
        "gaps": gaps,
        "root": {
            "generation": root.generation,
            "digest": remains.chosen.block.digest,
            "devices": remains.carriers(),
            "active": len(root.active()),
        },
        "others": [
            {
                "generation": other.generation,
                "digest": other.block.digest,
                "devices": [source.url for source in other.on],
            }
            for other in remains.candidates
            if other is not remains.chosen
        ],
        "devices": _devices(remains),
        "journal": {
            "checkpoint": root.stream.replay,
            "durable": chain.durable,
            "end": chain.end,
            "copies": len(remains.ring.copies),
            "replicas": len(root.stream.replicas),
            "records": chain.records,
            "unflushed_records": len(chain.loose),
            "unflushed_blocks": sum(blocks for _, blocks in chain.loose),
        },
        "damaged": remains.damaged(),
        "problems": remains.problems.lines,
        "more_problems": remains.problems.more,
    }


def _devices(remains: Remains) -> list[dict[str, Any]]:
    index = {source: number for number, source in remains.members.items()}
    named = [_device(remains, source, index.get(source)) for source in remains.sources]
    members = remains.root.members.values()
    return named + [_absent(member) for member in members if member.index not in remains.members]


def _absent(member: Member) -> dict[str, Any]:
    """A member that was not named, or could not be known."""
    return {
        "index": member.index,
        "state": "missing" if member.active else "gone",
        "generation": None,
        "url": member.url,
        "in_use": False,
        "damage": Damage().counts(),
        "why": "last seen there" + ("" if member.active else f", {_expelled(member)}"),
    }


def _device(remains: Remains, source: Source, index: int | None) -> dict[str, Any]:
    member = None if index is None else remains.root.members[index]
    why = source.trouble
    if member is None:
        state = "not used"
    elif not member.active:
        state, why = "gone", why or _expelled(member)
    elif index in remains.headless:
        state = "no root"
    elif source in remains.chosen.on:
        state = "used"
    else:
        state = "old"
    newest = source.superblocks[0].head.generation if source.superblocks else None
    return {
        "index": index,
        "state": state,
        "generation": newest,
        "url": source.url,
        "in_use": source.in_use,
        "damage": source.damage.counts(),
        "why": why,
    }


def _expelled(member: Member) -> str:
    return f"the pool goes on without it: {member.reason or 'it does not say why'}"


def shortfalls(remains: Remains, findings: Sequence[Finding]) -> list[str]:
    """Why this is not all that was ever flushed; nothing if it is, as far as was looked."""
    losses = [
        f"volume {plain(one.volume.name)}: {lost_text(one.lost)}"
        for one in findings
        if one.lost.blocks
    ]
    losses += [
        f"volume {plain(one.volume.name)} cannot be read: {one.objection}"
        for one in findings
        if one.objection
    ]
    return remains.doubts() + ([plain_list(losses, _NAMED)] if losses else [])


def volume_data(remains: Remains, finding: Finding) -> dict[str, Any]:
    """One volume, in bytes; ranges of lost blocks as [offset, length]."""
    lost = finding.lost
    return {
        "name": finding.volume.name,
        "size": finding.volume.size,
        "data_bytes": finding.data * BLOCK,
        "zero_bytes": finding.zeros * BLOCK,
        "restorable": _restorable(remains, finding),
        "why": finding.objection,
        "lost_blocks": lost.blocks,
        "lost": [[first * BLOCK, (end - first) * BLOCK] for first, end in lost.kept],
        "more_lost_ranges": lost.more,
    }


def _restorable(remains: Remains, finding: Finding) -> str:
    """What restoring would come to, by the same tests."""
    if finding.objection or remains.torn:
        return "no"
    if finding.lost.blocks or remains.doubts():
        return "incomplete"
    return "yes" if finding.verified else "unverified"


def result(remains: Remains, findings: Sequence[Finding], what: str = "everything") -> str:
    """Up to which flush it goes, in one line; `what` is what the findings are about."""
    if gaps := shortfalls(remains, findings):
        return f"not complete: {'; '.join(gaps)}"
    text = f"complete: {what} that was ever flushed is here"
    if not all(finding.verified for finding in findings):
        text = "complete, unless what was not read is damaged: --verify reads every block"
    if remains.chain.loose:
        records = counted(len(remains.chain.loose), "record")
        blocks = counted(sum(blocks for _, blocks in remains.chain.loose), "block")
        text += f"; {records} ({blocks}) of it came after the last flush that is known of"
    return text


def pool_text(data: dict[str, Any], line: str, volumes: Sequence[dict[str, Any]]) -> str:
    """The whole report for reading."""
    root, journal = data["root"], data["journal"]
    lines = [
        f"pool      {plain(data['name'])} ({data['uuid']})",
        f"root      generation {root['generation']}, digest {root['digest'][:8]},"
        f" on {root['devices']} of {counted(root['active'], 'active device')}",
        f"journal   {_journal_text(journal)}",
        f"result    {line}",
        "",
        _device_table(data["devices"]),
        "",
        _volume_table(volumes) if volumes else "no volumes",
    ]
    problems = [*data["problems"]]
    if data["more_problems"]:
        problems.append(f"{data['more_problems']} more of that kind")
    problems += [
        f"volume {plain(volume['name'])}: {volume['why']}" for volume in volumes if volume["why"]
    ]
    notes = [f"damage: {line}" for line in data["damaged"]]
    notes += [f"problem: {problem}" for problem in problems]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines)


def _journal_text(journal: dict[str, Any]) -> str:
    if not journal["copies"]:
        return f"from {journal['checkpoint']}: none of {journal['replicas']} copies is here"
    return (
        f"from {journal['checkpoint']} to {journal['end']}, known to be flushed up to"
        f" {journal['durable']}, {counted(journal['records'], 'record')};"
        f" {journal['copies']} of {journal['replicas']} copies here"
    )


def _device_table(devices: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            "-" if one["index"] is None else str(one["index"]),
            one["state"],
            "-" if one["generation"] is None else str(one["generation"]),
            plain(one["url"]) + (f" ({plain(one['why'])})" if one["why"] else ""),
        ]
        for one in devices
    ]
    return table(["DEVICE", "STATE", "GENERATION", "URL"], rows)


def _volume_table(volumes: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            plain(volume["name"]),
            format_size(volume["size"]),
            format_size(volume["data_bytes"]),
            str(volume["lost_blocks"]),
            RESTORABLE[volume["restorable"]],
        ]
        for volume in volumes
    ]
    return table(["VOLUME", "SIZE", "DATA", "LOST BLOCKS", "RESTORABLE"], rows)


def lost_text(lost: Ranges) -> str:
    """How many blocks are lost, and where the first of them are."""
    named = ", ".join(f"{first * BLOCK}-{end * BLOCK - 1}" for first, end in lost.kept[:_NAMED])
    more = len(lost.kept) + lost.more - _NAMED
    tail = f" and {more} more ranges" if more > 0 else ""
    are = "is" if lost.blocks == 1 else "are"
    return f"{counted(lost.blocks, 'block')} of 4 KiB {are} lost (bytes {named}{tail})"


def counted(number: int, what: str) -> str:
    """The number and the word, which ends with an s unless it is one."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
