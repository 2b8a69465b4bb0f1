"""Simulated connections: a socket as the server's sessions use it, and the client's end of it.

Bytes arrive in order, late, and cut anywhere; a socket takes only what its buffer has room for; the
client may close at any moment, which the server sees at once (`hung_up`) though bytes sent before
may be unread. What a dead process sends reaches nobody.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any


class SimSocket:
    """The server's end. It has the methods of `socket.socket` that server and sessions call."""

    family = socket.AF_UNIX

    def __init__(self, link: Link) -> None:
        self._link = link
        self._reader: Callable[[], object] | None = None
        self._writer: Callable[[], object] | None = None
        self._scheduled = False
        self.inbound = bytearray()
        self.closed = False
        self._duplicated = False

    # -- what the loop calls -------------------------------------------------------------------

    def watch_reading(self, callback: Callable[[], object] | None) -> bool:
        """Call back whenever there is something to read, or the end; None stops it."""
        before, self._reader = self._reader, callback
        self.poke()
        return before is not None

    def watch_writing(self, callback: Callable[[], object] | None) -> bool:
        """Call back whenever something can be sent; None stops it."""
        before, self._writer = self._writer, callback
        self.poke()
        return before is not None

    def poke(self) -> None:
        """Something changed: look once more, in the next turn of the loop."""
        if not self._scheduled and (self._may_read() or self._may_write()):
            self._scheduled = True
            self._link.loop.call_soon(self._turn)

    def _may_read(self) -> bool:
        return self._reader is not None and (bool(self.inbound) or self._link.hung_up)

    def _may_write(self) -> bool:
        return self._writer is not None and self._link.room > 0

    def _turn(self) -> None:
        self._scheduled = False
        if self._may_read() and self._reader is not None:
            self._reader()
        if self._may_write() and self._writer is not None:
            self._writer()
        self.poke()

    # -- what sessions call --------------------------------------------------------------------

    def setblocking(self, wanted: bool) -> None:
        assert not wanted

    def fileno(self) -> int:
        return -1 if self.closed else 0

    def recv_into(self, into: memoryview) -> int:
        if self._link.broken:
            raise ConnectionResetError("the client has gone (simulated)")
        if not self.inbound:
            if self._link.hung_up:
                return 0
            raise BlockingIOError
        size = min(len(self.inbound), len(into))
        into[:size] = self.inbound[:size]
        del self.inbound[:size]
        return size

    def send(self, data: memoryview) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        return self._link.deliver(b"".join(buffers))

    def dup(self) -> SimSocket:
        """Another handle, on which the connection goes on when this one is closed."""
        self._duplicated = True
        copy = self._link.socket = SimSocket(self._link)
        copy.inbound = self.inbound
        return copy

    def close(self) -> None:
        self.closed = True
        self._reader = self._writer = None
        if not self._duplicated:
            self._link.server_closed()


class Link:
    """Both directions of one connection. The server's socket takes `buffer` bytes before some have
    arrived: little, so that replies have to wait. `received` is told what arrives at the client,
    `lost` that nothing more will."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rng: Random,
        latency: float,
        buffer: int,
        alive: Callable[[], None],
        received: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.socket = SimSocket(self)
        self.hung_up = False
        #: The client closed with replies unread: the server's calls fail.
        self.broken = False
        self._rng = rng
        self._latency = latency
        self._buffer = buffer
        self._alive = alive
        self._received = received
        self._lost = lost
        self._under_way = 0
        self._to_server = self._to_client = loop.time()

    @property
    def room(self) -> int:
        """Bytes that the server can send now."""
        return self._buffer if self.hung_up else self._buffer - self._under_way

    def send(self, data: bytes) -> None:
        """The client sends: in pieces, each a little later."""
        while data and not self.hung_up:
            size = self._rng.choice((len(data), len(data), self._rng.randint(1, len(data))))
            self._to_server = self._later(self._to_server)
            self.loop.call_at(self._to_server, self._arrive, data[:size])
            data = data[size:]

    def hang_up(self) -> None:
        """The client closes: what it has sent so far may still arrive, replies never do."""
        if not self.hung_up:
            self.hung_up = True
            self.broken = self._rng.random() < 0.3
            self.socket.poke()

    def server_closed(self) -> None:
        """The server closes: the client hears of it behind the last reply."""
        self.loop.call_at(self._later(self._to_client), self._end)

    def deliver(self, data: bytes) -> int:
        """The server sends; returns how much the socket takes. Raises what a socket raises."""
        self._alive()
        if self.hung_up:
            raise BrokenPipeError("the client has gone (simulated)")
        size = min(len(data), self.room)
        if not size:
            raise BlockingIOError
        if self._rng.random() < 0.2:
            size = self._rng.randint(1, size)
        self._under_way += size
        self._to_client = self._later(self._to_client)
        self.loop.call_at(self._to_client, self._hand_over, data[:size])
        return size

    def _later(self, last: float) -> float:
        """A moment not before the one given: bytes do not overtake each other."""
        return max(last, self.loop.time()) + self._rng.random() * self._latency

    def _arrive(self, data: bytes) -> None:
        if not self.socket.closed:
            self.socket.inbound += data
            self.socket.poke()

    def _hand_over(self, data: bytes) -> None:
        self._under_way -= len(data)
        if not self.hung_up:
            self._received(data)
            self.socket.poke()

    def _end(self) -> None:
        self.hung_up = True
        self._lost()


def hung_up(sock: Any) -> bool:
    """What `Server` asks before it lets a client that came back begin (R8)."""
    assert isinstance(sock, SimSocket)
    return sock._link.hung_up


def bind(callback: Callable[..., object], args: tuple[object, ...]) -> Callable[[], object]:
    """A callback of a loop without its arguments."""
    return partial(callback, *args)
