"""Ways for a client to reach its volumes: the volume's own methods, or NBD connections.

Errors are `OSError` with the errno that a client would see. An `NbdPort` connects as often as it
must: a request whose connection was lost is sent again on another one, as QEMU does, and says so.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Protocol

from nbd_server.server import Server
from pool import Pool
from tests.unit.nbd_server import wire

from .nbd import Connection, UnknownExport

#: How often a request is sent again before the world counts as broken.
RESENDS = 50
#: Virtual seconds in which a request must have been answered, whatever devices do.
ANSWER_SECONDS = 5000.0


class Port(Protocol):
    """What clients do with volumes; offsets and lengths in bytes."""

    async def write(
        self, name: str, offset: int, data: bytes, *, fua: bool, resent: Callable[[], None]
    ) -> None:
        """`resent` is called when it is sent again: its effect may come twice then."""

    async def zero(
        self, name: str, offset: int, length: int, no_hole: bool | None, *,
        resent: Callable[[], None],
    ) -> None:  # fmt: skip
        """Trim (`no_hole` None) or write zeros; `resent` as for `write`."""

    async def flush(self, name: str) -> None: ...

    async def read(self, name: str, offset: int, length: int) -> bytes: ...

    async def status(self, name: str, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) of base:allocation; nothing if it was not negotiated."""


class DirectPort:
    """The volumes' own methods, by the fast path half of the time."""

    def __init__(self, pool: Pool, rng: Random) -> None:
        self._pool = pool
        self._rng = rng

    async def write(
        self, name: str, offset: int, data: bytes, *, fua: bool, resent: Callable[[], None]
    ) -> None:
        volume = self._pool.volume(name)
        view = memoryview(data)
        if self._rng.random() < 0.5 and volume.try_write(offset, view):
            volume.commit()
        else:
            await volume.write(offset, view)
        if fua:
            await volume.flush()

    async def zero(
        self, name: str, offset: int, length: int, no_hole: bool | None, *,
        resent: Callable[[], None],
    ) -> None:  # fmt: skip
        volume = self._pool.volume(name)
        if no_hole is None:
            await volume.trim(offset, length)
        else:
            await volume.write_zeroes(offset, length, no_hole=no_hole)

    async def flush(self, name: str) -> None:
        await self._pool.volume(name).flush()

    async def read(self, name: str, offset: int, length: int) -> bytes:
        data = memoryview(bytearray(length))
        volume = self._pool.volume(name)
        if not (self._rng.random() < 0.5 and volume.try_read(offset, data)):
            await volume.read(offset, data)
        return bytes(data)

    async def status(self, name: str, offset: int, length: int) -> list[tuple[int, int]]:
        return await self._pool.volume(name).extents(offset, length, 1000)


class NbdPort:
    """Some connections to each export, made when they are needed."""

    def __init__(
        self,
        server: Server,
        rng: Random,
        *,
        latency: float,
        buffer: int,
        alive: Callable[[], None],
        events: Counter[str],
        connections: int,
    ) -> None:
        self._server = server
        #: Nobody can connect while one server follows another.
        self._listening = asyncio.Event()
        self._listening.set()
        self._rng = rng
        self._latency = latency
        self._buffer = buffer
        self._alive = alive
        self._events = events
        self._wanted = connections
        self._open: dict[str, list[Connection]] = {}

    async def write(
        self, name: str, offset: int, data: bytes, *, fua: bool, resent: Callable[[], None]
    ) -> None:
        flags = wire.FUA if fua else 0
        await self._ask(name, wire.WRITE, offset, len(data), flags, data, resent=resent)

    async def zero(
        self, name: str, offset: int, length: int, no_hole: bool | None, *,
        resent: Callable[[], None],
    ) -> None:  # fmt: skip
        kind = wire.TRIM if no_hole is None else wire.ZEROES
        flags = wire.NO_HOLE if no_hole else 0
        await self._ask(name, kind, offset, length, flags, resent=resent)

    async def flush(self, name: str) -> None:
        await self._ask(name, wire.FLUSH)

    async def read(self, name: str, offset: int, length: int) -> bytes:
        return (await self._ask(name, wire.READ, offset, length)).data

    async def status(self, name: str, offset: int, length: int) -> list[tuple[int, int]]:
        for connection in self._open.get(name, ()):
            if connection.framing != "simple" and not connection.lost:
                try:
                    return list((await connection.request(wire.STATUS, offset, length)).extents)
                except ConnectionError:
                    break
        return []

    async def succeed(self, successor: Callable[[], Server]) -> None:
        """Another server goes on with the connections."""
        self._listening.clear()
        try:
            handed = await self._server.hand_over(ANSWER_SECONDS)
            self._server = successor()
            for connection in handed:
                self._server.resume(connection)
            self._events["handed_over"] += len(handed)
        finally:
            self._listening.set()

    def cut(self, rng: Random) -> None:
        """Lose one connection, most likely one with requests under way."""
        live = [one for known in self._open.values() for one in known if not one.lost]
        busy = [one for one in live if one.requests]
        if live:
            one = rng.choice(busy or live)
            self._events["connections_cut"] += 1
            self._events["cut_with_requests"] += bool(one.requests)
            one.cut()

    def babble(self, rng: Random) -> None:
        """Somebody connects and talks nonsense; that is his connection's end, and nobody else's."""
        if not self._listening.is_set():
            return
        self._events["babblers"] += 1
        stranger = Connection(self._server, rng, self._latency, self._buffer, self._alive, "")
        stranger.garbage(rng.randbytes(rng.randrange(1, 300)))

    async def _ask(
        self, name: str, kind: int, offset: int = 0, length: int = 0, flags: int = 0,
        payload: bytes = b"", resent: Callable[[], None] = lambda: None,
    ) -> wire.Answer:  # fmt: skip
        """The answer. Raises OSError."""
        async with asyncio.timeout(ANSWER_SECONDS):
            for tries in range(RESENDS):
                try:
                    connection = await self._connection(name)
                    answer = await connection.request(kind, offset, length, flags, payload)
                except ConnectionError:
                    self._events["resent"] += 1
                    resent()
                    continue
                except UnknownExport:
                    raise OSError(errno.ESHUTDOWN, f"no export {name}") from None
                if answer.error:
                    text = answer.text or os.strerror(answer.error)
                    raise Refused(answer.error, text, resent=tries > 0)
                return answer
        raise AssertionError(f"{RESENDS} connections to {name} were lost one after the other")

    async def _connection(self, name: str) -> Connection:
        await self._listening.wait()
        known = [one for one in self._open.get(name, ()) if not one.lost]
        if len(known) < self._wanted and (not known or self._rng.random() < 0.5):
            one = Connection(
                self._server, self._rng, self._latency, self._buffer, self._alive, name
            )
            await one.negotiate()
            known.append(one)
            self._events["connections"] += 1
        self._open[name] = known
        return self._rng.choice(known)


class Refused(OSError):
    """An error reply. `resent`: the request may have had its effect before, unanswered."""

    def __init__(self, code: int, text: str, *, resent: bool) -> None:
        super().__init__(code, text)
        self.resent = resent
