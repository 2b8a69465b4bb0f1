"""The control socket: commands reach the daemon that serves a pool.

A unix socket of mode 0600 that carries one JSON object per line. A request is `{"call": OPERATION,
"args": {...}}`; the answer is any number of `{"progress": [done, total]}` and `{"busy": true}`
lines and then `{"result": ...}` or `{"error": "one line"}`. Requests of one connection are answered
in order. A daemon that is at work sends a line every few seconds; one that sends none hangs.

Invariants: lines, connections and unsent progress are bounded; whatever a client sends, the others
and the daemon go on; a client that leaves ends what it asked for only where that changes nothing.
Called by `daemon` (server) and `session` (client).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from stripewell.errors import UserError

MAX_REQUEST = 64 * 1024
MAX_REPLY = 16 * 1024 * 1024
MAX_CONNECTIONS = 32
_MAX_UNSENT_PROGRESS = 4096
#: How long a command waits for any line, and how often a daemon at work sends one.
ANSWER_SECONDS = 10.0
BUSY_SECONDS = 3.0

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


def no_progress(done: int, total: int) -> None:
    """For callers that show none."""


class Caller(Protocol):
    """Something that carries out operations by name: a `Controller`, here or behind the socket."""

    async def call(
        self, operation: str, args: dict[str, Any] | None = None, progress: Progress = no_progress
    ) -> Any:
        """The operation's JSON-able result. Raises `UserError`."""


class ControlServer:
    """Answers requests by a `Caller`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._path = Path()

    async def start(self, path: Path) -> None:
        """Listen on `path`. What is there already was left by a daemon that died: ours alone holds
        the lock on the devices. Raises `OSError`."""
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        except OSError as error:
            listener.close()
            raise UserError(f"can't listen on {path}: {error.strerror or error}") from None
        finally:
            os.umask(previous)
        self._server = await asyncio.start_unix_server(
            self._accepted, sock=listener, limit=MAX_REQUEST
        )

    async def stop(self) -> None:
        """Stop listening, remove the socket, end all connections."""
        if self._server:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.current_task()
        assert client is not None
        self._clients.add(client)
        try:
            if len(self._clients) > MAX_CONNECTIONS:
                _send(writer, {"error": "too many commands at once: try again"})
            else:
                await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client left or the daemon stops; there is nobody to tell
        finally:
            self._clients.discard(client)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                _send(writer, {"error": f"a request has at most {MAX_REQUEST} bytes"})
                return
            if not line.endswith(b"\n"):
                return
            busy = asyncio.create_task(_tell_busy(writer))
            try:
                answer = await self._answer(line, writer)
            finally:
                busy.cancel()
            _send(writer, answer)
            await writer.drain()

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> dict[str, Any]:
        def progress(done: int, total: int) -> None:
            if writer.is_closing():
                raise ConnectionResetError("the command was interrupted")
            if writer.transport.get_write_buffer_size() < _MAX_UNSENT_PROGRESS:
                _send(writer, {"progress": [done, total]})

        try:
            operation, args = _parse_request(line)
            return {"result": await self._caller.call(operation, args, progress)}
        except UserError as error:
            return {"error": str(error)}
        except ConnectionError:
            raise
        except Exception as error:
            log.exception("request %.200r failed", line)
            return {"error": f"internal error, see the daemon's log: {error!r}"}


class ControlClient:
    """A `Caller` behind the socket."""

    def __init__(
        self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path) -> ControlClient | None:
        """None if no daemon listens there, also when one died and left its socket."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return cls(path, *await asyncio.open_unix_connection(path, limit=MAX_REPLY))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except TimeoutError:
            raise _silent(path) from None
        except PermissionError:
            raise UserError(f"no permission for {path}: run this as the daemon's user") from None
        except OSError as error:
            raise UserError(f"can't connect to {path}: {error.strerror or error}") from None

    async def call(
        self, operation: str, args: dict[str, Any] | None = None, progress: Progress = no_progress
    ) -> Any:
        try:
            _send(self._writer, {"call": operation, "args": args or {}})
            while not {"result", "error"} & (reply := await self._line()).keys():
                if "progress" in reply:
                    progress(*reply["progress"])
        except TimeoutError:
            raise _silent(self._path) from None
        except (ConnectionError, ValueError):
            raise UserError("the daemon ended before it answered: look at its log") from None
        if "error" in reply:
            raise UserError(reply["error"])
        return reply["result"]

    async def _line(self) -> dict[str, Any]:
        async with asyncio.timeout(ANSWER_SECONDS):
            return _parse_object(await self._reader.readline())

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def _silent(path: Path) -> UserError:
    return UserError(
        f"the daemon behind {path} does not answer: it is stopped or hangs; look at its log, or"
        " end it with kill -9 and start it again"
    )


async def _tell_busy(writer: asyncio.StreamWriter) -> None:
    """A line every few seconds, until cancelled."""
    while not writer.is_closing():
        await asyncio.sleep(BUSY_SECONDS)
        if writer.transport.get_write_buffer_size() < _MAX_UNSENT_PROGRESS:
            _send(writer, {"busy": True})


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _parse_object(line: bytes) -> dict[str, Any]:
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def _parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        message = _parse_object(line)
    except (ValueError, RecursionError):
        raise UserError("a request is a JSON object on one line") from None
    operation, args = message.get("call"), message.get("args", {})
    if not isinstance(operation, str) or not isinstance(args, dict):
        raise UserError('a request has a string "call" and an object "args"')
    return operation, args
