"""NBD over TLS with clients that others have written, and with one that breaks the rules."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stripewell.certificates import folders, making
from tests.interop.conftest import SIZE, Served, serve
from tests.unit.nbd_server import wire

if "/usr/lib/python3/dist-packages" not in sys.path:
    sys.path.append("/usr/lib/python3/dist-packages")
nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")

Start = Callable[..., Served]
TLS_REQD, INVALID = (1 << 31) + 5, (1 << 31) + 3


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`server`, `vmhost1` and `vmhost2` of one CA, `stranger` of another."""
    root = tmp_path_factory.mktemp("certificates")
    now = datetime.now(UTC)
    ours, other = making.make_authority("ours", now), making.make_authority("other", now)
    made = {
        "server": ("server", ours, making.make_server(ours, ["localhost"], now)),
        "vmhost1": ("client", ours, making.make_client(ours, "vmhost1", now)),
        "vmhost2": ("client", ours, making.make_client(ours, "vmhost2", now)),
        "stranger": ("client", other, making.make_client(other, "vmhost1", now)),
    }
    for name, (kind, authority, leaf) in made.items():
        folder = root / name
        folder.mkdir()
        for file, content in folders.leaf_files(authority, kind, leaf).items():
            (folder / file).write_bytes(content)
    # It believes our server, but is not believed.
    (root / "stranger" / "ca-cert.pem").write_bytes(ours.certificate_pem)
    return root


@pytest.fixture
def start(tmp_path: Path, certificates: Path) -> Iterator[Start]:
    running: list[Generator[Served, None, None]] = []

    def begin(mode: str, *flags: str) -> Served:
        chosen = ("--tls", mode, "--tls-certificates", str(certificates / "server"))
        folder = tmp_path / str(len(running))
        folder.mkdir()
        running.append(serve(folder, *chosen, *flags))
        return next(running[-1])

    yield begin
    for one in running:
        one.close()


@contextmanager
def client(served: Served, folder: Path | None, *, tcp: bool = True) -> Iterator[Any]:
    handle = nbd.NBD()
    if folder is not None:
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_certificates(str(folder))
        handle.set_tls_verify_peer(True)
    handle.set_export_name("memory")
    if tcp:
        handle.connect_tcp("localhost", str(served.port))
    else:
        handle.connect_unix(str(served.socket))
    yield handle
    handle.shutdown()


@pytest.mark.parametrize("loop", [(), ("--plain",), ("--slow",)], ids=["uvloop", "asyncio", "slow"])
@pytest.mark.parametrize("mode", ["allowed", "required"])
def test_data_goes_through(start: Start, certificates: Path, mode: str, loop: Any) -> None:
    served = start(mode, *loop)
    with client(served, certificates / "vmhost1") as handle:
        assert handle.get_tls_negotiated()
        for length in (1, 4096, 100_000, (5 << 20) + 1, 32 << 20):
            data = os.urandom(length)
            handle.pwrite(data, 3)
            assert handle.pread(length, 3) == data
        pending = [(n, nbd.Buffer(65536)) for n in range(64)]
        cookies = [handle.aio_pread(buffer, n * 65536) for n, buffer in pending]
        while cookies:
            cookies = [c for c in cookies if not handle.aio_command_completed(c)]
            if cookies:
                handle.poll(-1)
        for n, buffer in pending:
            assert buffer.to_bytearray() == handle.pread(65536, n * 65536)
        handle.flush()


def test_plain_clients_where_tls_is_allowed_and_where_it_is_required(start: Start) -> None:
    served = start("allowed")
    with client(served, None) as handle:
        assert handle.get_size() == SIZE
    served = start("required")
    with pytest.raises(nbd.Error, match="TLS"), client(served, None):
        pass


