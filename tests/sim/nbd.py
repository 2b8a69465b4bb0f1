"""An NBD client on a simulated connection: the requests of one guest, answered out of order.

The encoding is that of `tests.unit.nbd_server.wire`, which is written without the server's. A
connection that ends fails every request that is still open with `ConnectionError`; whoever wants to
go on connects again and sends again, as QEMU does.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from random import Random

from nbd_server.server import Server
from tests.unit.nbd_server import wire

from .network import Link


class UnknownExport(Exception):
    """The server has no export of that name."""


class Connection:
    """One connection to one export. `alive` raises when the process that serves it is dead."""

    def __init__(
        self, server: Server, rng: Random, latency: float, buffer: int,
        alive: Callable[[], None], name: str,
    ) -> None:  # fmt: skip
        self._loop = asyncio.get_running_loop()
        self._link = Link(self._loop, rng, latency, buffer, alive, self._received, self._lost)
        self.name = name
        self.framing = rng.choice(("simple", "structured", "extended"))
        self.size = 0
        self.lost = False
        self._greeted = self._entered = False
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._inbound = bytearray()
        self._cookie = rng.randrange(1 << 40)
        self._reads: dict[int, int] = {}
        self._open: dict[int, asyncio.Future[wire.Answer]] = {}
        server.adopt(self._link.socket, "sim")  # type: ignore[arg-type]

    @property
    def requests(self) -> int:
        """How many are not answered yet."""
        return len(self._open)

    async def negotiate(self) -> None:
        """Enter the transmission phase. Raises UnknownExport, ConnectionError."""
        self._link.send(wire.client_flags())
        if self.framing != "simple":
            extended = self.framing == "extended"
            self._link.send(wire.option(wire.EXTENDED if extended else wire.STRUCTURED))
            self._link.send(wire.option(wire.SET_META, wire.meta(self.name, "base:allocation")))
        self._link.send(wire.option(wire.GO, wire.info(self.name)))
        await self._ready

    async def request(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> wire.Answer:
        """Send a request and wait for its answer. Raises ConnectionError."""
        if self.lost:
            raise ConnectionResetError("connection lost")
        self._cookie += 1
        cookie = self._cookie
        answer = self._open[cookie] = self._loop.create_future()
        if kind == wire.READ:
            self._reads[cookie] = length
        if self.framing == "extended":
            flags |= wire.PAYLOAD if kind == wire.WRITE else 0
            self._link.send(wire.extended(kind, cookie, offset, length, flags, payload))
        else:
            self._link.send(wire.request(kind, cookie, offset, length, flags, payload))
        return await answer

    def garbage(self, data: bytes) -> None:
        """Send bytes that are no request."""
        self._link.send(data)

    def cut(self) -> None:
        """Close without a word."""
        self._link.hang_up()
        self._lost()

    # -- receiving -----------------------------------------------------------------------------

    def _received(self, data: bytes) -> None:
        if self.lost:
            return
        self._inbound += data
        if not self._entered:
            self._negotiated()
        while self._entered and not self.lost and self._answered():
            pass

    def _negotiated(self) -> None:
        inbound = self._inbound
        if not self._greeted and len(inbound) >= 18:
            assert struct.unpack_from(">QQ", inbound) == (wire.NBDMAGIC, wire.IHAVEOPT)
            del inbound[:18]
            self._greeted = True
        while self._greeted and len(inbound) >= 20 and not (self._entered or self.lost):
            magic, option, kind, length = struct.unpack_from(">QIII", inbound)
            assert magic == 0x0003E889045565A9
            if len(inbound) < 20 + length:
                return
            body = bytes(inbound[20 : 20 + length])
            del inbound[: 20 + length]
            self._option_reply(option, kind, body)

    def _option_reply(self, option: int, kind: int, body: bytes) -> None:
        if option != wire.GO:
            return
        if kind == wire.UNKNOWN:
            self._fail(UnknownExport(self.name))
            self.cut()
        elif kind == wire.REP_INFO and body[:2] == b"\0\0":
            self.size = struct.unpack_from(">Q", body, 2)[0]
        elif kind == wire.ACK:
            self._entered = True
            if not self._ready.done():
                self._ready.set_result(None)

    def _answered(self) -> bool:
        """Take one whole answer; False if there is none."""
        inbound = self._inbound
        need = wire.answer_size(inbound, self._reads)
        if need is None:
            return False
        answer, rest = wire.decode_one(bytes(inbound[:need]), self._reads)
        assert not rest
        del inbound[:need]
        self._reads.pop(answer.cookie, None)
        waiter = self._open.pop(answer.cookie)
        if not waiter.done():
            waiter.set_result(answer)
        return True

    def _lost(self) -> None:
        self.lost = True
        self._fail(ConnectionResetError("connection lost"))
        for waiter in self._open.values():
            if not waiter.done():
                waiter.set_exception(ConnectionResetError("connection lost"))
                waiter.exception()
        self._open.clear()

    def _fail(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()
