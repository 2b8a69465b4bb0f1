"""Connections that go from one server to the next: nothing is lost, repeated or noticed."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbd_server.handover import Handed, receive, send
from nbd_server.server import Server
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire
from tests.unit.nbd_server.wire import Client

MIB = 1 << 20


@pytest.fixture
async def clients() -> AsyncIterator[list[Client]]:
    made: list[Client] = []
    yield made
    for client in made:
        await client.close()


class World:
    """One volume, and servers that follow each other."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.volume = MemoryExport("vol", 64 * MIB)
        self.server = self._server()

    def _server(self) -> Server:
        named = {"vol": self.volume}
        return Server(named.get, lambda: [self.volume])

    async def succeed(self) -> int:
        """Replace the server, through a real socket; returns how many connections went along."""
        handed = await self.server.hand_over(5)
        here, there = socket.socketpair()
        with here, there:
            sending = asyncio.create_task(asyncio.to_thread(send, here, handed))
            received = await asyncio.to_thread(lambda: list(receive(there)))
            await sending
        self.server = self._server()
        await self.server.listen_unix(self.path)
        for one in received:
            self.server.resume(one)
        return len(received)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    one = World(tmp_path / "nbd.sock")
    await one.server.listen_unix(one.path)
    yield one
    await one.server.stop(5)


@pytest.mark.parametrize("structured", [False, True])
async def test_a_client_goes_on(world: World, clients: list[Client], structured: bool) -> None:
    client = await Client.ready(world.path, structured=structured)
    clients.append(client)
    assert await client.ask(wire.WRITE, 1, offset=0, length=3, payload=b"old") == wire.Answer(1)
    for number in range(3):
        assert await world.succeed() == 1
        assert (await client.ask(wire.READ, 10 + number, length=3)).data == b"old"
    if structured:
        status = await client.ask(wire.STATUS, 20, offset=0, length=MIB)
        assert status.extents == ((4096, 0), (MIB - 4096, 3))


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 1000])
async def test_requests_cut_by_the_handover(world: World, clients: list[Client], cut: int) -> None:
    """Some bytes of a request before, the rest behind; requests that nobody has looked at, too."""
    client = await Client.ready(world.path)
    clients.append(client)
    stream = wire.write(1, 0, b"a" * 2000) + wire.request(wire.FLUSH, 2)
    client.send(stream[:cut])
    await asyncio.sleep(0.05)
    handing = asyncio.create_task(world.succeed())
    await asyncio.sleep(0.01)
    client.send(stream[cut:])
    assert await handing == 1
    assert sorted([(await client.answer()).cookie for _ in range(2)]) == [1, 2]
    assert world.volume.data[:2001] == b"a" * 2000 + b"\0"


async def test_requests_in_flight_are_answered_first(world: World, clients: list[Client]) -> None:
    client = await Client.ready(world.path)
    clients.append(client)
    world.volume.slow = True
    world.volume.gate.clear()
    client.send(wire.write(1, 0, b"x" * 100) + wire.write(2, 0, bytes(3 * MIB))[: 2 * MIB])
    await asyncio.sleep(0.05)
    handing = asyncio.create_task(world.succeed())
    await asyncio.sleep(0.05)
    assert not handing.done()
    # The payload of a long write is received to its end.
    client.send(bytes(MIB + 28))
    world.volume.gate.set()
    assert await handing == 1
    assert sorted([(await client.answer()).cookie for _ in range(2)]) == [1, 2]
    world.volume.slow = False
    assert (await client.ask(wire.READ, 3, length=2)).data == bytes(2)


async def test_a_load_does_not_notice(world: World, clients: list[Client]) -> None:
    """Pipelined writes and reads through a dozen servers: every answer once, every byte right."""
    rng = random.Random(1)
    clients.extend([await Client.ready(world.path) for _ in range(4)])
    done = False

    async def load(number: int, client: Client) -> int:
        start, cookie, rounds = number * MIB, 0, 0
        while not done:
            blocks = [rng.randbytes(rng.choice((512, 4096, 70_000))) for _ in range(8)]
            for i, block in enumerate(blocks):
                client.send(wire.write(cookie + i, start + i * 100_000, block))
            answers = [await client.answer() for _ in blocks]
            assert sorted(a.cookie for a in answers) == list(range(cookie, cookie + 8))
            assert not any(a.error for a in answers)
            for i, block in enumerate(blocks):
                found = await client.ask(
                    wire.READ, cookie + 8, offset=start + i * 100_000, length=len(block)
                )
                assert found.data == block
            cookie, rounds = cookie + 9, rounds + 1
        return rounds

    loads = [asyncio.create_task(load(n, client)) for n, client in enumerate(clients)]
    for _ in range(12):
        await asyncio.sleep(0.05)
        assert await world.succeed() == 4
    done = True
    assert all(rounds > 2 for rounds in await asyncio.gather(*loads))


async def test_who_is_not_yet_served_and_who_has_gone(world: World, clients: list[Client]) -> None:
    new, gone = await Client.connect(world.path), await Client.ready(world.path)
    clients.append(new)
    await gone.close()
    assert await world.succeed() <= 1
    assert len(await new.reader.read()) == 18
    await asyncio.sleep(0.05)
    assert world.server.connections == 0


async def test_a_volume_that_is_gone(world: World, clients: list[Client]) -> None:
    client = await Client.ready(world.path)
    clients.append(client)
    (handed,) = await world.server.hand_over(5)
    world.server = world._server()
    world.volume.closed = True
    world.server.resume(handed)
    assert await client.ended()


def test_what_is_no_handover_is_refused() -> None:
    one, two = socket.socketpair()
    with one, two:
        one.sendall(struct.pack(">I", 5) + b"hello")
        with pytest.raises(ValueError, match="no connections"):
            list(receive(two))
    one, two = socket.socketpair()
    with two:
        connection, other = socket.socketpair()
        with other:
            thing = Handed(connection, "p", "vol", True, False, {1: "base:allocation"}, 1, b"kept")
            send(one, [thing])
            one.close()
            (got,) = receive(two)
            assert (got.contexts, got.kept, got.export) == (thing.contexts, b"kept", "vol")
            got.sock.close()
    one, two = socket.socketpair()
    with two:
        one.sendall(b"\0\0")
        one.close()
        with pytest.raises(ConnectionResetError, match="ended before"):
            list(receive(two))
