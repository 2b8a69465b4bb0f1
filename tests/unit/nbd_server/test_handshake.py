"""Negotiation: every case is fed whole, byte by byte, and with the next bytes behind it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from nbd_server.errors import ProtocolError
from nbd_server.export import Export
from nbd_server.handshake import GREETING, Agreement, Exports, Handshake
from nbd_server.limits import Limits
from nbd_server.replies import Framing
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire

SIZE = 1 << 20
BASE = "base:allocation"
WRITABLE, READ_ONLY = 0b1101_0110_1101, 0b101_0000_1111
DF, STATUS_PAYLOAD = 1 << 7, 1 << 12
BLOCK_SIZES = struct.pack(">HIII", 3, 1, 4096, 32 << 20)


def exports() -> Exports:
    volumes: dict[str, Export] = {
        "vol": MemoryExport("vol", SIZE, description="a volume"),
        "ro": MemoryExport("ro", 4096, read_only=True),
        "dead": MemoryExport("dead", 4096),
    }
    volumes["dead"].closed = True  # type: ignore[misc]
    volumes[""] = volumes["vol"]
    return Exports(volumes.get, lambda: [volumes["vol"], volumes["ro"]])


@dataclass
class Result:
    replies: bytes
    rest: bytes
    outcome: Agreement | None
    aborted: bool
    violation: str | None = None


def negotiate(stream: bytes, step: int, limits: Limits | None = None) -> Result:
    """Feed a handshake as a session does, `step` bytes at a time."""
    handshake = Handshake(exports(), limits or Limits())
    replies, kept, violation = b"", b"", None
    try:
        for at in range(0, len(stream), step):
            kept += stream[at : at + step]
            while kept and handshake.outcome is None and not handshake.aborted:
                used = handshake.receive(memoryview(kept))
                replies += handshake.replies()
                kept = kept[used:]
                if not used:
                    break
    except ProtocolError as error:
        violation = str(error)
    return Result(replies, kept, handshake.outcome, handshake.aborted, violation)


def three_ways(stream: bytes, behind: bytes, limits: Limits | None = None) -> Result:
    """The same result whole, byte by byte and with `behind` following; returns it."""
    whole = negotiate(stream, max(len(stream), 1), limits)
    bytewise = negotiate(stream, 1, limits)
    followed = negotiate(stream + behind, len(stream + behind), limits)
    for other in (bytewise, followed):
        assert other.replies == whole.replies
        assert other.aborted == whole.aborted
        assert bool(other.violation) == bool(whole.violation)
        assert (other.outcome is None) == (whole.outcome is None)
    if whole.violation is None:
        assert whole.rest == bytewise.rest == b""
        assert followed.rest == behind
    return whole


def ask(*options: bytes, flags: int = 3, limits: Limits | None = None) -> list[tuple[int, int]]:
    """(option, reply type) of all replies; the connection has to survive it."""
    result = three_ways(wire.client_flags(flags) + b"".join(options), b"IHAVE", limits)
    assert result.violation is None
    return [reply[:2] for reply in wire.option_replies(result.replies)]


def test_greeting() -> None:
    assert GREETING == b"NBDMAGICIHAVEOPT\x00\x03"


O = wire.option  # noqa: E741

SURVIVED = {
    "unknown option": ([O(77, b"data")], [(77, wire.UNSUP)]),
    "unknown option, option after it": (
        [O(4, b"x"), O(wire.LIST)],
        [(4, wire.UNSUP), (3, wire.SERVER), (3, wire.SERVER), (3, wire.ACK)],
    ),
    "starttls is not offered": ([O(wire.STARTTLS)], [(5, wire.UNSUP)]),
    "extended headers": ([O(wire.EXTENDED), O(11)], [(11, wire.ACK), (11, wire.ACK)]),
    "extended headers with data": ([O(wire.EXTENDED, b"x")], [(11, wire.INVALID)]),
    "extended headers include structured replies": (
        [O(8), O(11), O(8), O(10, wire.meta("vol", BASE))],
        [(8, wire.ACK), (11, wire.ACK), (8, wire.EXT_REQD), (10, wire.META), (10, wire.ACK)],
    ),
    "list with data": ([O(wire.LIST, b"x")], [(3, wire.INVALID)]),
    "structured replies twice": ([O(8), O(8)], [(8, wire.ACK), (8, wire.ACK)]),
    "structured replies with data": ([O(8, b"x")], [(8, wire.INVALID)]),
    "info of an unknown export": ([O(6, wire.info("no"))], [(6, wire.UNKNOWN)]),
    "go to an unknown export": ([O(7, wire.info("no"))], [(7, wire.UNKNOWN)]),
    "go to a deleted export": ([O(7, wire.info("dead"))], [(7, wire.UNKNOWN)]),
    "info without anything": ([O(6)], [(6, wire.INVALID)]),
    "info with a name past the end": ([O(6, b"\0\0\0\x09vol\0\0")], [(6, wire.INVALID)]),
    "info with a count past the end": (
        [O(6, wire.string("vol") + b"\0\2\0\1")],
        [(6, wire.INVALID)],
    ),
    "info with bytes left over": ([O(6, wire.info("vol") + b"x")], [(6, wire.INVALID)]),
    "info with a name not UTF-8": ([O(6, b"\0\0\0\1\xff\0\0")], [(6, wire.INVALID)]),
    "info with a NUL": ([O(6, wire.info("v\0l"))], [(6, wire.INVALID)]),
    "info with a long name": ([O(6, wire.info("v" * 4097))], [(6, wire.INVALID)]),
    "info with unknown requests": (
        [O(6, wire.info("vol", 99, 3))],
        [(6, wire.REP_INFO), (6, wire.REP_INFO), (6, wire.ACK)],
    ),
    "contexts without structured replies": ([O(10, wire.meta("vol", BASE))], [(10, wire.INVALID)]),
    "list contexts": ([O(9, wire.meta("vol"))], [(9, wire.META), (9, wire.META), (9, wire.ACK)]),
    "list contexts by wildcard": (
        [O(9, wire.meta("vol", "base:"))],
        [(9, wire.META), (9, wire.ACK)],
    ),
    "list contexts by name": (
        [O(9, wire.meta("vol", "x:", BASE))],
        [(9, wire.META), (9, wire.ACK)],
    ),
    "list unknown contexts": ([O(9, wire.meta("vol", "qemu:", "base:x"))], [(9, wire.ACK)]),
    "list contexts of an unknown export": ([O(9, wire.meta("no"))], [(9, wire.UNKNOWN)]),
    "list contexts of a namespace": (
        [O(9, wire.meta("vol", "test:"))],
        [(9, wire.META), (9, wire.ACK)],
    ),
    "set several contexts": (
        [O(8), O(10, wire.meta("vol", "test:written", "no:thing", BASE))],
        [(8, 1), (10, wire.META), (10, wire.META), (10, 1)],
    ),
    "set contexts": ([O(8), O(10, wire.meta("vol", BASE))], [(8, 1), (10, wire.META), (10, 1)]),
    "set by wildcard selects nothing": (
        [O(8), O(10, wire.meta("vol", "base:"))],
        [(8, 1), (10, 1)],
    ),
    "set of nothing": ([O(8), O(10, wire.meta("vol"))], [(8, 1), (10, 1)]),
    "set on an unknown export": (
        [O(8), O(10, wire.meta("no", BASE))],
        [(8, 1), (10, wire.UNKNOWN)],
    ),
    "a query past the end": (
        [O(8), O(10, wire.string("vol") + b"\0\0\0\1\0\0\0\xff")],
        [(8, 1), (10, wire.INVALID)],
    ),
    "a count of queries that lies": (
        [O(9, wire.string("vol") + b"\xff\xff\xff\xff")],
        [(9, wire.INVALID)],
    ),
}


@pytest.mark.parametrize("case", SURVIVED)
def test_is_answered_and_the_negotiation_goes_on(case: str) -> None:
    options, replies = SURVIVED[case]
    assert ask(*options) == replies


def test_a_client_without_fixed_newstyle_may_only_name_an_export() -> None:
    assert ask(O(wire.LIST), flags=0) == [(3, wire.INVALID)]


def test_oversized_options_are_skipped_unseen() -> None:
    limits = Limits(option_bytes=16, skipped_option_bytes=100)
    big = [O(wire.INFO, bytes(17)), O(99, bytes(100)), O(wire.STRUCTURED)]
    assert ask(*big, limits=limits) == [(6, wire.TOO_BIG), (99, wire.UNSUP), (8, wire.ACK)]


VIOLATIONS = {
    "unknown client flags": wire.client_flags(4),
    "wrong option magic": wire.client_flags() + b"IHAVEOPX" + bytes(8),
    "a request instead of an option": wire.client_flags() + wire.request(wire.READ, length=1),
    "an option that is too long to skip": wire.client_flags() + O(6, length=(64 << 20) + 1),
    "an unknown option of 4 GiB": wire.client_flags() + O(99, length=0xFFFFFFFF),
    "EXPORT_NAME after extended headers": wire.client_flags() + O(11) + O(1, b"vol"),
    "EXPORT_NAME of an unknown export": wire.client_flags() + O(1, b"no"),
    "EXPORT_NAME of a deleted export": wire.client_flags() + O(1, b"dead"),
    "EXPORT_NAME that is too long": wire.client_flags() + O(1, b"v" * 4097),
    "EXPORT_NAME that is not UTF-8": wire.client_flags() + O(1, b"\xff"),
    "EXPORT_NAME longer than any option": wire.client_flags() + O(1, length=65537),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_closes_without_a_reply(case: str) -> None:
    result = three_ways(VIOLATIONS[case], b"more")
    assert result.violation is not None
    assert wire.option_replies(result.replies) in ([], [(11, wire.ACK, b"")])


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    result = three_ways(wire.client_flags() + O(wire.ABORT), b"ignored")
    assert result.aborted
    assert wire.option_replies(result.replies) == [(wire.ABORT, wire.ACK, b"")]
    assert negotiate(wire.client_flags() + O(wire.ABORT, bytes(99)), 9).aborted


def test_list_names_and_describes() -> None:
    result = three_ways(wire.client_flags() + O(wire.LIST), b"")
    assert [reply[2] for reply in wire.option_replies(result.replies)] == [
        wire.string("vol") + b"a volume",
        wire.string("ro"),
        b"",
    ]


@pytest.mark.parametrize(
    ("name", "structured", "flags"),
    [("vol", False, WRITABLE), ("", True, WRITABLE | DF), ("ro", False, READ_ONLY)],
)
def test_go(name: str, structured: bool, flags: int) -> None:
    options = O(wire.STRUCTURED) if structured else b""
    stream = wire.client_flags() + options + O(wire.GO, wire.info(name))
    result = three_ways(stream, wire.request(wire.READ, length=1))
    assert result.outcome is not None
    assert result.outcome.framing == Framing(structured)
    assert not result.outcome.contexts
    size = result.outcome.export.size
    assert wire.option_replies(result.replies)[-3:] == [
        (wire.GO, wire.REP_INFO, struct.pack(">HQH", 0, size, flags)),
        (wire.GO, wire.REP_INFO, BLOCK_SIZES),
        (wire.GO, wire.ACK, b""),
    ]


def test_info_has_name_and_description_where_asked_and_changes_nothing() -> None:
    result = three_ways(wire.client_flags() + O(wire.INFO, wire.info("", 1, 2)), b"")
    bodies = [reply[2] for reply in wire.option_replies(result.replies)]
    assert bodies[2:] == [b"\0\1vol", b"\0\2a volume", b""]
    assert result.outcome is None


@pytest.mark.parametrize(("flags", "padding"), [(wire.FIXED, 124), (3, 0), (0, 124)])
def test_export_name(flags: int, padding: int) -> None:
    result = three_ways(wire.client_flags(flags) + O(wire.EXPORT_NAME, b"vol"), b"\x25\x60")
    assert result.outcome is not None
    assert result.replies == struct.pack(">QH", SIZE, WRITABLE) + bytes(padding)


def contexts(*options: bytes) -> bool:
    """Whether base:allocation is in force after structured replies, `options` and GO to vol."""
    stream = wire.client_flags() + O(8) + b"".join(options) + O(7, wire.info("vol"))
    outcome = three_ways(stream, b"").outcome
    assert outcome is not None
    assert set(outcome.contexts.values()) <= {BASE}
    return bool(outcome.contexts)


def test_contexts_hold_for_the_export_they_were_set_for() -> None:
    chosen = O(10, wire.meta("vol", BASE))
    assert contexts(chosen)
    assert contexts(O(10, wire.meta("vol", BASE)), O(6, wire.info("ro")))
    assert not contexts(O(10, wire.meta("ro", BASE)))
    assert not contexts()


@pytest.mark.parametrize(
    "later",
    [
        O(10, wire.meta("vol")),
        O(10, wire.meta("no", BASE)),
        O(10, b"\0\0"),
        O(10, bytes(65537)),
    ],
    ids=["none", "unknown export", "malformed", "too big"],
)
def test_a_later_set_drops_earlier_contexts_also_when_it_fails(later: bytes) -> None:
    assert not contexts(O(10, wire.meta("vol", BASE)), later)


def test_structured_replies_hold_for_export_name_too() -> None:
    stream = wire.client_flags() + O(8) + O(10, wire.meta("vol", BASE)) + O(1, b"vol")
    outcome = three_ways(stream, b"").outcome
    assert outcome is not None
    assert outcome.framing.structured
    assert outcome.contexts == {1: BASE}


def test_a_failed_go_leaves_the_negotiation_open() -> None:
    stream = wire.client_flags() + O(7, wire.info("no")) + O(7, wire.info("vol"))
    assert three_ways(stream, b"").outcome is not None


def test_extended_headers_and_all_contexts() -> None:
    stream = (
        wire.client_flags()
        + O(11)
        + O(10, wire.meta("vol", BASE, "test:written"))
        + O(7, wire.info("vol"))
    )
    result = three_ways(stream, wire.extended(wire.FLUSH))
    assert result.outcome is not None
    assert result.outcome.framing == Framing(structured=True, extended=True)
    assert result.outcome.contexts == {1: BASE, 2: "test:written"}
    replies = wire.option_replies(result.replies)
    flags = WRITABLE | DF | STATUS_PAYLOAD
    assert (wire.GO, wire.REP_INFO, struct.pack(">HQH", 0, SIZE, flags)) in replies


@pytest.mark.parametrize(("asked", "alignment"), [((3,), 512), ((), 1)])
def test_who_asks_for_block_sizes_has_to_keep_to_them(
    asked: tuple[int, ...], alignment: int
) -> None:
    stream = wire.client_flags() + O(7, wire.info("vol", *asked))
    result = three_ways(stream, b"", Limits(minimum_block=512))
    assert result.outcome is not None
    assert result.outcome.alignment == alignment
    sizes = struct.pack(">HIII", 3, 512, 4096, 32 << 20)
    assert (wire.GO, wire.REP_INFO, sizes) in wire.option_replies(result.replies)
