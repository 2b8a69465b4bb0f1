"""Answers requests of one connection from its export. No socket, no task.

`answer` is the hot path: one tight loop over the requests of a batch, the bytes of reads going
straight into the reply buffer behind their headers and those of writes straight from the receive
buffer into the export, with one `commit` for all of them. What would have to wait is handed back
and run by `perform`, which may be cancelled at any await (R8). Called by `session`.
"""

from __future__ import annotations

import asyncio
import logging

from nbd_server import replies
from nbd_server.buffers import BufferPool
from nbd_server.constants import (
    BASE_ALLOCATION_ID,
    CMD_BLOCK_STATUS,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    ESHUTDOWN,
)
from nbd_server.counters import Counters
from nbd_server.errors import wire_error
from nbd_server.handshake import Agreement
from nbd_server.limits import Limits
from nbd_server.requests import Request, Rules, refusal

_log = logging.getLogger(__name__)

#: A reply, and the buffer of the pool that it lies in.
Reply = tuple[memoryview, memoryview | None]


def reply_buffer_size(limits: Limits) -> int:
    """Bytes that the replies of any batch fit in."""
    return limits.batch_bytes + limits.batch_requests * replies.MAX_SHORT_REPLY


def buffer_pool(limits: Limits) -> BufferPool:
    """Buffers for the replies of a batch, and for the payload or the reply of any request."""
    return BufferPool(reply_buffer_size(limits), replies.DATA.size + limits.payload_bytes)


