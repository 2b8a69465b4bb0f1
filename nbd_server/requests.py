"""Parsing and checking of requests of the transmission phase. Pure: bytes in, batches out.

`parse` is a function of the bytes alone: it keeps no state, so what it left unconsumed is given
again with more bytes behind it. Invariants: a batch has at most `batch_requests` requests and its
READs ask for at most `batch_bytes`, except for one longer READ, which then ends the batch; nothing
behind DISC is looked at. With extended headers any request may say by a flag that it has a payload;
one that may not is refused when its payload has been received. Called by `session`, once a turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from nbd_server.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
)
from nbd_server.limits import Limits

#: magic, flags, type, cookie, offset, length
HEADER = Struct(">IHHQQI")
EXTENDED_HEADER = Struct(">IHHQQQ")
#: The payload of a BLOCK_STATUS: effect length, then contexts of four bytes each.
STATUS_LENGTH = Struct(">Q")
#: A payload up to this long waits in the receive buffer; a longer one gets a buffer of its own.
INLINE_PAYLOAD = 64 << 10

#: flags, type, cookie, offset, length, position of the payload. A tuple, because one is made for
#: every request: anything with a name costs several times as much.
Request = tuple[int, int, int, int, int, int]

_FLAGS = {
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
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
    #: A request whose payload, longer than INLINE_PAYLOAD, has not arrived as a whole.
    partial: Request | None = None
    #: DISC was received.
    disconnect: bool = False
    #: Why the connection must be closed once the batch is answered, or None.
    violation: str | None = None


def parse(data: memoryview, limits: Limits, *, extended: bool = False) -> Batch:
    """The requests at the start of `data`; payload positions are indexes into it."""
    header = EXTENDED_HEADER if extended else HEADER
    expected = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
    carries = CMD_FLAG_PAYLOAD_LEN if extended else 0
    unpack, header_size = header.unpack_from, header.size
    requests: list[Request] = []
    batch = Batch(requests)
    end, at, read_bytes = len(data), 0, 0
    room, read_room, longest = limits.batch_requests, limits.batch_bytes, limits.payload_bytes
    while at + header_size <= end:
        magic, flags, kind, cookie, offset, length = unpack(data, at)
        payload = following = at + header_size
        if kind == CMD_WRITE or flags & carries:
            following = payload + length if length <= longest else end + 1
        elif kind == CMD_READ:
            read_bytes += length
        if len(requests) == room or (requests and read_bytes > read_room):
            batch.bounded = True
            break
        if magic != expected or following > end or kind == CMD_DISC:
            at = _interrupted(
                batch, (magic, flags, kind, cookie, offset, length), at, limits, header
            )
            break
        requests.append((flags, kind, cookie, offset, length, payload))
        at = following
    batch.consumed = at
    return batch


def _interrupted(
    batch: Batch, fields: tuple[int, int, int, int, int, int], at: int, limits: Limits,
    header: Struct,
) -> int:  # fmt: skip
    """The header at `at` begins no complete request; returns up to where it is consumed."""
    magic, flags, kind, cookie, offset, length = fields
    expected = EXTENDED_REQUEST_MAGIC if header is EXTENDED_HEADER else REQUEST_MAGIC
    if magic != expected:
        batch.violation = f"request magic {magic:#x} is not {expected:#x}"
    elif kind == CMD_DISC:
        batch.disconnect = True
    elif length > limits.payload_bytes:
        batch.violation = f"a payload of {length} bytes, more than {limits.payload_bytes}"
    elif length > INLINE_PAYLOAD:
        batch.partial = (flags, kind, cookie, offset, length, 0)
    else:
        return at
    return at + header.size


@dataclass(frozen=True, slots=True)
class Rules:
    """What was agreed in the handshake, as far as requests are judged by it."""

    read_only: bool
    structured: bool
    extended: bool
    #: How many metadata contexts were selected.
    contexts: int
    payload_bytes: int
    #: Offsets and lengths are multiples of it: the client has promised that.
    alignment: int = 1


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
    if rules.extended and kind in (CMD_WRITE, CMD_BLOCK_STATUS):
        allowed |= CMD_FLAG_PAYLOAD_LEN
    if flags & ~allowed:
        return EINVAL, f"flags {flags:#x} are not valid for command {kind}"
    if kind == CMD_BLOCK_STATUS and not rules.contexts:
        return EINVAL, "no metadata context was negotiated"
    if kind in _CHANGING and rules.read_only:
        return EPERM, "the export is read-only"
    if kind == CMD_FLUSH:
        return None
    if kind == CMD_BLOCK_STATUS and flags & CMD_FLAG_PAYLOAD_LEN:
        contexts, odd = divmod(length - STATUS_LENGTH.size, 4)
        fits = 0 <= contexts <= rules.contexts and not odd
        return None if fits else (EINVAL, f"a block status payload of {length} bytes")
    return range_refusal(flags, kind, offset, length, size, rules)


def range_refusal(
    flags: int, kind: int, offset: int, length: int, size: int, rules: Rules
) -> tuple[int, str] | None:
    """As `refusal`, for the range alone."""
    if offset + length > size:
        return _PAST_THE_END.get(kind, EINVAL), f"{offset}+{length} is past the end at {size}"
    if kind == CMD_READ and length > rules.payload_bytes:
        code = EOVERFLOW if flags & CMD_FLAG_DF else EINVAL
        return code, f"reads may ask for {rules.payload_bytes} bytes, not {length}"
    if kind == CMD_BLOCK_STATUS and not length:
        return EINVAL, "block status of zero bytes"
    if (offset | length) & rules.alignment - 1:
        return EINVAL, f"{offset}+{length} is not a multiple of the block size {rules.alignment}"
    return None


def status_payload(payload: memoryview) -> tuple[int, tuple[int, ...]]:
    """Effect length and contexts that a BLOCK_STATUS asks for; its size was checked."""
    count = (len(payload) - STATUS_LENGTH.size) // 4
    length: int
    length, *contexts = Struct(f">Q{count}I").unpack(payload)
    return length, tuple(contexts)
