"""One connection: a non-blocking socket, the handshake, then requests.

All the work of a turn happens inside the event loop's callback: receive into a buffer that all
sessions share, parse, answer, send. Only what the export would have to wait for becomes a task.

Invariants:

* Unsent replies stop the reading. So do `connection_bytes` or `connection_requests` in flight, and
  a server whose `server_bytes` are all held. Nothing is buffered beyond that.
* After `close` nothing of this connection reaches the export: its tasks are cancelled (R8).
* Shared and pooled buffers are used within a turn; what outlives it is a copy or an own buffer.
* `finish` answers what is in flight and closes; it never answers ESHUTDOWN. `expel` does.
* `pause` answers what is in flight and takes no more; once `quiet`, the connection can be detached.

Called by `server`, which owns what sessions share.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from nbd_server.buffers import Budget, BufferPool
from nbd_server.constants import CMD_FLAG_PAYLOAD_LEN, CMD_WRITE, EINVAL
from nbd_server.counters import Counters
from nbd_server.errors import ProtocolError
from nbd_server.export import Export
from nbd_server.handover import Handed
from nbd_server.handshake import GREETING, Agreement, Exports, Handshake, Security
from nbd_server.limits import Limits
from nbd_server.outbox import Outbox
from nbd_server.requests import Request, parse
from nbd_server.tls import Stream, Tls, TlsSocket
from nbd_server.transmission import Transmission, reply_buffer_size

_log = logging.getLogger(__name__)

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the sessions of one server have in common."""

    loop: asyncio.AbstractEventLoop
    exports: Exports
    limits: Limits
    counters: Counters
    budget: Budget
    buffers: BufferPool
    #: Where every session receives; it holds nothing between two turns.
    inbound: memoryview
    #: Nanoseconds, monotonic.
    clock: Callable[[], int]
    #: Whether the other side of a socket has closed, even if bytes that it sent are unread.
    hung_up: Callable[[Stream], bool]
    #: Called when a session enters the transmission phase, and when it has ended.
    entered: Callable[[Session], None]
    ended: Callable[[Session], None]
    tls: Tls | None = None


