"""The control socket: one protocol, bounded, and no client can take the daemon down."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stripewell import control
from stripewell.control import ControlClient, ControlServer, Progress, no_progress
from stripewell.errors import UserError


class Echo:
    """A caller for every kind of answer."""

    def __init__(self) -> None:
        self.interrupted = asyncio.Event()

    async def call(
        self, operation: str, args: dict[str, Any] | None = None, progress: Progress = no_progress
    ) -> Any:
        match operation:
            case "echo":
                return args
            case "count":
                for done in range(4):
                    progress(done, 3)
                return "counted"
            case "refuse":
                raise UserError("no such thing")
            case "break":
                raise ZeroDivisionError("a bug")
            case "forever":
                await self._forever(progress)
            case "slow":
                await asyncio.sleep(0.5)
                return "done"
            case "hang":
                await asyncio.Event().wait()
        return None

    async def _forever(self, progress: Progress) -> None:
        try:
            while True:
                progress(0, 1)
                await asyncio.sleep(0)
        finally:
            self.interrupted.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sock"


@pytest.fixture
async def caller() -> Echo:
    return Echo()


@pytest.fixture
async def server(path: Path, caller: Echo) -> AsyncIterator[ControlServer]:
    server = ControlServer(caller)
    await server.start(path)
    yield server
    await server.stop()


@pytest.fixture
async def client(path: Path, server: ControlServer) -> AsyncIterator[ControlClient]:
    client = await ControlClient.connect(path)
    assert client is not None
    yield client
    await client.close()


async def send(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Everything the server says to raw bytes followed by an end of file."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    lines = (await reader.read()).splitlines()
    writer.close()
    await writer.wait_closed()
    return [json.loads(line) for line in lines]


async def test_results_and_arguments_come_through(client: ControlClient) -> None:
    assert await client.call("echo", {"name": "ä\n", "size": 5}) == {"name": "ä\n", "size": 5}
    assert await client.call("echo") == {}


async def test_progress_comes_before_the_result(client: ControlClient) -> None:
    seen: list[tuple[int, int]] = []
    result = await client.call("count", progress=lambda done, total: seen.append((done, total)))
    assert result == "counted"
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


async def test_a_refusal_is_the_users_error_and_the_connection_lives(client: ControlClient) -> None:
    with pytest.raises(UserError, match="^no such thing$"):
        await client.call("refuse")
    assert await client.call("echo", {"a": 1}) == {"a": 1}


async def test_a_bug_is_told_and_logged_and_the_daemon_lives(
    client: ControlClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="internal error.*a bug"):
        await client.call("break")
    assert "ZeroDivisionError" in caplog.text
    assert await client.call("echo", {"a": 1}) == {"a": 1}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b"\xff\x00",
        b"[]",
        b"5",
        b"{}",
        b"[" * 60_000,
        b'{"call": 5}',
        b'{"call": "echo", "args": []}',
        b'{"call": "echo", "args": null}',
    ],
    ids=range(10),
)
async def test_garbage_gets_one_clear_line(path: Path, line: bytes) -> None:
    [answer] = await send(path, line + b"\n")
    assert "a request" in answer["error"]


@pytest.mark.usefixtures("server")
async def test_a_line_without_end_is_refused_in_bounded_memory(path: Path) -> None:
    [answer] = await send(path, b"x" * (control.MAX_REQUEST + 1))
    assert "at most" in answer["error"]


@pytest.mark.usefixtures("server")
async def test_half_a_request_is_none(path: Path) -> None:
    assert await send(path, b'{"call": "echo"}') == []


@pytest.mark.usefixtures("server")
async def test_requests_of_a_connection_are_answered_in_order(path: Path) -> None:
    request = b'{"call": "echo", "args": {"n": %d}}\n'
    answers = await send(path, b"".join(request % n for n in range(50)))
    assert [answer["result"]["n"] for answer in answers] == list(range(50))


@pytest.mark.usefixtures("server")
async def test_only_the_owner_may_connect(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_nobody_listens(path: Path, tmp_path: Path) -> None:
    assert await ControlClient.connect(path) is None
    assert await ControlClient.connect(tmp_path / "no" / "directory") is None


async def test_the_socket_of_a_dead_daemon_is_nobody_and_is_replaced(
    path: Path, caller: Echo
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert await ControlClient.connect(path) is None
    server = ControlServer(caller)
    await server.start(path)
    client = await ControlClient.connect(path)
    assert client is not None
    await client.close()
    await server.stop()
    assert not path.exists()


async def test_a_daemon_that_ends_in_mid_call_is_told_in_one_line(
    client: ControlClient, server: ControlServer
) -> None:
    call = asyncio.ensure_future(client.call("hang"))
    await asyncio.sleep(0.05)
    await server.stop()
    with pytest.raises(UserError, match="ended before it answered"):
        await call


@pytest.mark.usefixtures("server")
async def test_a_client_that_leaves_interrupts_what_reports_progress(
    path: Path, caller: Echo
) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b'{"call": "forever"}\n')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await asyncio.wait_for(caller.interrupted.wait(), 5)


async def test_connections_are_bounded(
    path: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_CONNECTIONS", 1)
    first = await ControlClient.connect(path)
    assert first is not None
    assert await first.call("echo") == {}
    second = await ControlClient.connect(path)
    assert second is not None
    with pytest.raises(UserError, match="too many|ended"):
        await second.call("echo")
    await second.close()
    assert await first.call("echo") == {}
    await first.close()


async def test_a_path_too_long_for_a_socket_is_told(tmp_path: Path, caller: Echo) -> None:
    with pytest.raises(UserError, match="can't listen"):
        await ControlServer(caller).start(tmp_path / ("x" * 200))
    with pytest.raises(UserError, match="can't connect"):
        await ControlClient.connect(tmp_path / ("x" * 200))


async def test_long_work_is_waited_for(
    client: ControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.25)
    monkeypatch.setattr(control, "BUSY_SECONDS", 0.05)
    assert await client.call("slow") == "done"


async def test_a_daemon_that_hangs_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to a stopped process succeed: the kernel takes them."""
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = await ControlClient.connect(path)
        assert client is not None
        with pytest.raises(UserError, match="does not answer"):
            await client.call("echo")
        await client.close()
