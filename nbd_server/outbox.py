"""Replies on their way to a client, over a non-blocking socket.

A reply is sent at once if the socket takes it; what it does not take is kept, in order, until it
does. The session reads no further request meanwhile, so at most the replies of what is in flight
gather here. Invariant: what is kept is accounted for, and a pooled buffer goes back to its pool
when its last byte has been sent or the connection is over. Called by `session`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nbd_server.buffers import BufferPool
from nbd_server.tls import Stream

#: Replies handed to the kernel in one call.
_AT_ONCE = 16


@dataclass(slots=True)
class _Unsent:
    """A reply that the socket has not taken yet."""

    data: memoryview
    #: A buffer of the pool that `data` is part of.
    pooled: memoryview | None
    #: Bytes that cannot be used for anything else until it is gone.
    held: int


class Outbox:
    """The sending side of one connection."""

    def __init__(
        self,
        sock: Stream,
        loop: asyncio.AbstractEventLoop,
        pool: BufferPool,
        hold: Callable[[int], None],
        drained: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        """`hold` accounts for more bytes or fewer, `drained` is called when everything kept has
        been sent, `lost` when the socket fails."""
        self._sock = sock
        self._loop = loop
        self._pool = pool
        self._hold = hold
        self._drained = drained
        self._lost = lost
        self._closed = False
        self._unsent: deque[_Unsent] = deque()
        #: Whether bytes moved since somebody last cleared it.
        self.moved = True

    @property
    def waiting(self) -> bool:
        """Whether something is kept."""
        return bool(self._unsent)

    def use(self, sock: Stream) -> None:
        """Send over another socket from now on. Nothing may be kept."""
        assert not self._unsent
        self._sock = sock

    def send(self, data: memoryview, pooled: memoryview | None = None) -> None:
        """Send `data`, now or later; `pooled` is the pool's buffer that it lies in."""
        sent = 0
        if not self._unsent and not self._closed:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._lost()
        if self._closed or sent == len(data):
            if pooled is not None:
                self._pool.give(pooled)
            return
        if not self._unsent:
            self._loop.add_writer(self._sock, self._writable)
        self._keep(data[sent:], pooled)

    def close(self) -> None:
        """Drop what is kept. To be called before the socket is closed."""
        self._closed = True
        if self._sock.fileno() >= 0:
            self._loop.remove_writer(self._sock)
        while self._unsent:
            self._release()

    def _keep(self, data: memoryview, pooled: memoryview | None) -> None:
        held = len(data if pooled is None else pooled)
        self._hold(held)
        self._unsent.append(_Unsent(data, pooled, held))

    def _release(self) -> None:
        unsent = self._unsent.popleft()
        self._hold(-unsent.held)
        if unsent.pooled is not None:
            self._pool.give(unsent.pooled)

    def _writable(self) -> None:
        first = [self._unsent[i].data for i in range(min(len(self._unsent), _AT_ONCE))]
        try:
            sent = self._sock.sendmsg(first)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        self.moved = True
        while self._unsent and sent >= len(self._unsent[0].data):
            sent -= len(self._unsent[0].data)
            self._release()
        if self._unsent:
            self._unsent[0].data = self._unsent[0].data[sent:]
        else:
            self._loop.remove_writer(self._sock)
            self._drained()
