"""Listeners and sessions: the public face of the package.

    server = Server(exports=volumes.get, list_exports=lambda: list(volumes.values()))
    await server.listen_unix("/run/stripewell/tank.sock")
    ...
    await server.stop(grace_seconds=5)

Invariants: connections are bounded; an idle one costs a socket and a small object. Before a session
serves its first request, those sessions of the same export whose client has gone are ended, so that
a client that reconnects is never overtaken by its own earlier writes (R8). Called by the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from nbd_server.buffers import Budget
from nbd_server.counters import Counters
from nbd_server.export import Export
from nbd_server.handover import Handed
from nbd_server.handshake import Agreement, Exports
from nbd_server.limits import Limits
from nbd_server.replies import Framing
from nbd_server.session import Session, Shared
from nbd_server.tls import Stream, Tls
from nbd_server.transmission import buffer_pool

_log = logging.getLogger(__name__)

_INBOUND_BYTES = 256 << 10
_BACKLOG = 128
#: Connections accepted in one turn.
_ACCEPT_AT_ONCE = 16
#: Pause after accept() failed for want of file descriptors or memory.
_ACCEPT_PAUSE = 1.0
#: How often clients are looked at that hold memory others wait for.
_SWEEP_SECONDS = 1.0
#: How long cancelled requests may take to return when the server stops.
_UNWIND_SECONDS = 1.0
#: How often it is seen whether all connections are between two requests.
_QUIET_STEP = 0.002


@dataclass(frozen=True, slots=True)
class _Listener:
    sock: socket.socket
    #: Path of a unix socket, and its inode if it is removed with the listener.
    path: str | None = None
    inode: int | None = None


class Server:
    """Serves exports by name to NBD clients. Create it in the event loop that it is to run in."""

    def __init__(
        self,
        exports: Callable[[str], Export | None],
        list_exports: Callable[[], list[Export]],
        limits: Limits | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        hung_up: Callable[[Stream], bool] | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.counters = Counters()
        self._listeners: list[_Listener] = []
        #: In the order of their arrival.
        self._sessions: dict[Session, None] = {}
        self._stalled: dict[Session, float] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._budget = Budget(self.limits.server_bytes)
        self._shared = Shared(
            loop=self._loop,
            exports=Exports(exports, list_exports),
            limits=self.limits,
            counters=self.counters,
            budget=self._budget,
            buffers=buffer_pool(self.limits),
            inbound=memoryview(bytearray(_INBOUND_BYTES + self.limits.option_bytes)),
            clock=clock,
            hung_up=hung_up or _hung_up,
            entered=self._fence,
            ended=self._ended,
            tls=tls,
        )
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._sessions)

    @property
    def held_bytes(self) -> int:
        """Payloads and replies in memory now."""
        return self._budget.used

    # --- listening -----------------------------------------------------------------------------

    async def listen_unix(self, path: str | os.PathLike[str]) -> None:
        """Listen at `path`. A socket file that nobody listens on any more is replaced.

        Raises OSError if another server answers there or something else is in the way."""
        name = os.fspath(path)
        _remove_stale(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(name)
            inode = os.stat(name).st_ino
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot listen at {name}: {error.strerror}") from None
        self._listen(_Listener(sock, name, inode))

    async def listen_tcp(self, host: str, port: int) -> int:
        """Listen at a TCP port, 0 for any free one; returns the port."""
        found = await self._loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise OSError(
                error.errno, f"cannot listen at {host}:{port}: {error.strerror}"
            ) from None
        self._listen(_Listener(sock))
        actual: int = sock.getsockname()[1]
        return actual

    def listen_on(self, sock: socket.socket) -> None:
        """Accept connections from a socket that listens already; whoever made it keeps its path."""
        unix = sock.family == socket.AF_UNIX
        self._listen(_Listener(sock, str(sock.getsockname()) if unix else None))

    def _listen(self, listener: _Listener) -> None:
        listener.sock.setblocking(False)
        listener.sock.listen(_BACKLOG)
        self._listeners.append(listener)
        self._loop.add_reader(listener.sock, self._accept, listener)

    def _accept(self, listener: _Listener) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("cannot accept connections: %s; trying again soon", error)
                self._loop.remove_reader(listener.sock)
                self._loop.call_later(_ACCEPT_PAUSE, self._accept_again, listener)
                return
            peer = listener.path if listener.path is not None else f"{address[0]}:{address[1]}"
            self.adopt(sock, peer)

    def _accept_again(self, listener: _Listener) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener.sock, self._accept, listener)

    def adopt(self, sock: socket.socket, peer: str) -> None:
        """Greet the client behind a connected socket and serve it from now on; `peer` names it in
        the log."""
        if len(self._sessions) >= self.limits.connections:
            self.counters.refused_connections += 1
            sock.close()
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.counters.connections += 1
        session = Session(sock, peer, self._shared)
        self._sessions[session] = None
        self._idle.clear()
        session.start()

    def resume(self, handed: Handed) -> None:
        """Go on with a connection of a predecessor. If its export is gone it is closed."""
        export = self._shared.exports.get(handed.export)
        if export is None:
            handed.sock.close()
            return
        handed.sock.setblocking(False)
        agreement = Agreement(
            export, Framing(handed.structured, handed.extended), handed.contexts, handed.alignment
        )
        self.counters.connections += 1
        session = Session(handed.sock, handed.peer, self._shared)
        self._sessions[session] = None
        self._idle.clear()
        session.resume(agreement, handed.kept)

    # --- sessions ------------------------------------------------------------------------------

    def drop_export(self, name: str) -> None:
        """End the sessions of a deleted export: requests in flight are answered ESHUTDOWN."""
        for session in self._of(name):
            session.expel()

    def _of(self, name: str) -> list[Session]:
        return [s for s in self._sessions if s.export is not None and s.export.name == name]

    def _fence(self, entering: Session) -> None:
        assert entering.export is not None
        for session in self._of(entering.export.name):
            if session is not entering and not session.finishing and session.hung_up():
                session.close()

    def _ended(self, session: Session) -> None:
        self._sessions.pop(session, None)
        self._stalled.pop(session, None)
        if not self._sessions:
            self._idle.set()

    def _sweep(self) -> None:
        """Where memory is short, end sessions whose clients keep some without moving a byte."""
        self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)
        if not self._budget.contended:
            self._stalled.clear()
            return
        for session in [s for s in self._sessions if not s.closed]:
            stalled = self._stalled.get(session, 0.0) + _SWEEP_SECONDS
            if not session.stalls():
                self._stalled.pop(session, None)
            elif stalled > self.limits.stall_seconds:
                session.close("it stalls while others wait for memory")
            else:
                self._stalled[session] = stalled

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener.sock)
            listener.sock.close()
            _remove_own(listener)
        self._listeners.clear()

    # --- the end -------------------------------------------------------------------------------

    async def hand_over(self, grace_seconds: float) -> list[Handed]:
        """Accept no more, finish requests in flight for at most `grace_seconds`, and give away the
        connections. Those that cannot be (in negotiation, with TLS, not quiet in time) are closed.
        """
        self._stop_listening()
        for session in list(self._sessions):
            session.pause()
        for _ in range(int(grace_seconds / _QUIET_STEP)):
            # Without a transmission phase, or with TLS, they never will be.
            if all(s.quiet or s.export is None or s.secured for s in self._sessions):
                break
            await asyncio.sleep(_QUIET_STEP)
        handed = [session.detach() for session in list(self._sessions) if session.quiet]
        await self.stop(0)
        return handed

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more, finish requests in flight for at most `grace_seconds`, close.

        Nobody is told ESHUTDOWN: clients see a lost connection and may reconnect to a successor."""
        self._sweeper.cancel()
        self._stop_listening()
        for session in list(self._sessions):
            session.finish()
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            tasks = [task for session in self._sessions for task in session.tasks]
            for session in list(self._sessions):
                session.close("requests did not finish before the server had to stop")
            if tasks:
                # They are cancelled; the export may go once they have let go of it.
                await asyncio.wait(tasks, timeout=_UNWIND_SECONDS)


def _hung_up(sock: Stream) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _remove_stale(path: str) -> None:
    """Make room for a socket at `path`, or raise OSError with the remedy."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(
            errno.EEXIST, f"cannot listen at {path}: a file is there; remove it or choose another"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            # Its backlog is full: alive.
            pass
    raise OSError(
        errno.EADDRINUSE, f"cannot listen at {path}: another server does; stop it or choose another"
    )


def _remove_own(listener: _Listener) -> None:
    """Remove the socket file unless a successor has put its own there."""
    if listener.path is None or listener.inode is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if os.stat(listener.path).st_ino == listener.inode:
            os.unlink(listener.path)