def test_clients_are_known_by_their_certificates(
    start: Start, certificates: Path, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text("# who: what\nvmhost1: mem*\nvmhost2: other another\n")
    served = start("required", "--tls-verify-clients", "--tls-allow", str(allowed))
    with client(served, certificates / "vmhost1") as handle:
        handle.pwrite(b"x", 0)
        assert handle.pread(1, 0) == b"x"
    with (
        pytest.raises(nbd.Error, match="no export named"),
        client(served, certificates / "vmhost2"),
    ):
        pass
    with pytest.raises(nbd.Error), client(served, certificates / "stranger") as handle:
        handle.pread(1, 0)
    anonymous = tmp_path / "anonymous"
    anonymous.mkdir()
    ca = (certificates / "server" / "ca-cert.pem").read_bytes()
    (anonymous / "ca-cert.pem").write_bytes(ca)
    with pytest.raises(nbd.Error), client(served, anonymous) as handle:
        handle.pread(1, 0)


def test_qemu_and_nbdcopy(start: Start, certificates: Path, tmp_path: Path) -> None:
    served = start("required", "--tls-verify-clients")
    folder = certificates / "vmhost1"
    credentials = f"tls-creds-x509,id=tls0,dir={folder},endpoint=client"
    node = f"driver=nbd,host=localhost,port={served.port},export=memory,tls-creds=tls0"
    write = ["qemu-io", "--object", credentials, "--image-opts", node]
    write += ["-c", "write -P 7 1M 4M", "-c", "read -P 7 1M 4M", "-c", "flush"]
    done = subprocess.run(write, capture_output=True, text=True, timeout=60, check=True)
    assert "Pattern verification failed" not in done.stdout
    copy = tmp_path / "copy"
    uri = f"nbds://localhost:{served.port}/memory?tls-certificates={folder}"
    subprocess.run(["nbdcopy", "--connections=4", uri, str(copy)], timeout=60, check=True)
    content = copy.read_bytes()
    assert content == bytes(1 << 20) + b"\7" * (4 << 20) + bytes(SIZE - (5 << 20))


# -- clients that break the rules ------------------------------------------------------------


@asynccontextmanager
async def raw(served: Served) -> AsyncIterator[wire.Client]:
    one = await wire.Client.connect(str(served.socket))
    await one.greet()
    yield one
    await one.close()


async def rest(client: wire.Client) -> bytes:
    """All that comes until the connection ends."""
    with suppress(ConnectionResetError):
        return await asyncio.wait_for(client.reader.read(), 10)
    return b""


async def test_nothing_but_starttls_before_tls(start: Start) -> None:
    served = start("required")
    async with raw(served) as plain:
        for number, data in (
            (wire.LIST, b""),
            (wire.INFO, wire.info("memory")),
            (wire.GO, wire.info("memory")),
            (wire.STRUCTURED, b""),
            (99, b"x"),
        ):
            plain.send(wire.option(number, data))
            assert (await plain.option_reply())[:2] == (number, TLS_REQD)
        plain.send(wire.option(wire.STARTTLS, b"x"))
        assert (await plain.option_reply())[:2] == (wire.STARTTLS, INVALID)
        plain.send(wire.option(wire.ABORT))
        assert (await plain.option_reply())[:2] == (wire.ABORT, wire.ACK)
    async with raw(served) as named:
        named.send(wire.option(wire.EXPORT_NAME, b"memory"))
        assert await named.ended()


async def test_plain_bytes_behind_starttls_are_never_interpreted(start: Start) -> None:
    served = start("allowed")
    async with raw(served) as sneaky:
        sneaky.send(wire.option(wire.STARTTLS) + wire.option(wire.LIST))
        received = await rest(sneaky)
        # Its answer may be out already; nothing of what followed was answered.
        assert len(received) <= 20 + 7
        assert b"memory" not in received
    async with raw(served) as again:
        again.send(wire.option(wire.STARTTLS))
        assert (await again.option_reply())[:2] == (wire.STARTTLS, wire.ACK)
        again.send(wire.option(wire.LIST))
        assert b"memory" not in await rest(again)


def secured(
    served: Served,
    certificates: Path,
    newest: ssl.TLSVersion | None = None,
) -> ssl.SSLSocket:
    """A connection after STARTTLS, in the middle of negotiation."""
    sock = socket.create_connection(("127.0.0.1", served.port))
    assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
    # What is negotiated before TLS is forgotten.
    sock.sendall(wire.client_flags() + wire.option(wire.STRUCTURED))
    assert sock.recv(20, socket.MSG_WAITALL)[16:] == bytes(4)
    sock.sendall(wire.option(wire.STARTTLS))
    assert struct.unpack(">QIII", sock.recv(20, socket.MSG_WAITALL))[1:] == (5, wire.ACK, 0)
    context = ssl.create_default_context(cafile=str(certificates / "vmhost1" / "ca-cert.pem"))
    if newest is not None:
        context.maximum_version = newest
    if newest == ssl.TLSVersion.TLSv1_1:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("ALL:@SECLEVEL=0")
    with sock:
        return context.wrap_socket(sock, server_hostname="localhost")


def take(sock: ssl.SSLSocket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = sock.recv(size - len(found))
        assert part
        found += part
    return found


def test_negotiation_begins_anew_behind_tls(start: Start, certificates: Path) -> None:
    served = start("allowed")
    with secured(served, certificates) as sock:
        assert sock.version() in ("TLSv1.2", "TLSv1.3")
        sock.sendall(wire.option(wire.SET_META, wire.meta("memory", "base:allocation")))
        number, kind, size = struct.unpack(">QIII", take(sock, 20))[1:]
        assert (number, kind) == (wire.SET_META, INVALID)
        take(sock, size)
        sock.sendall(wire.option(wire.STARTTLS))
        number, kind, size = struct.unpack(">QIII", take(sock, 20))[1:]
        assert (number, kind) == (wire.STARTTLS, INVALID)
        take(sock, size)
        # Many small requests in one record are all answered, although only one event tells of them.
        sock.sendall(wire.option(wire.GO, wire.info("memory")))
        while struct.unpack(">QIII", (head := take(sock, 20)))[2] != wire.ACK:
            take(sock, struct.unpack(">QIII", head)[3])
        sock.sendall(b"".join(wire.request(wire.READ, n, n * 512, 512) for n in range(500)))
        answers = wire.decode(take(sock, 500 * 528), dict.fromkeys(range(500), 512))
        assert sorted(a.cookie for a in answers) == list(range(500))
        sock.sendall(wire.request(wire.DISC))
        # The server says that this was the end: no truncation.
        assert sock.recv(1) == b""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused(start: Start, certificates: Path) -> None:
    served = start("allowed")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        secured(served, certificates, newest=ssl.TLSVersion.TLSv1_1)
    with secured(served, certificates, newest=ssl.TLSVersion.TLSv1_2) as sock:
        assert sock.version() == "TLSv1.2"


def test_a_client_that_stops_in_the_tls_handshake_harms_nobody(
    start: Start, certificates: Path
) -> None:
    served = start("required")
    stopped = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(5)]
    for number, sock in enumerate(stopped):
        assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
        sock.sendall(wire.client_flags() + wire.option(wire.STARTTLS))
        sock.recv(20, socket.MSG_WAITALL)
        sock.sendall(b"\x16\x03\x01" if number % 2 else os.urandom(300))
    stopped[0].close()
    with client(served, certificates / "vmhost1") as handle:
        assert handle.pread(1, 0) == b"\0"
    for sock in stopped[1:]:
        sock.close()