class Transmission:
    """The transmission phase of one connection, as far as it is not about sockets."""

    def __init__(
        self, agreement: Agreement, limits: Limits, counters: Counters, pool: BufferPool
    ) -> None:
        self.export = agreement.export
        self._structured = agreement.structured
        self._limits = limits
        self._counters = counters
        self._pool = pool
        self._rules = Rules(
            read_only=agreement.export.read_only,
            structured=agreement.structured,
            contexts=agreement.allocation,
            payload_bytes=limits.payload_bytes,
        )

    def answer(
        self, requests: list[Request], data: memoryview, out: memoryview
    ) -> tuple[int, list[Request]]:
        """Answer what needs no waiting; returns the end of the replies in `out` and the rest.

        `data` holds the payloads and may be reused afterwards; the rest still refers to it."""
        export = self.export
        try_read, try_write, size = export.try_read, export.try_write, export.size
        structured, inline = self._structured, self._limits.batch_bytes
        pack_data, pack_done = replies.DATA.pack_into, replies.DONE.pack_into
        header = replies.DATA.size if structured else replies.DONE.size
        refused_flags = ~(CMD_FLAG_FUA | (CMD_FLAG_DF if structured else 0))
        writable = not self._rules.read_only
        end = reads = read_bytes = 0
        staged: list[Request] = []
        later: list[Request] = []
        for request in requests:
            flags, kind, cookie, offset, length, at = request
            try:
                if not 0 < length <= inline or offset + length > size:
                    end = self._unusual(request, size, out, end, later)
                elif kind == CMD_READ and not flags & refused_flags:
                    start = end + header
                    stop = start + length
                    if not try_read(offset, out[start:stop]):
                        later.append(request)
                        continue
                    if structured:
                        pack_data(out, end, replies.DATA_HEAD, cookie, length + 8, offset)
                    else:
                        pack_done(out, end, replies.DONE_HEAD, cookie)
                    end = stop
                    reads += 1
                    read_bytes += length
                elif kind == CMD_WRITE and not flags and writable:
                    done = try_write(offset, data[at : at + length])
                    (staged if done else later).append(request)
                else:
                    end = self._unusual(request, size, out, end, later)
            except Exception as error:
                end = _append(out, end, self.failure(cookie, error))
        self._counters.reads += reads
        self._counters.read_bytes += read_bytes
        return (self._commit(staged, out, end) if staged else end), later

    def _commit(self, staged: list[Request], out: memoryview, end: int) -> int:
        try:
            self.export.commit()
        except Exception as error:
            for request in staged:
                end = _append(out, end, self.failure(request[2], error))
            return end
        pack, size, head = replies.DONE.pack_into, replies.DONE.size, replies.DONE_HEAD
        written = 0
        for request in staged:
            pack(out, end, head, request[2])
            end += size
            written += request[4]
        self._counters.writes += len(staged)
        self._counters.written_bytes += written
        return end

    def _unusual(
        self, request: Request, size: int, out: memoryview, end: int, later: list[Request]
    ) -> int:
        """A request off the fast path: refused, without effect, or for `perform`."""
        refused = refusal(request, size, self._rules)
        _, kind, cookie, _, length, _ = request
        if refused is not None:
            return _append(out, end, self.refuse(cookie, *refused))
        if length or kind == CMD_FLUSH:
            later.append(request)
            return end
        return _append(out, end, replies.empty(cookie, kind, structured=self._structured))

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Error and text for a request that must not be carried out, else None."""
        return refusal(request, self.export.size, self._rules)

    def refuse(self, cookie: int, code: int, text: str) -> bytes:
        """The reply that refuses a request."""
        self._counters.errors += 1
        return replies.failed(cookie, code, text, structured=self._structured)

    def shut_down(self, cookie: int) -> bytes:
        """The reply to a request for a deleted export."""
        return self.refuse(cookie, ESHUTDOWN, "the volume was deleted")

    def failure(self, cookie: int, error: Exception) -> bytes:
        """The reply to a request for which the export raised `error`."""
        if not isinstance(error, OSError):
            _log.error("export %s: unexpected error", self.export.name, exc_info=error)
        code = wire_error(error, deleted=self.export.closed)
        return self.refuse(cookie, code, str(error))

    def cost(self, request: Request) -> int:
        """Bytes that `perform` holds for a request until its reply has been sent."""
        flags, kind, _, _, length, _ = request
        if kind in (CMD_READ, CMD_WRITE):
            return length
        if kind == CMD_BLOCK_STATUS and not flags & CMD_FLAG_REQ_ONE:
            return 8 * self._limits.extents
        return 0

    async def perform(self, request: Request, payload: memoryview | None) -> Reply:
        """Carry out a request that was handed back; its reply, also when it fails.

        `payload` belongs to a WRITE and must stay as it is until this returns."""
        try:
            if request[1] == CMD_READ:
                return await self._read(request)
            return memoryview(await self._perform(request, payload)), None
        except Exception as error:
            return memoryview(self.failure(request[2], error)), None

    async def _perform(self, request: Request, payload: memoryview | None) -> bytes:
        flags, kind, cookie, offset, length, _ = request
        export, counters = self.export, self._counters
        if kind == CMD_BLOCK_STATUS:
            limit = 1 if flags & CMD_FLAG_REQ_ONE else self._limits.extents
            extents = await export.extents(offset, length, limit)
            counters.statuses += 1
            return replies.block_status(cookie, BASE_ALLOCATION_ID, extents)
        if kind == CMD_WRITE:
            assert payload is not None
            await self._write(offset, payload)
        elif kind == CMD_TRIM:
            await export.trim(offset, length)
            counters.trims += 1
        elif kind != CMD_FLUSH:
            await export.write_zeroes(offset, length, no_hole=bool(flags & CMD_FLAG_NO_HOLE))
            counters.zeroes += 1
        if kind == CMD_FLUSH or flags & CMD_FLAG_FUA:
            await export.flush()
            counters.flushes += kind == CMD_FLUSH
        return replies.done(cookie)

    async def _read(self, request: Request) -> Reply:
        """Produced in pieces with a turn of the loop between them, and sent when all are there.

        So an error in the last piece is still an error reply and not a broken connection."""
        _, _, cookie, offset, length, _ = request
        header = replies.read_header(cookie, offset, length, structured=self._structured)
        start, end, step = len(header), len(header) + length, self._limits.batch_bytes
        # If the export fails or is cancelled a pooled buffer is left to be freed, not used again.
        pooled = self._pool.take(end) if length > step else None
        buffer = memoryview(bytearray(end)) if pooled is None else pooled[:end]
        buffer[:start] = header
        view = buffer[start:]
        for at in range(0, length, step):
            piece = view[at : at + step]
            if not self.export.try_read(offset + at, piece):
                await self.export.read(offset + at, piece)
            elif at + step < length:
                await asyncio.sleep(0)
        self._counters.reads += 1
        self._counters.read_bytes += length
        return buffer, pooled

    async def _write(self, offset: int, payload: memoryview) -> None:
        """Long payloads in pieces, so that others get their turn in between."""
        length, step = len(payload), self._limits.batch_bytes
        for at in range(0, length, step):
            piece = payload[at : at + step]
            if self.export.try_write(offset + at, piece):
                self.export.commit()
                if at + step < length:
                    await asyncio.sleep(0)
            else:
                await self.export.write(offset + at, piece)
        self._counters.writes += 1
        self._counters.written_bytes += length


def _append(out: memoryview, end: int, reply: bytes) -> int:
    stop = end + len(reply)
    out[end:stop] = reply
    return stop
