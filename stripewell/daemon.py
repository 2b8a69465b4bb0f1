"""The daemon: one pool, served over NBD until SIGTERM or SIGINT.

Order of start: lock and open the devices, NBD sockets, control socket, HTTP, one line on stdout.
The end is the reverse, so that no request is taken that can't be answered; requests in flight are
finished, and no client is told ESHUTDOWN. Nothing depends on that end: after `kill -9` the next
start recovers. Called by the CLI; nothing that only the command line needs is imported here
(resident memory).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

import uvloop

from nbd_server.export import Export
from nbd_server.handover import Handed
from nbd_server.server import Server
from nbd_server.tls import Tls
from pool import Pool
from pool.mover import InlineMover, ProcessMover
from pool.words import counted
from stripewell import systemd, takeover
from stripewell.control import ControlServer
from stripewell.controller import Controller
from stripewell.endpoints import Address, Endpoints
from stripewell.errors import UserError, one_line
from stripewell.http import HttpServer, Response, plain
from stripewell.opening import open_pool
from stripewell.state import PoolRecord, State
from stripewell.watch import watched

#: How long requests in flight may take at the end. Below systemd's 90 s.
_GRACE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen; a unix socket always."""

    unix: Path
    tcp: Address | None = None
    http: Address | None = None
    tls: Tls | None = None


class _End:
    """Why and how the daemon ends."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        #: Path of the socket of whoever goes on.
        self.successor = ""
        self.connections: list[Handed] = []

    def on_signals(self) -> None:
        """End at the first one. A second one has its default effect: the end at once."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self._reached.set()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)

    def for_successor(self, path: str) -> None:
        """End, and hand over to the one that listens at `path`."""
        self.successor = path
        self._reached.set()

    async def wait(self) -> None:
        await self._reached.wait()

    def hand_over(self) -> None:
        """Send the connections to the successor, if there is one; the pool is closed by now."""
        if not self.successor:
            return
        count = len(self.connections)
        try:
            takeover.give(self.successor, self.connections)
        except OSError as error:
            print(f"stripewell: the successor is gone: {one_line(error)}", file=sys.stderr)
        else:
            print(f"stripewell: handed over {counted(count, 'connection')}", flush=True)


def serve(
    state: State, record: PoolRecord, listen: Listen, *, read_only: bool = False,
    take_over: bool = False,
) -> None:  # fmt: skip
    """Serve a pool until a signal or a successor ends it; `take_over` succeeds the daemon that
    serves it now. Raises `UserError`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(state, record, listen, read_only=read_only, take_over=take_over))


async def _serve(
    state: State, record: PoolRecord, listen: Listen, *, read_only: bool, take_over: bool
) -> None:
    end = _End()
    end.on_signals()
    state.make_directories()
    taken = await takeover.take(state, record) if take_over else []
    async with contextlib.AsyncExitStack() as stack:
        # After everything else, the pool included.
        stack.callback(end.hand_over)
        opened = await stack.enter_async_context(
            open_pool(
                record,
                read_only=read_only,
                make_mover=InlineMover if read_only else ProcessMover,
            )
        )
        pool = opened.pool
        for line in _untold(pool, opened.problems):
            _log(f"warning: {line}")
        await stack.enter_async_context(watched(pool, _log))
        server = Server(
            partial(_lookup, pool),
            lambda: [pool.volume(v.name) for v in pool.volumes()],
            tls=listen.tls,
        )
        endpoints = await stack.enter_async_context(_listening(server, listen, end))
        for connection in taken:
            server.resume(connection)
        controller = Controller(pool, endpoints, server.drop_export, hand_over=end.for_successor)
        control = ControlServer(controller)
        stack.push_async_callback(control.stop)
        await control.start(state.control_socket(record.name))
        if listen.http:
            stack.callback((await _serve_http(listen.http, pool, server)).stop)
        where = ", ".join(endpoints.uris())
        count = counted(len(pool.volumes()), "volume")
        print(f"stripewell: serving {record.name} on {where} ({count})", flush=True)
        systemd.notify("READY=1")
        await end.wait()
        systemd.notify("STOPPING=1")


def _log(line: str) -> None:
    print(f"stripewell: {line}", file=sys.stderr, flush=True)


def _untold(pool: Pool, problems: list[str]) -> list[str]:
    """What was wrong with URLs and is not told of a device that the pool misses."""
    told = pool.health().problems.values()
    return [problem for problem in problems if not any(problem in text for text in told)]


def _lookup(pool: Pool, name: str) -> Export | None:
    try:
        return pool.volume(name)
    except KeyError:
        return None


@asynccontextmanager
async def _listening(server: Server, listen: Listen, end: _End) -> AsyncIterator[Endpoints]:
    """The server on its sockets, stopped at the end; a successor gets its connections."""
    try:
        unix, tcp = _activated(server)
        if unix is None:
            unix = str(listen.unix)
            await server.listen_unix(unix)
        tcp = tcp or await _listen_tcp(server, listen.tcp)
        yield Endpoints(unix, tcp, listen.tls is not None and listen.tls.required)
    finally:
        if end.successor:
            end.connections = await server.hand_over(_GRACE_SECONDS)
        else:
            await server.stop(_GRACE_SECONDS)


def _activated(server: Server) -> tuple[str | None, Address | None]:
    """Listen on the sockets that systemd holds, if it does; where they are. Raises `UserError`."""
    unix, tcp = None, None
    for sock in systemd.listening():
        server.listen_on(sock)
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            unix = os.fsdecode(name)
        else:
            tcp = Address(name[0], name[1])
    return unix, tcp


async def _listen_tcp(server: Server, address: Address | None) -> Address | None:
    """Where it listens, with the port that was chosen for port 0. Raises `UserError`."""
    if address is None:
        return None
    try:
        return Address(address.host, await server.listen_tcp(address.host, address.port))
    except OSError as error:
        raise UserError(f"--tcp {address}: {one_line(error)}: give another address") from None


async def _serve_http(address: Address, pool: Pool, server: Server) -> HttpServer:
    # Only here: without --http none of it is in memory.
    from stripewell.metrics import CONTENT_TYPE, PoolCollector, render

    collector = PoolCollector(pool.status, server.counters)

    def metrics() -> Response:
        return HTTPStatus.OK, CONTENT_TYPE, render(collector)

    http = HttpServer({"/metrics": metrics, "/healthz": lambda: _health(pool)})
    await http.start(address)
    return http


def _health(pool: Pool) -> Response:
    """200 while reads and writes are served, 503 once writes are not."""
    state = pool.status()["state"]
    writes = state in {"healthy", "degraded"}
    return plain(HTTPStatus.OK if writes else HTTPStatus.SERVICE_UNAVAILABLE, state)
