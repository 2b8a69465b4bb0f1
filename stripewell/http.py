"""A minimal HTTP/1.1 server for metrics and health: GET and HEAD of fixed paths, nothing else.

It runs in the daemon's loop, so a page reads the pool's state without locks, at one moment. A
request is one line and headers of at most 16 KiB within ten seconds; every answer closes its
connection; at most 32 connections are open at a time. Called by `daemon`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from http import HTTPStatus

from stripewell.endpoints import Address
from stripewell.errors import UserError

_MAX_HEAD = 16 * 1024
_MAX_CONNECTIONS = 32
_SECONDS = 10.0

#: Status, content type and body of an answer.
Response = tuple[HTTPStatus, str, bytes]


class HttpServer:
    """Serves `pages`: path to a function that makes the answer."""

    def __init__(self, pages: Mapping[str, Callable[[], Response]]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, address: Address) -> int:
        """Listen; the port chosen, for port 0. Raises `UserError`."""
        try:
            self._server = await asyncio.start_server(
                self._accepted, address.host, address.port, limit=_MAX_HEAD
            )
        except OSError as error:
            raise UserError(
                f"--http {address}: can't listen: {error.strerror or error}: give another address"
            ) from None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        if self._server:
            self._server.close()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_SECONDS):
                    await self._serve(reader, writer)
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass  # a client that is slow or gone
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            head = b""
        method, path = _parse_head(head)
        status, kind, body = self._answer(method, path)
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        )
        if method != "HEAD":
            writer.write(body)
        await writer.drain()

    def _answer(self, method: str, path: str) -> Response:
        if not method:
            return plain(HTTPStatus.BAD_REQUEST)
        if path not in self._pages:
            return plain(HTTPStatus.NOT_FOUND, f"try one of {', '.join(self._pages)}")
        if method not in {"GET", "HEAD"}:
            return plain(HTTPStatus.METHOD_NOT_ALLOWED)
        return self._pages[path]()


def plain(status: HTTPStatus, text: str = "") -> Response:
    """An answer of one line of text."""
    return status, "text/plain; charset=utf-8", f"{text or status.phrase}\n".encode()


def _parse_head(head: bytes) -> tuple[str, str]:
    """Method and path without query; both empty if it is no HTTP."""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "", ""
    return words[0], words[1].partition("?")[0]
