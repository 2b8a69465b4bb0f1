"""The HTTP side: fixed pages, bounded requests, plain errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest

from stripewell import http
from stripewell.endpoints import Address
from stripewell.errors import UserError
from stripewell.http import HttpServer, plain


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = HttpServer({"/metrics": lambda: plain(HTTPStatus.OK, "a 1")})
    yield await server.start(Address("127.0.0.1", 0))
    server.stop()


async def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        ("GET /metrics HTTP/1.1", 200, b"a 1\n"),
        ("GET /metrics?x=1 HTTP/1.0", 200, b"a 1\n"),
        ("HEAD /metrics HTTP/1.1", 200, b""),
        ("POST /metrics HTTP/1.1", 405, b"Method Not Allowed\n"),
        ("GET /../../etc/passwd HTTP/1.1", 404, b"try one of /metrics\n"),
        ("GET", 400, b"Bad Request\n"),
        ("\x00\xff", 400, b"Bad Request\n"),
    ],
)
async def test_a_request(port: int, request_line: str, status: int, body: bytes) -> None:
    assert await exchange(port, request_line.encode() + b"\r\nHost: x\r\n\r\n") == (status, body)


async def test_a_head_without_end_is_refused(port: int) -> None:
    status, _ = await exchange(port, b"GET /metrics HTTP/1.1\r\n" + b"x" * 40_000)
    assert status == 400


async def test_a_slow_client_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SECONDS", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /met")
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await writer.wait_closed()


async def test_a_port_in_use_is_one_line(port: int) -> None:
    with pytest.raises(UserError, match="can't listen"):
        await HttpServer({}).start(Address("127.0.0.1", port))
