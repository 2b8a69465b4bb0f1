"""Parsing and checking of requests of the transmission phase. Pure: bytes in, batches out.

`parse` is a function of the bytes alone: it keeps no state, so what it left unconsumed is given
again with more bytes behind it. Invariants: a batch has at most `batch_requests` requests and its
READs ask for at most `batch_bytes`, except for one longer READ, which then ends the batch; nothing
behind DISC is looked at. Called by `session`, once a turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from nbd_server.constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    EPERM,
    REQUEST_MAGIC,
)
from nbd_server.limits import Limits

#: magic, flags, type, cookie, offset, length
HEADER = Struct(">IHHQQI")
#: A WRITE up to this long waits in the receive buffer; a longer one gets a buffer of its own.
INLINE_PAYLOAD = 64 << 10

#: flags, type, cookie, offset, length, position of the payload. A tuple, because one is made for
#: every request: anything with a name costs several times as much.
Request = tuple[int, int, int, int, int, int]

_FLAGS = {
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}
_CHANGING = {CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES}
#: A command that needs space says so when there is none behind the end.
_PAST_THE_END = {CMD_WRITE: ENOSPC, CMD_WRITE_ZEROES: ENOSPC}


@dataclass(slots=True)
class Batch:
    """What `parse` found at the beginning of some bytes."""

    requests: list[Request]
    #: Bytes that belong to `requests`, and to the header of `partial`.
    consumed: int = 0
    #: A bound ended the batch: there may be more requests in the bytes left.
    bounded: bool = False
    #: A WRITE whose payload, longer than INLINE_PAYLOAD, has not arrived as a whole.
    partial: Request | None = None
    #: DISC was received.
    disconnect: bool = False
    #: Why the connection must be closed once the batch is answered, or None.
    violation: str | None = None


def parse(data: memoryview, limits: Limits) -> Batch:
    """The requests at the start of `data`; payload positions are indexes into it."""
    unpack, header_size = HEADER.unpack_from, HEADER.size
    requests: list[Request] = []
    batch = Batch(requests)
    end, at, read_bytes = len(data), 0, 0
    room, read_room, longest = limits.batch_requests, limits.batch_bytes, limits.payload_bytes
    while at + header_size <= end:
        magic, flags, kind, cookie, offset, length = unpack(data, at)
        payload = following = at + header_size
        if kind == CMD_READ:
            read_bytes += length
        elif kind == CMD_WRITE:
            following = payload + length if length <= longest else end + 1
        if len(requests) == room or (requests and read_bytes > read_room):
            batch.bounded = True
            break
        if magic != REQUEST_MAGIC or following > end or kind == CMD_DISC:
            at = _interrupted(batch, data, at, limits)
            break
        requests.append((flags, kind, cookie, offset, length, payload))
        at = following
    batch.consumed = at
    return batch


def _interrupted(batch: Batch, data: memoryview, at: int, limits: Limits) -> int:
    """What stands at `data[at:]` is no complete request; returns up to where it is consumed."""
    magic, flags, kind, cookie, offset, length = HEADER.unpack_from(data, at)
    if magic != REQUEST_MAGIC:
        batch.violation = f"request magic {magic:#x} is not {REQUEST_MAGIC:#x}"
    elif kind == CMD_DISC:
        batch.disconnect = True
    elif length > limits.payload_bytes:
        batch.violation = f"WRITE of {length} bytes, more than {limits.payload_bytes}"
    elif length > INLINE_PAYLOAD:
        batch.partial = (flags, kind, cookie, offset, length, 0)
    else:
        return at
    return at + HEADER.size


@dataclass(frozen=True, slots=True)
class Rules:
    """What was agreed in the handshake, as far as requests are judged by it."""

    read_only: bool
    structured: bool
    contexts: bool
    payload_bytes: int


def refusal(request: Request, size: int, rules: Rules) -> tuple[int, str] | None:
    """The NBD error and text with which to refuse a request for an export of `size` bytes.

    None if it is acceptable. The order is: command, flags, permission, range.
    """
    flags, kind, _, offset, length, _ = request
    allowed = _FLAGS.get(kind)
    if allowed is None:
        return EINVAL, f"command {kind} is not supported"
    if not rules.structured:
        allowed &= ~CMD_FLAG_DF
    if flags & ~allowed:
        return EINVAL, f"flags {flags:#x} are not valid for command {kind}"
    if kind == CMD_BLOCK_STATUS and not rules.contexts:
        return EINVAL, "no metadata context was negotiated"
    if kind in _CHANGING and rules.read_only:
        return EPERM, "the export is read-only"
    if kind == CMD_FLUSH:
        return None
    return _range_refusal(kind, offset, length, size, rules.payload_bytes)


def _range_refusal(
    kind: int, offset: int, length: int, size: int, payload_bytes: int
) -> tuple[int, str] | None:
    if offset + length > size:
        return _PAST_THE_END.get(kind, EINVAL), f"{offset}+{length} is past the end at {size}"
    if kind == CMD_READ and length > payload_bytes:
        return EINVAL, f"reads may ask for {payload_bytes} bytes, not {length}"
    if kind == CMD_BLOCK_STATUS and not length:
        return EINVAL, "block status of zero bytes"
    return None