@dataclass(slots=True)
class _Payload:
    """A long payload on its way in; without a buffer it is refused and discarded."""

    request: Request
    buffer: memoryview | None
    refusal: tuple[int, str] | None
    received: int = 0

    @property
    def missing(self) -> int:
        return self.request[4] - self.received


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that waits for the export."""

    request: Request
    #: Bytes that it is accounted for.
    held: int
    #: A buffer of the pool that its payload lies in.
    pooled: memoryview | None


class Session:
    """A connected client."""

    def __init__(self, sock: socket.socket, peer: str, shared: Shared) -> None:
        self.peer = peer
        self.closed = False
        self.finishing = False
        self._paused = False
        self._expelled = False
        self._moved = True
        self._sock: Stream = sock
        #: The same, while a TLS handshake is under way and from then on.
        self._tls: TlsSocket | None = None
        self._securing = False
        self._shared = shared
        self._handshake: Handshake | None = self._negotiation()
        self._transmission: Transmission | None = None
        self._kept = _NOTHING
        self._more = False
        self._payload: _Payload | None = None
        self._tasks: dict[asyncio.Task[None], _Waiting] = {}
        self._held = 0
        self._reading = False
        self._continuation: asyncio.Handle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._outbox = Outbox(
            sock,
            shared.loop,
            shared.buffers,
            hold=self._hold,
            drained=self._adjust,
            lost=self.close,
        )

    def _negotiation(self) -> Handshake:
        shared, tls = self._shared, self._shared.tls
        if tls is None:
            return Handshake(shared.exports, shared.limits)
        security = Security.REQUIRED if tls.required else Security.OFFERED
        exports = shared.exports.seen_by(tls, None)
        return Handshake(exports, shared.limits, security)

    # --- what the server calls -----------------------------------------------------------------

    def start(self) -> None:
        """Greet the client and begin to listen to it."""
        seconds = self._shared.limits.handshake_seconds
        self._deadline = self._shared.loop.call_later(seconds, self._timed_out)
        self._outbox.send(memoryview(GREETING))
        self._adjust()

    def resume(self, agreement: Agreement, kept: bytes) -> None:
        """Go on, instead of `start`, with a connection that a predecessor has negotiated."""
        self._handshake = None
        self._agree(agreement)
        self._keep(memoryview(kept), more=bool(kept))
        self._adjust()

    def pause(self) -> None:
        """Take no more requests; those in flight are answered."""
        self._paused = True
        self._adjust()

    @property
    def quiet(self) -> bool:
        """Whether it is between two requests, and can be handed over at all."""
        busy = self._tasks or self._outbox.waiting or self._payload is not None
        ready = self._transmission is not None and self._tls is None
        return ready and not (busy or self.finishing or self.closed)

    def detach(self) -> Handed:
        """Give the connection away; it must be paused and quiet. The session is over."""
        transmission, sock = self._transmission, self._sock
        assert transmission is not None
        assert not isinstance(sock, TlsSocket)
        agreement, kept = transmission.agreement, bytes(self._kept)
        copy = sock.dup()
        self.close()
        framing = agreement.framing
        return Handed(
            copy, self.peer, agreement.export.name, framing.structured, framing.extended,
            dict(agreement.contexts), agreement.alignment, kept,
        )  # fmt: skip

    @property
    def export(self) -> Export | None:
        """The export, once the transmission phase has begun."""
        return None if self._transmission is None else self._transmission.export

    @property
    def secured(self) -> bool:
        """Whether it uses TLS."""
        return self._tls is not None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The requests that wait for the export."""
        return list(self._tasks)

    def stalls(self) -> bool:
        """Whether the client neither sent nor received since the last call although it has to.

        Memory is held for that long: a payload half received or a reply half sent."""
        moved = self._moved or self._outbox.moved
        self._moved = self._outbox.moved = False
        return not moved and (self._outbox.waiting or self._payload is not None)

    def hung_up(self) -> bool:
        """Whether the client has gone, even if bytes that it sent before are unread."""
        return self._shared.hung_up(self._sock)

    def finish(self) -> None:
        """Read no more, answer what is in flight, then close."""
        self.finishing = True
        if self._transmission is None:
            self.close()
            return
        self._adjust()

    def expel(self) -> None:
        """The export was deleted: answer what is in flight with ESHUTDOWN, then close."""
        transmission = self._transmission
        if self.closed or transmission is None:
            return
        self._expelled = True
        # What is done already has been answered; cancel() says so with False.
        requests = [waiting.request for task, waiting in self._tasks.items() if task.cancel()]
        for request in requests:
            self._outbox.send(memoryview(transmission.shut_down(request)))
        self.finish()

    def close(self, reason: str | None = None) -> None:
        """Close at once; what is in flight is cancelled."""
        if self.closed:
            return
        self.closed = True
        if reason is not None:
            _log.warning("closing the connection of %s: %s", self.peer, reason)
        loop = self._shared.loop
        if self._sock.fileno() >= 0:
            # TLS that could not even begin has closed it.
            loop.remove_reader(self._sock)
            loop.remove_writer(self._sock)
        for handle in (self._deadline, self._continuation):
            if handle is not None:
                handle.cancel()
        self._shared.budget.forget(self._adjust)
        for task in self._tasks:
            task.cancel()
        self._drop_payload()
        self._outbox.close()
        self._kept = _NOTHING
        self._sock.close()
        self._shared.ended(self)

    # --- receiving -----------------------------------------------------------------------------

    def _adjust(self) -> None:
        """Read, wait or close, whatever the state calls for. The end of every turn."""
        if self.closed:
            return
        if self._may_read():
            if self._more or (self._tls is not None and self._tls.pending):
                self._read_when_ready(False)
                if self._continuation is None:
                    self._continuation = self._shared.loop.call_soon(self._continue)
            else:
                self._read_when_ready(True)
            return
        self._read_when_ready(False)
        if self.finishing and not self._tasks and not self._outbox.waiting:
            self.close()

    def _may_read(self) -> bool:
        if self._outbox.waiting or self.finishing or self._securing:
            return False
        if self._payload is not None:
            # Its memory is accounted for already; only the rest of it brings that back.
            return True
        if self._paused:
            return False
        limits = self._shared.limits
        if self._held >= limits.connection_bytes or len(self._tasks) >= limits.connection_requests:
            return False
        if self._shared.budget.exhausted:
            self._shared.budget.wait(self._adjust)
            return False
        return True

    def _read_when_ready(self, wanted: bool) -> None:
        if wanted == self._reading:
            return
        self._reading = wanted
        if wanted:
            self._shared.loop.add_reader(self._sock, self._readable)
        else:
            self._shared.loop.remove_reader(self._sock)

    def _readable(self) -> None:
        # The memory may have been taken by others since this was arranged.
        if self._shared.budget.exhausted and not self._may_read():
            self._adjust()
        else:
            self._turn(self._receive)

    def _continue(self) -> None:
        """A turn over bytes that were received earlier."""
        self._continuation = None
        if self.closed or not self._may_read():
            return
        if not self._more:
            self._turn(self._receive)
            return
        kept, self._kept, self._more = self._kept, _NOTHING, False
        self._turn(lambda: self._take(kept))

    def _turn(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ProtocolError as error:
            self.close(str(error))
        except OSError as error:
            _log.debug("connection of %s lost: %s", self.peer, error)
            self.close()
        except Exception:
            _log.exception("connection of %s: unexpected error", self.peer)
            self.close()
        self._adjust()

    def _receive(self) -> None:
        payload, inbound = self._payload, self._shared.inbound
        kept = len(self._kept)
        if payload is None:
            into = inbound[kept:]
        elif payload.buffer is None:
            into = inbound[: payload.missing]
        else:
            into = payload.buffer[payload.received : payload.received + payload.missing]
        try:
            size = self._sock.recv_into(into)
        except BlockingIOError:
            return
        if not size:
            self.close()
            return
        self._moved = True
        if payload is not None:
            self._payload_received(payload, size)
            return
        if kept:
            inbound[:kept] = self._kept
            self._kept = _NOTHING
        self._take(inbound[: kept + size])

    def _take(self, data: memoryview) -> None:
        """Handle bytes in order; what cannot be handled in this turn is kept."""
        if self._transmission is not None:
            self._take_requests(self._transmission, data)
        elif self._handshake is not None:
            self._take_options(self._handshake, data)

    def _keep(self, data: memoryview, *, more: bool) -> None:
        """Keep unhandled bytes; `more` if they can be handled without receiving any."""
        self._more = more
        if not data:
            return
        own = isinstance(data.obj, bytes)
        self._kept = data if own else memoryview(bytes(data))

    # --- negotiation ---------------------------------------------------------------------------

    def _take_options(self, handshake: Handshake, data: memoryview) -> None:
        used = handshake.receive(data)
        replies = handshake.replies()
        if handshake.outcome is not None:
            self._enter(handshake)
        if replies:
            self._outbox.send(memoryview(replies))
        if handshake.aborted:
            self.finishing = True
            return
        rest = data[used:]
        if handshake.starttls:
            # What came in plain text behind it would be taken for what TLS protects.
            if rest or self._outbox.waiting:
                raise ProtocolError("bytes behind STARTTLS before its answer")
            self._start_tls()
            return
        self._keep(rest, more=bool(used) and bool(rest))

    def _enter(self, handshake: Handshake) -> None:
        assert handshake.outcome is not None
        self._handshake = None
        self._agree(handshake.outcome)
        if self._deadline is not None:
            self._deadline.cancel()

    def _agree(self, agreement: Agreement) -> None:
        shared = self._shared
        self._transmission = Transmission(agreement, shared.limits, shared.counters, shared.buffers)
        shared.entered(self)

    # --- TLS -------------------------------------------------------------------------------------

    def _start_tls(self) -> None:
        tls = self._shared.tls
        assert tls is not None
        assert isinstance(self._sock, socket.socket)
        self._read_when_ready(False)
        try:
            self._tls = self._sock = TlsSocket(self._sock, tls.context)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"no TLS: {error}") from None
        self._outbox.use(self._tls)
        self._securing = True
        self._secure()

    def _secure(self) -> None:
        """A step of the TLS handshake; then the NBD handshake begins anew (it is not greeted
        again)."""
        self._turn(self._secure_step)

    def _secure_step(self) -> None:
        sock, shared, handshake = self._tls, self._shared, self._handshake
        assert sock is not None
        assert handshake is not None
        reads = sock.handshake()
        shared.loop.remove_reader(sock)
        shared.loop.remove_writer(sock)
        if not sock.established:
            wait = shared.loop.add_reader if reads else shared.loop.add_writer
            wait(sock, self._secure)
            return
        self._securing = False
        assert shared.tls is not None
        exports = shared.exports.seen_by(shared.tls, sock.subject)
        self._handshake = Handshake(exports, shared.limits, Security.DONE, handshake.flags)

    def _timed_out(self) -> None:
        self.close(f"no export chosen in {self._shared.limits.handshake_seconds:g} s")

    # --- transmission --------------------------------------------------------------------------

    def _take_requests(self, transmission: Transmission, data: memoryview) -> None:
        batch = parse(data, self._shared.limits, extended=transmission.extended)
        if batch.requests:
            self._answer(transmission, batch.requests, data)
        if self.closed or self.finishing:
            return
        if batch.violation is not None:
            raise ProtocolError(batch.violation)
        if batch.disconnect:
            self.finishing = True
        elif batch.partial is not None:
            self._begin_payload(transmission, batch.partial, data[batch.consumed :])
        else:
            self._keep(data[batch.consumed :], more=batch.bounded)

    def _answer(
        self, transmission: Transmission, requests: list[Request], data: memoryview
    ) -> None:
        shared = self._shared
        if transmission.export.closed:
            self._shut_down(transmission, requests)
            return
        began = shared.clock()
        buffer = shared.buffers.take(reply_buffer_size(shared.limits))
        end, later = transmission.answer(requests, data, buffer)
        if end:
            shared.counters.observe(shared.clock() - began, len(requests) - len(later))
            self._outbox.send(buffer[:end], buffer)
        else:
            shared.buffers.give(buffer)
        if self.closed:
            return
        for request in later:
            payload = None
            if request[1] == CMD_WRITE or request[0] & CMD_FLAG_PAYLOAD_LEN:
                at = request[5]
                payload = memoryview(bytes(data[at : at + request[4]]))
            self._spawn(transmission, request, payload, began)

    def _shut_down(self, transmission: Transmission, requests: list[Request]) -> None:
        replies = [transmission.shut_down(request) for request in requests]
        self._outbox.send(memoryview(b"".join(replies)))
        self.expel()

    def _begin_payload(
        self, transmission: Transmission, request: Request, arrived: memoryview
    ) -> None:
        refusal = transmission.refusal(request)
        buffer = None
        if refusal is None:
            length = request[4]
            self._hold(length)
            buffer = self._shared.buffers.take(length)
            buffer[: len(arrived)] = arrived
        self._payload = _Payload(request, buffer, refusal)
        self._payload_received(self._payload, len(arrived))

    def _payload_received(self, payload: _Payload, size: int) -> None:
        payload.received += size
        if payload.missing:
            return
        transmission, request = self._transmission, payload.request
        assert transmission is not None
        if payload.buffer is None:
            self._payload = None
            refused = payload.refusal or (EINVAL, "refused")
            self._outbox.send(memoryview(transmission.refuse(request, *refused)))
            return
        data = payload.buffer[: request[4]]
        if len(data) <= self._shared.limits.batch_bytes or transmission.export.closed:
            self._answer(transmission, [request], data)
            self._drop_payload()
        else:
            # Too long for one turn: the buffer goes with the task.
            self._payload = None
            self._hold(-len(data))
            began = self._shared.clock()
            self._spawn(transmission, request, data, began, payload.buffer)

    def _drop_payload(self) -> None:
        """Release the payload's memory: nothing refers to it any more."""
        payload, self._payload = self._payload, None
        if payload is not None and payload.buffer is not None:
            self._hold(-payload.request[4])
            self._shared.buffers.give(payload.buffer)

    # --- requests that wait --------------------------------------------------------------------

    def _spawn(
        self,
        transmission: Transmission,
        request: Request,
        payload: memoryview | None,
        began: int,
        pooled: memoryview | None = None,
    ) -> None:
        held = transmission.cost(request)
        self._hold(held)
        work = self._serve(transmission, request, payload, began)
        task = self._shared.loop.create_task(work)
        self._tasks[task] = _Waiting(request, held, pooled)
        task.add_done_callback(self._served)

    async def _serve(
        self, transmission: Transmission, request: Request, payload: memoryview | None, began: int
    ) -> None:
        reply, pooled = await transmission.perform(request, payload)
        self._shared.counters.observe(self._shared.clock() - began)
        if not self._expelled:
            self._outbox.send(reply, pooled)

    def _served(self, task: asyncio.Task[None]) -> None:
        waiting = self._tasks.pop(task)
        self._hold(-waiting.held)
        # Whoever was cancelled may have left a thread behind that still reads the payload.
        if waiting.pooled is not None and not task.cancelled():
            self._shared.buffers.give(waiting.pooled)
        self._adjust()

    def _hold(self, size: int) -> None:
        """Account for `size` more bytes, or for that many fewer."""
        self._held += size
        if size > 0:
            self._shared.budget.take(size)
        elif size < 0:
            self._shared.budget.give(-size)
