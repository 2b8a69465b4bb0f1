"""Server and sessions over real sockets: what they hold, when they stop reading, how they end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from nbd_server.export import Export
from nbd_server.limits import Limits
from nbd_server.server import Server
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire
from tests.unit.nbd_server.wire import Client

MIB = 1 << 20


class World:
    """A server with one volume `vol`, and the clients of a test."""

    def __init__(self, path: str, limits: Limits) -> None:
        self.path = path
        self.volume = MemoryExport("vol", 64 * MIB)
        self.named: dict[str, Export] = {"vol": self.volume}
        self.server = Server(self.named.get, lambda: [self.volume], limits)
        self.clients: list[Client] = []

    async def client(self, *, structured: bool = True, port: int | None = None) -> Client:
        client = await Client.ready(port or self.path, structured=structured)
        self.clients.append(client)
        return client

    async def raw(self) -> Client:
        client = await Client.connect(self.path)
        self.clients.append(client)
        return client


Start = Callable[..., Awaitable[World]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    worlds: list[World] = []

    async def begin(limits: Limits | None = None) -> World:
        world = World(str(tmp_path / "nbd.sock"), limits or Limits())
        await world.server.listen_unix(world.path)
        worlds.append(world)
        return world

    yield begin
    for world in worlds:
        world.volume.gate.set()
        await world.server.stop(grace_seconds=1)
        assert world.server.connections == 0
        assert world.server.held_bytes == 0
        for client in world.clients:
            await client.close()


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError("what the test waits for did not happen")


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("slow", [False, True])
async def test_a_conversation(start: Start, structured: bool, slow: bool) -> None:
    world = await start()
    world.volume.slow = slow
    client = await world.client(structured=structured)
    for length in (1, 512, 65536, 65537, MIB, MIB + 1, 5 * MIB + 3):
        payload = os.urandom(length)
        assert await client.ask(wire.WRITE, 1, offset=7, length=length, payload=payload) == (
            wire.Answer(1)
        )
        assert (await client.ask(wire.READ, 2, offset=7, length=length)).data == payload
    assert await client.ask(wire.FLUSH, 3) == wire.Answer(3)
    status = await client.ask(wire.STATUS, 4, length=64 * MIB)
    assert (status.error == 0) is structured
    client.send(wire.request(wire.DISC))
    assert await client.ended()
    assert sum(world.server.counters.latency) == 16


async def test_bytes_one_at_a_time(start: Start) -> None:
    world = await start()
    client = await world.raw()
    await client.greet()
    stream = wire.option(wire.STRUCTURED) + wire.option(wire.GO, wire.info("vol"))
    stream += wire.write(1, 0, b"abc") + wire.request(wire.READ, 2, 0, 4)
    for byte in stream:
        client.send(bytes([byte]))
        await asyncio.sleep(0)
    while (await client.option_reply())[:2] != (wire.GO, wire.ACK):
        pass
    assert await client.answer() == wire.Answer(1)
    assert (await client.answer()).data == b"abc\0"


async def test_everything_at_once(start: Start) -> None:
    world = await start()
    client = await world.raw()
    stream = wire.client_flags() + wire.option(wire.GO, wire.info("vol"))
    stream += b"".join(wire.write(n, n * 4096, bytes([n]) * 4096) for n in range(200))
    client.send(stream + wire.request(wire.DISC))
    await client.reader.readexactly(18)
    while (await client.option_reply())[:2] != (wire.GO, wire.ACK):
        pass
    assert [(await client.answer()).cookie for _ in range(200)] == list(range(200))
    assert await client.ended()
    assert world.volume.data[199 * 4096] == 199


async def test_the_payload_of_a_refused_write_is_consumed(start: Start) -> None:
    world = await start()
    client = await world.client()
    for length in (1, 4096, 100_000, 32 * MIB):
        answer = await client.ask(
            wire.WRITE, 1, offset=64 * MIB, length=length, payload=bytes(length)
        )
        assert answer.error == errno.ENOSPC
        assert (await client.ask(wire.READ, 2, length=1)).data == b"\0"
    assert world.server.held_bytes == 0


@pytest.mark.parametrize("length", [65537, MIB, MIB + 1, MIB + 8192, 2 * MIB])
async def test_a_waiting_payload_is_left_alone(start: Start, length: int) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    client, other = await world.client(), await world.client()
    payload = os.urandom(length)
    client.send(wire.write(1, 0, payload))
    await until(lambda: world.volume.waiting == 1)
    world.volume.slow = False
    answer = await other.ask(wire.WRITE, 1, offset=8 * MIB, length=MIB, payload=bytes(MIB))
    assert answer == wire.Answer(1)
    assert (await other.ask(wire.READ, 2, offset=8 * MIB, length=MIB)).data == bytes(MIB)
    world.volume.gate.set()
    assert await client.answer() == wire.Answer(1)
    assert world.volume.data[:length] == payload


async def test_wrong_magic_closes_that_connection_alone(start: Start) -> None:
    world = await start()
    bad, good = await world.client(), await world.client()
    bad.send(wire.request(wire.READ, 1, 0, 4) + bytes(28))
    assert (await bad.answer()).data == bytes(4)
    assert await bad.ended()
    assert (await good.ask(wire.READ, 1, length=1)).data == b"\0"


async def test_abort_and_unknown_names_close(start: Start) -> None:
    world = await start()
    client = await world.raw()
    await client.greet()
    client.send(wire.option(wire.ABORT))
    assert (await client.option_reply())[:2] == (wire.ABORT, wire.ACK)
    assert await client.ended()
    client = await world.raw()
    await client.greet()
    client.send(wire.option(wire.EXPORT_NAME, b"nothing"))
    assert await client.ended()


async def test_a_client_that_does_not_negotiate_is_closed(start: Start) -> None:
    world = await start(Limits(handshake_seconds=0.05))
    idle = await world.client()
    silent = await world.raw()
    await silent.reader.readexactly(18)
    assert await silent.ended()
    assert (await idle.ask(wire.READ, 1, length=1)).data == b"\0"


async def test_one_connection_too_many_is_closed_at_once(start: Start) -> None:
    world = await start(Limits(connections=2))
    first, _ = await world.client(), await world.client()
    third = await world.raw()
    assert await third.ended()
    assert world.server.counters.refused_connections == 1
    await first.close()
    await until(lambda: world.server.connections == 1)
    assert (await (await world.client()).ask(wire.READ, 1, length=1)).data == b"\0"


async def test_disc_finishes_what_is_outstanding(start: Start) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    client = await world.client()
    client.send(wire.write(1, 0, b"late") + wire.request(wire.DISC))
    await until(lambda: world.volume.waiting == 1)
    world.volume.gate.set()
    assert await client.answer() == wire.Answer(1)
    assert await client.ended()
    assert world.volume.data[:4] == b"late"


@pytest.mark.parametrize("length", [4, 3 * MIB])
async def test_a_dead_connection_writes_no_more(start: Start, length: int) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    ghost = await world.client()
    ghost.send(wire.write(1, 0, b"g" * length))
    await until(lambda: world.volume.waiting == 1)
    await ghost.close()
    await until(lambda: world.volume.waiting == 0)
    world.volume.gate.set()
    await until(lambda: world.server.connections == 0)
    assert world.volume.data[0] == 0
    assert world.server.held_bytes == 0


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_reconnecting_client_is_not_overtaken_by_its_ghost(start: Start, tcp: bool) -> None:
    """The old connection is not even being read, so that only the new one can notice (R8)."""
    world = await start(Limits(connection_requests=1))
    port = await world.server.listen_tcp("127.0.0.1", 0) if tcp else None
    world.volume.slow = True
    world.volume.gate.clear()
    ghost = await world.client(port=port)
    ghost.send(wire.write(1, 0, b"old"))
    await until(lambda: world.volume.waiting == 1)
    ghost.send(wire.write(2, 4096, b"old"))
    await ghost.close()
    heir = await world.client(port=port)
    await until(lambda: world.volume.waiting == 0)
    world.volume.gate.set()
    assert await heir.ask(wire.WRITE, 1, offset=0, length=3, payload=b"new") == wire.Answer(1)
    assert world.server.connections == 1
    assert world.volume.data[:8195] == b"new" + bytes(8192)


async def test_a_client_that_does_not_receive_is_not_read_from(start: Start) -> None:
    world = await start()
    greedy, other = await world.client(structured=False), await world.client()
    for cookie in range(200):
        greedy.reads[cookie] = MIB
        greedy.send(wire.request(wire.READ, cookie, 0, MIB))
    transport = greedy.writer.transport
    transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.2)
    assert 0 < world.server.held_bytes <= 2 * MIB
    assert world.server.counters.reads < 10
    assert (await other.ask(wire.READ, 1, length=1)).data == b"\0"
    transport.resume_reading()  # type: ignore[attr-defined]
    for cookie in range(200):
        answer = await greedy.answer()
        assert (answer.cookie, len(answer.data)) == (cookie, MIB)


async def test_a_flood_of_lists_is_answered_as_far_as_it_is_received(start: Start) -> None:
    world = await start()
    world.volume.description = "d" * 4096
    client = await world.raw()
    await client.greet()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(wire.option(wire.LIST) * 5000)
    await asyncio.sleep(0.1)
    assert world.server.held_bytes < 64 << 10
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    kinds = [(await client.option_reply())[1] for _ in range(10_000)]
    assert kinds == [wire.SERVER, wire.ACK] * 5000


async def test_in_flight_bytes_of_a_connection_are_bounded(start: Start) -> None:
    world = await start(Limits(connection_bytes=2 * MIB))
    world.volume.slow = True
    world.volume.gate.clear()
    client = await world.client()
    for cookie in range(64):
        client.send(wire.write(cookie, cookie * 65536, b"x" * 65536))
    await until(lambda: world.volume.waiting > 0)
    await asyncio.sleep(0.1)
    assert world.server.held_bytes <= 2 * MIB + MIB
    world.volume.gate.set()
    cookies = {(await client.answer()).cookie for _ in range(64)}
    assert cookies == set(range(64))


async def test_a_request_longer_than_all_bounds_is_served_alone(start: Start) -> None:
    world = await start(Limits(connection_bytes=MIB, server_bytes=MIB))
    client = await world.client()
    payload = os.urandom(3 * MIB)
    for _ in range(2):
        answer = await client.ask(wire.WRITE, 1, length=len(payload), payload=payload)
        assert answer == wire.Answer(1)
    assert (await client.ask(wire.READ, 2, length=len(payload))).data == payload


async def test_requests_in_flight_of_a_connection_are_bounded(start: Start) -> None:
    world = await start(Limits(connection_requests=10, batch_requests=4))
    world.volume.gate.clear()
    client = await world.client()
    for cookie in range(100):
        client.send(wire.request(wire.FLUSH, cookie))
    await until(lambda: world.volume.waiting >= 10)
    await asyncio.sleep(0.05)
    assert world.volume.waiting <= 13
    world.volume.gate.set()
    assert {(await client.answer()).cookie for _ in range(100)} == set(range(100))


async def test_a_full_server_waits_and_goes_on(start: Start) -> None:
    world = await start(Limits(server_bytes=4 * MIB))
    world.volume.slow = True
    world.volume.gate.clear()
    clients = [await world.client() for _ in range(6)]
    for client in clients:
        client.send(wire.write(1, 0, b"x" * 2 * MIB))
    await until(lambda: world.server.held_bytes >= 4 * MIB)
    await asyncio.sleep(0.1)
    assert world.server.held_bytes <= 6 * MIB
    world.volume.gate.set()
    for client in clients:
        assert await client.answer() == wire.Answer(1)


async def test_who_stalls_while_others_wait_is_closed(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    world = await start(Limits(server_bytes=2 * MIB, stall_seconds=0.5))
    stalled, other = await world.client(), await world.client()
    stalled.send(wire.request(wire.WRITE, 1, 0, 2 * MIB) + b"x")
    await until(lambda: world.server.held_bytes >= 2 * MIB)
    with caplog.at_level(logging.WARNING):
        answer = await other.ask(wire.WRITE, 1, offset=0, length=1, payload=b"y")
    assert answer == wire.Answer(1)
    assert "stalls" in caplog.text
    assert await stalled.ended()


async def test_long_requests_do_not_hold_up_short_ones(start: Start) -> None:
    world = await start()
    heavy, light = await world.client(), await world.client()
    for cookie in range(4):
        heavy.send(wire.request(wire.READ, cookie, 0, 32 * MIB))
    done = 0
    for _ in range(20):
        assert (await light.ask(wire.READ, 1, length=4096)).data == bytes(4096)
        done = world.server.counters.read_bytes
    assert done < 4 * 32 * MIB
    for _ in range(4):
        assert len((await heavy.answer()).data) == 32 * MIB


async def test_a_deleted_volume_answers_eshutdown_and_ends(start: Start) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    busy, idle = await world.client(), await world.client()
    busy.send(wire.write(1, 0, b"x") + wire.request(wire.READ, 2, 0, 1))
    await until(lambda: world.volume.waiting == 2)
    world.volume.closed = True
    world.server.drop_export("vol")
    answers = [await busy.answer(), await busy.answer()]
    assert {(a.cookie, a.error) for a in answers} == {(n, errno.ESHUTDOWN) for n in (1, 2)}
    assert await busy.ended()
    assert await idle.ended()
    assert world.volume.data[0] == 0


@pytest.mark.parametrize("length", [1, 100_000, 2 * MIB])
async def test_a_request_to_a_closed_export(start: Start, length: int) -> None:
    world = await start()
    client = await world.client()
    world.volume.closed = True
    answer = await client.ask(wire.WRITE, 5, length=length, payload=b"x" * length)
    assert (answer.cookie, answer.error) == (5, errno.ESHUTDOWN)
    assert await client.ended()
    assert world.volume.data[0] == 0


async def test_stopping_finishes_what_is_in_flight_and_says_nothing(start: Start) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    busy, idle = await world.client(), await world.client()
    busy.send(wire.write(1, 0, b"last"))
    await until(lambda: world.volume.waiting == 1)
    stopping = asyncio.create_task(world.server.stop(grace_seconds=5))
    assert await idle.ended()
    world.volume.gate.set()
    assert await busy.answer() == wire.Answer(1)
    assert await busy.ended()
    await stopping
    assert not Path(world.path).exists()


async def test_stopping_has_an_end(start: Start) -> None:
    world = await start()
    world.volume.slow = True
    world.volume.gate.clear()
    client = await world.client()
    client.send(wire.write(1, 0, b"never"))
    await until(lambda: world.volume.waiting == 1)
    await world.server.stop(grace_seconds=0.05)
    assert await client.ended()
    world.volume.gate.set()
    await asyncio.sleep(0)
    assert world.volume.data[0] == 0


async def test_a_mistake_in_an_export_is_an_error_reply_and_a_log_line(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    world = await start()
    client = await world.client()
    world.volume.failure = ZeroDivisionError("a mistake")
    assert (await client.ask(wire.READ, 1, length=1)).error == errno.EIO
    assert "a mistake" in caplog.text


async def test_a_stale_socket_file_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    volume = MemoryExport("vol", 4096)
    first = Server({"vol": volume}.get, lambda: [volume])
    second = Server({"vol": volume}.get, lambda: [volume])
    await first.listen_unix(path)
    with pytest.raises(OSError, match="another server") as caught:
        await second.listen_unix(path)
    assert caught.value.errno == errno.EADDRINUSE
    client = await Client.ready(path)
    await client.close()
    other = tmp_path / "file"
    other.write_text("precious")
    with pytest.raises(OSError, match="a file is there"):
        await second.listen_unix(other)
    await first.stop(1)
    await second.stop(1)
    assert other.read_text() == "precious"


async def test_tcp() -> None:
    volume = MemoryExport("vol", 4096)
    server = Server({"vol": volume}.get, lambda: [volume])
    port = await server.listen_tcp("127.0.0.1", 0)
    with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
        await server.listen_tcp("127.0.0.1", port)
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    await client.greet()
    client.send(wire.option(wire.GO, wire.info("vol")))
    while (await client.option_reply())[1] != wire.ACK:
        pass
    assert (await client.ask(wire.READ, 1, length=9)).data == bytes(9)
    await server.stop(1)
    assert await client.ended()
    await client.close()


async def test_extended_headers(start: Start) -> None:
    world = await start()
    client = await Client.ready(world.path, longer=True)
    world.clients.append(client)
    data = bytes(range(256)) * 2048
    mark = {"flags": wire.PAYLOAD}
    for payload in (data[:4096], data):
        length = len(payload)
        done = await client.ask(wire.WRITE, 1, offset=512, length=length, payload=payload, **mark)
        assert done == wire.Answer(1)
        assert (await client.ask(wire.READ, 2, offset=512, length=length)).data == payload
    status = await client.ask(wire.STATUS, 3, offset=0, length=64 * MIB)
    assert status.extents[0] == (len(data) + 4096, 0)
    assert await client.ask(wire.ZEROES, 4, offset=0, length=64 * MIB) == wire.Answer(4)
    assert await client.ask(wire.FLUSH, 5) == wire.Answer(5)


@pytest.mark.parametrize("length", [8, 5000, 300_000])
async def test_payloads_where_none_belong_are_refused_whole(start: Start, length: int) -> None:
    """Their bytes are never taken for requests, and the connection goes on."""
    world = await start()
    client = await Client.ready(world.path, longer=True)
    world.clients.append(client)
    payload = (wire.extended(wire.DISC) * (length // 32 + 1))[:length]
    for kind in (wire.READ, wire.FLUSH, wire.TRIM, wire.CACHE, wire.ZEROES, 77):
        answer = await client.ask(kind, kind, length=length, flags=wire.PAYLOAD, payload=payload)
        assert (answer.cookie, answer.error) == (kind, errno.EINVAL)
    assert (await client.ask(wire.READ, 9, length=4)).data == bytes(4)


async def test_an_endless_payload_ends_the_connection(start: Start) -> None:
    world = await start()
    client = await Client.ready(world.path, longer=True)
    world.clients.append(client)
    client.send(wire.extended(wire.TRIM, 1, 0, 1 << 62, wire.PAYLOAD))
    assert await client.ended()
