"""Encoding of replies of the transmission phase. Pure: no socket, no clock.

A connection has one of three ways to reply. *Simple*: a header with an error, behind it the data of
a read. *Structured*: reads, block status and errors are chunks; a command without content that
succeeded still gets a simple reply, as "Structured reply chunk message" allows. *Extended*: chunks
with 64-bit lengths for everything.

The hot path packs `DONE`, `DATA` and `EXTENDED_DATA` itself; all else is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from nbd_server.constants import (
    CMD_READ,
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)

_SIMPLE = Struct(">IIQ")
#: magic, flags, type, cookie, length
_CHUNK = Struct(">IHHQI")
#: magic, flags, type, cookie, offset of the request, length
_EXTENDED_CHUNK = Struct(">IHHQQQ")
#: A simple reply without error: `DONE_HEAD` (magic and error), cookie.
DONE = Struct(">QQ")
DONE_HEAD = SIMPLE_REPLY_MAGIC << 32
#: What precedes the data of a structured read: `DATA_HEAD` (magic, flags and type), cookie,
#: length + 8, offset.
DATA = Struct(">QQIQ")
DATA_HEAD = STRUCTURED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | REPLY_TYPE_OFFSET_DATA
#: The same with extended headers: head, cookie, offset of the request, length + 8, offset.
EXTENDED_DATA = Struct(">QQQQQ")
EXTENDED_DATA_HEAD = EXTENDED_REPLY_MAGIC << 32 | REPLY_FLAG_DONE << 16 | REPLY_TYPE_OFFSET_DATA
_HOLE = Struct(">QI")
_ERROR = Struct(">IH")
_OFFSET = Struct(">Q")
_CONTEXT = Struct(">I")
_CONTEXT_COUNT = Struct(">II")
#: An error text is cut here, so that a batch of errors has a known size.
MAX_ERROR_TEXT = 200
#: No reply without content is longer than this.
MAX_SHORT_REPLY = _EXTENDED_CHUNK.size + _ERROR.size + MAX_ERROR_TEXT + _OFFSET.size
#: A hole shorter than this is sent as zeros: it must have room for the header of a chunk of its own
#: and for that of the data behind it.
MIN_HOLE = 512


@dataclass(frozen=True, slots=True)
class Framing:
    """How a connection replies. Offsets are those of the request that is answered."""

    structured: bool
    extended: bool = False

    @property
    def read_size(self) -> int:
        """Bytes that precede the data of a read."""
        if self.extended:
            return EXTENDED_DATA.size
        return DATA.size if self.structured else DONE.size

    def pack_data(
        self, out: memoryview, at: int, cookie: int, offset: int, where: int, length: int,
        *, done: bool,
    ) -> None:  # fmt: skip
        """What precedes `length` bytes of a read, at least one, that lie at `where`."""
        flag = REPLY_FLAG_DONE << 16
        if self.extended:
            head = EXTENDED_DATA_HEAD if done else EXTENDED_DATA_HEAD & ~flag
            EXTENDED_DATA.pack_into(out, at, head, cookie, offset, length + 8, where)
        elif self.structured:
            head = DATA_HEAD if done else DATA_HEAD & ~flag
            DATA.pack_into(out, at, head, cookie, length + 8, where)
        else:
            DONE.pack_into(out, at, DONE_HEAD, cookie)

    def done(self, cookie: int, offset: int) -> bytes:
        """A command without content has succeeded."""
        if self.extended:
            return self._chunk(REPLY_TYPE_NONE, cookie, offset, b"")
        return DONE.pack(DONE_HEAD, cookie)

    def empty(self, cookie: int, kind: int, offset: int) -> bytes:
        """A request of length zero has succeeded; an OFFSET_DATA chunk may not be empty."""
        if self.structured and kind == CMD_READ:
            return self._chunk(REPLY_TYPE_NONE, cookie, offset, b"")
        return self.done(cookie, offset)

    def failed(
        self, cookie: int, offset: int, code: int, text: str, where: int | None = None
    ) -> bytes:
        """A command was refused or failed with the NBD error `code`, at `where` if that is
        known."""
        if not self.structured:
            return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, code, cookie)
        message = text.encode()[:MAX_ERROR_TEXT]
        message = message.decode(errors="ignore").encode()
        body = _ERROR.pack(code, len(message)) + message
        if where is None:
            return self._chunk(REPLY_TYPE_ERROR, cookie, offset, body)
        return self._chunk(REPLY_TYPE_ERROR_OFFSET, cookie, offset, body + _OFFSET.pack(where))

    def hole(self, cookie: int, offset: int, where: int, length: int, *, done: bool) -> bytes:
        """`length` bytes of a read, at `where`, are zeros."""
        return self._chunk(
            REPLY_TYPE_OFFSET_HOLE, cookie, offset, _HOLE.pack(where, length), done=done
        )

    def status(
        self, cookie: int, offset: int, context: int, extents: Sequence[tuple[int, int]],
        *, done: bool,
    ) -> bytes:  # fmt: skip
        """The answer of one metadata context: pairs (length in bytes, flags), at least one."""
        numbers = [number for extent in extents for number in extent]
        if self.extended:
            head = _CONTEXT_COUNT.pack(context, len(extents))
            body = head + Struct(f">{len(numbers)}Q").pack(*numbers)
            return self._chunk(REPLY_TYPE_BLOCK_STATUS_EXT, cookie, offset, body, done=done)
        body = _CONTEXT.pack(context) + Struct(f">{len(numbers)}I").pack(*numbers)
        return self._chunk(REPLY_TYPE_BLOCK_STATUS, cookie, offset, body, done=done)

    def _chunk(
        self, kind: int, cookie: int, offset: int, body: bytes, *, done: bool = True
    ) -> bytes:
        flags = REPLY_FLAG_DONE if done else 0
        if self.extended:
            header = _EXTENDED_CHUNK.pack(
                EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(body)
            )
        else:
            header = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body))
        return header + body


def pack_sparse(
    framing: Framing, out: memoryview, start: int, cookie: int, offset: int, length: int,
    holes: Sequence[tuple[int, int]],
) -> int:  # fmt: skip
    """Turn a read of `length` bytes into chunks, some of them holes; returns their end in `out`.

    The data lie at `start + read_size`; `holes` are (first byte, bytes) of them in order, of at
    least `MIN_HOLE` bytes each. What is behind a hole moves forward."""
    header = framing.read_size
    data = start + header
    at, end = 0, start
    for first, size in (*holes, (length, 0)):
        if at < first:
            done = first == length
            moved = end + header
            if moved != data + at:
                out[moved : moved + first - at] = out[data + at : data + first]
            framing.pack_data(out, end, cookie, offset, offset + at, first - at, done=done)
            end = moved + first - at
        if size:
            chunk = framing.hole(cookie, offset, offset + first, size, done=first + size == length)
            out[end : end + len(chunk)] = chunk
            end += len(chunk)
        at = first + size
    return end
