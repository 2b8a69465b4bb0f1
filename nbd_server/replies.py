"""Encoding of replies of the transmission phase. Pure: no socket, no clock.

Without structured replies everything is a simple reply. With them reads and errors are chunks, and
a command without content that succeeded still gets a simple reply, as "Structured reply chunk
message" allows. One chunk answers one read and has DONE set.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from nbd_server.constants import (
    CMD_READ,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)

_SIMPLE = Struct(">IIQ")
_CHUNK = Struct(">IHHQI")
#: A simple reply without error: `DONE_HEAD` (magic and error), cookie.
DONE = Struct(">QQ")
DONE_HEAD = SIMPLE_REPLY_MAGIC << 32
#: What precedes the data of a structured read: `DATA_HEAD` (magic, flags and type), cookie,
#: length + 8, offset.
DATA = Struct(">QQIQ")
DATA_HEAD = STRUCTURED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | REPLY_TYPE_OFFSET_DATA
_ERROR = Struct(">IH")
_CONTEXT = Struct(">I")
#: An error text is cut here, so that a batch of errors has a known size.
MAX_ERROR_TEXT = 200
#: No reply without content is longer than this.
MAX_SHORT_REPLY = _CHUNK.size + _ERROR.size + MAX_ERROR_TEXT


def done(cookie: int) -> bytes:
    """A command other than READ and BLOCK_STATUS has succeeded."""
    return DONE.pack(DONE_HEAD, cookie)


def failed(cookie: int, code: int, text: str, *, structured: bool) -> bytes:
    """A command was refused or failed with the NBD error `code`."""
    if not structured:
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, code, cookie)
    message = text.encode()[:MAX_ERROR_TEXT]
    message = message.decode(errors="ignore").encode()
    body = _ERROR.pack(code, len(message)) + message
    return _chunk(REPLY_TYPE_ERROR, cookie, body)


def empty(cookie: int, kind: int, *, structured: bool) -> bytes:
    """A request of length zero has succeeded; an OFFSET_DATA chunk may not be empty."""
    if structured and kind == CMD_READ:
        return _chunk(REPLY_TYPE_NONE, cookie, b"")
    return done(cookie)


def read_header(cookie: int, offset: int, length: int, *, structured: bool) -> bytes:
    """What precedes the data of a successful read of `length` bytes, at least one."""
    if structured:
        return DATA.pack(DATA_HEAD, cookie, length + 8, offset)
    return DONE.pack(DONE_HEAD, cookie)


def block_status(cookie: int, context: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """The answer of one metadata context: pairs (length in bytes, flags), at least one."""
    numbers = [number for extent in extents for number in extent]
    body = _CONTEXT.pack(context) + Struct(f">{len(numbers)}I").pack(*numbers)
    return _chunk(REPLY_TYPE_BLOCK_STATUS, cookie, body)


def _chunk(kind: int, cookie: int, body: bytes) -> bytes:
    header = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, kind, cookie, len(body))
    return header + body
