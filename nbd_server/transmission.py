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
    CMD_BLOCK_STATUS,
    CMD_CACHE,
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
    ESHUTDOWN,
)
from nbd_server.counters import Counters
from nbd_server.errors import wire_error
from nbd_server.export import Holes
from nbd_server.handshake import Agreement
from nbd_server.limits import Limits
from nbd_server.requests import Request, Rules, range_refusal, refusal, status_payload

_log = logging.getLogger(__name__)

#: A reply, and the buffer of the pool that it lies in.
Reply = tuple[memoryview, memoryview | None]


def reply_buffer_size(limits: Limits) -> int:
    """Bytes that the replies of any batch fit in."""
    return limits.batch_bytes + limits.batch_requests * replies.MAX_SHORT_REPLY


def buffer_pool(limits: Limits) -> BufferPool:
    """Buffers for the replies of a batch, and for the payload or the reply of any request."""
    longest = replies.EXTENDED_DATA.size + limits.payload_bytes
    return BufferPool(reply_buffer_size(limits), longest)


class Transmission:
    """The transmission phase of one connection, as far as it is not about sockets."""

    def __init__(
        self, agreement: Agreement, limits: Limits, counters: Counters, pool: BufferPool
    ) -> None:
        self.agreement = agreement
        self.export = agreement.export
        self.extended = agreement.framing.extended
        self._framing = agreement.framing
        self._contexts = agreement.contexts
        self._limits = limits
        self._counters = counters
        self._pool = pool
        self._rules = Rules(
            read_only=agreement.export.read_only,
            structured=agreement.framing.structured,
            extended=agreement.framing.extended,
            contexts=len(agreement.contexts),
            payload_bytes=limits.payload_bytes,
            alignment=agreement.alignment,
        )

    def answer(
        self, requests: list[Request], data: memoryview, out: memoryview
    ) -> tuple[int, list[Request]]:
        """Answer what needs no waiting; returns the end of the replies in `out` and the rest.

        `data` holds the payloads and may be reused afterwards; the rest still refers to it."""
        export, framing = self.export, self._framing
        structured, extended = framing.structured, framing.extended
        try_read = export.try_read_sparse if structured else export.try_read
        try_write, size, inline = export.try_write, export.size, self._limits.batch_bytes
        pack_data, pack_done = replies.DATA.pack_into, replies.DONE.pack_into
        pack_extended = replies.EXTENDED_DATA.pack_into
        header, odd = framing.read_size, self._rules.alignment - 1
        refused_flags = ~(CMD_FLAG_FUA | (CMD_FLAG_DF if structured else 0))
        refused_by_write = ~(CMD_FLAG_PAYLOAD_LEN if extended else 0)
        writable = not self._rules.read_only
        end = reads = read_bytes = 0
        staged: list[Request] = []
        later: list[Request] = []
        for request in requests:
            flags, kind, cookie, offset, length, at = request
            try:
                if not 0 < length <= inline or offset + length > size or (offset | length) & odd:
                    end = self._unusual(request, size, out, end, later)
                elif kind == CMD_READ and not flags & refused_flags:
                    start = end + header
                    stop = start + length
                    found = try_read(offset, out[start:stop])
                    if not found:
                        later.append(request)
                        continue
                    if found is not True:
                        stop = self._sparse(request, out, end, found)
                    elif extended:
                        head = replies.EXTENDED_DATA_HEAD
                        pack_extended(out, end, head, cookie, offset, length + 8, offset)
                    elif structured:
                        pack_data(out, end, replies.DATA_HEAD, cookie, length + 8, offset)
                    else:
                        pack_done(out, end, replies.DONE_HEAD, cookie)
                    end = stop
                    reads += 1
                    read_bytes += length
                elif kind == CMD_WRITE and not flags & refused_by_write and writable:
                    done = try_write(offset, data[at : at + length])
                    (staged if done else later).append(request)
                else:
                    end = self._unusual(request, size, out, end, later)
            except Exception as error:
                end = _append(out, end, self.failure(request, error))
        self._counters.reads += reads
        self._counters.read_bytes += read_bytes
        return (self._commit(staged, out, end) if staged else end), later

    def _commit(self, staged: list[Request], out: memoryview, end: int) -> int:
        try:
            self.export.commit()
        except Exception as error:
            for request in staged:
                end = _append(out, end, self.failure(request, error))
            return end
        self._counters.writes += len(staged)
        self._counters.written_bytes += sum([request[4] for request in staged])
        if self.extended:
            for request in staged:
                end = _append(out, end, self._framing.done(request[2], request[3]))
            return end
        pack, size, head = replies.DONE.pack_into, replies.DONE.size, replies.DONE_HEAD
        for request in staged:
            pack(out, end, head, request[2])
            end += size
        return end

    def _sparse(self, request: Request, out: memoryview, start: int, holes: Holes) -> int:
        """A read with zeros that were not filled: holes where there is room for their chunks, and
        the client has not asked for one piece. Returns the end of the reply in `out`."""
        flags, _, cookie, offset, length, _ = request
        framing = self._framing
        data = out[start + framing.read_size :]
        least = length + 1 if flags & CMD_FLAG_DF else replies.MIN_HOLE
        for first, size in holes:
            if size < least:
                data[first : first + size] = bytes(size)
        sent = [hole for hole in holes if hole[1] >= least]
        return replies.pack_sparse(framing, out, start, cookie, offset, length, sent)

    def _unusual(
        self, request: Request, size: int, out: memoryview, end: int, later: list[Request]
    ) -> int:
        """A request off the fast path: refused, without effect, or for `perform`."""
        refused = refusal(request, size, self._rules)
        _, kind, cookie, offset, length, _ = request
        if refused is not None:
            return _append(out, end, self.refuse(request, *refused))
        if length or kind == CMD_FLUSH:
            later.append(request)
            return end
        return _append(out, end, self._framing.empty(cookie, kind, offset))

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Error and text for a request that must not be carried out, else None."""
        return refusal(request, self.export.size, self._rules)

    def refuse(self, request: Request, code: int, text: str, where: int | None = None) -> bytes:
        """The reply that refuses a request."""
        self._counters.errors += 1
        return self._framing.failed(request[2], request[3], code, text, where)

    def shut_down(self, request: Request) -> bytes:
        """The reply to a request for a deleted export."""
        return self.refuse(request, ESHUTDOWN, "the volume was deleted")

    def failure(self, request: Request, error: Exception) -> bytes:
        """The reply to a request for which the export raised `error`."""
        if not isinstance(error, OSError):
            _log.error("export %s: unexpected error", self.export.name, exc_info=error)
        flags, kind, _, offset, length, _ = request
        fast = kind == CMD_WRITE_ZEROES and bool(flags & CMD_FLAG_FAST_ZERO)
        code = wire_error(error, deleted=self.export.closed, fast=fast)
        where = getattr(error, "offset", None) if kind == CMD_READ else None
        if where is not None and not offset <= where < offset + length:
            where = None
        return self.refuse(request, code, str(error), where)

    def cost(self, request: Request) -> int:
        """Bytes that `perform` holds for a request until its reply has been sent."""
        flags, kind, _, _, length, _ = request
        if kind in (CMD_READ, CMD_WRITE):
            return length
        if kind == CMD_BLOCK_STATUS and not flags & CMD_FLAG_REQ_ONE:
            return (16 if self.extended else 8) * self._limits.extents * len(self._contexts)
        return 0

    async def perform(self, request: Request, payload: memoryview | None) -> Reply:
        """Carry out a request that was handed back; its reply, also when it fails.

        `payload` is that of the request, if it has one, and must stay as it is until this
        returns."""
        try:
            if request[1] == CMD_READ:
                return await self._read(request)
            return memoryview(await self._perform(request, payload)), None
        except Exception as error:
            return memoryview(self.failure(request, error)), None

    async def _perform(self, request: Request, payload: memoryview | None) -> bytes:
        flags, kind, cookie, offset, length, _ = request
        export, counters = self.export, self._counters
        if kind == CMD_BLOCK_STATUS:
            return await self._status(request, payload)
        if kind == CMD_WRITE:
            assert payload is not None
            await self._write(offset, payload)
        elif kind == CMD_TRIM:
            await export.trim(offset, length)
            counters.trims += 1
        elif kind == CMD_WRITE_ZEROES:
            no_hole, fast = bool(flags & CMD_FLAG_NO_HOLE), bool(flags & CMD_FLAG_FAST_ZERO)
            await export.write_zeroes(offset, length, no_hole=no_hole, fast=fast)
            counters.zeroes += 1
        elif kind == CMD_CACHE:
            await export.cache(offset, length)
            counters.caches += 1
        if kind == CMD_FLUSH or flags & CMD_FLAG_FUA:
            await export.flush()
            counters.flushes += kind == CMD_FLUSH
        return self._framing.done(cookie, offset)

    async def _status(self, request: Request, payload: memoryview | None) -> bytes:
        """One chunk for every context that was selected, or that the payload asks for."""
        flags, kind, cookie, offset, length, _ = request
        wanted = tuple(self._contexts)
        if flags & CMD_FLAG_PAYLOAD_LEN:
            assert payload is not None
            length, wanted = status_payload(payload)
            if len(set(wanted)) < len(wanted) or not self._contexts.keys() >= set(wanted):
                return self.refuse(request, EINVAL, "a context twice, or one not negotiated")
            refused = range_refusal(flags, kind, offset, length, self.export.size, self._rules)
            if refused is not None:
                return self.refuse(request, *refused)
        limit = 1 if flags & CMD_FLAG_REQ_ONE else self._limits.extents
        chunks = []
        for number in wanted:
            found = await self.export.extents(offset, length, limit, self._contexts[number])
            done = number == wanted[-1]
            chunks.append(self._framing.status(cookie, offset, number, found, done=done))
        self._counters.statuses += 1
        return b"".join(chunks) or self._framing.done(cookie, offset)

    async def _read(self, request: Request) -> Reply:
        """Produced in pieces with a turn of the loop between them, and sent when all are there.

        So an error in the last piece is still an error reply and not a broken connection."""
        _, _, cookie, offset, length, _ = request
        framing, export = self._framing, self.export
        try_read = export.try_read_sparse if framing.structured else export.try_read
        start, step = framing.read_size, self._limits.batch_bytes
        end = start + length
        # If the export fails or is cancelled a pooled buffer is left to be freed, not used again.
        pooled = self._pool.take(end) if length > step else None
        buffer = memoryview(bytearray(end)) if pooled is None else pooled[:end]
        view = buffer[start:]
        holes: list[tuple[int, int]] = []
        for at in range(0, length, step):
            piece = view[at : at + step]
            found = try_read(offset + at, piece)
            if not found:
                await export.read(offset + at, piece)
                continue
            if found is not True:
                _join(holes, at, found)
            if at + step < length:
                await asyncio.sleep(0)
        self._counters.reads += 1
        self._counters.read_bytes += length
        if holes:
            return buffer[: self._sparse(request, buffer, 0, holes)], pooled
        framing.pack_data(buffer, 0, cookie, offset, offset, length, done=True)
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


def _join(holes: list[tuple[int, int]], at: int, more: Holes) -> None:
    """Add holes of the piece that begins at `at`; one that goes on from piece to piece is one."""
    for first, size in more:
        if holes and sum(holes[-1]) == at + first:
            holes[-1] = (holes[-1][0], holes[-1][1] + size)
        else:
            holes.append((at + first, size))
