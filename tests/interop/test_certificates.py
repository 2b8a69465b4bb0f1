"""What `stripewell tls` makes works for QEMU, libnbd and nbdkit, and keeps everybody else out."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.conftest import ROOT

SECONDS = 30
#: Clients that are refused only after their handshake say no more than that TLS came to an end.
REFUSAL = re.compile("certificate|TLS|gnutls", re.IGNORECASE)


def tls(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "stripewell", "tls", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


@dataclass(frozen=True)
class Made:
    """Folders as they are copied to hosts."""

    server: Path
    elsewhere: Path
    client: Path
    stranger: Path
    """A client of another CA."""
    impostor: Path
    """The same, but it trusts our server."""
    anonymous: Path
    """It trusts our server and has no certificate."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("certificates")
    ours, others = root / "ours", root / "others"
    for ca in (ours, others):
        tls("ca", ca)
        tls("client", ca, "--name", "vmhost1")
    tls("server", ours, "--host", "localhost", "--host", "127.0.0.1")
    tls("server", ours, "--host", "storage.example")
    client, stranger = (ca / "clients/vmhost1" for ca in (ours, others))
    impostor, anonymous = root / "impostor", root / "anonymous"
    shutil.copytree(stranger, impostor)
    anonymous.mkdir()
    for folder in (impostor, anonymous):
        shutil.copy(client / "ca-cert.pem", folder)
    servers = ours / "servers"
    return Made(
        servers / "localhost", servers / "storage.example", client, stranger, impostor, anonymous
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def qemu_nbd(folder: Path, port: int, work: Path) -> list[str]:
    with (work / "disk").open("wb") as disk:
        disk.truncate(1 << 20)
    options = f"tls-creds-x509,id=tls0,dir={folder},endpoint=server,verify-peer=yes"
    command = ["qemu-nbd", "--object", options, "--tls-creds=tls0", f"--pid-file={work}/pid", "-t"]
    return [*command, "-b", "127.0.0.1", "-p", str(port), "-f", "raw", str(work / "disk")]


def nbdkit(folder: Path, port: int, work: Path) -> list[str]:
    command = ["nbdkit", "-f", "-P", f"{work}/pid", "-i", "127.0.0.1", "-p", str(port)]
    command += ["--tls=require", f"--tls-certificates={folder}", "--tls-verify-peer"]
    return [*command, "memory", "1M"]


Server = Callable[[Path, int, Path], list[str]]
Start = Callable[[Path], int]


@pytest.fixture(params=[qemu_nbd, nbdkit], ids=["qemu-nbd", "nbdkit"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with a folder; the port. It wants a certificate of every client."""
    server: Server = request.param
    processes: list[subprocess.Popen[str]] = []

    def begin(folder: Path) -> int:
        port = free_port()
        command = server(folder, port, tmp_path)
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / "pid").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return port

    yield begin
    for process in processes:
        process.terminate()
        process.communicate(timeout=SECONDS)


def libnbd(folder: Path, port: int, **_: str) -> str | None:
    """Why a connection came to nothing, or None."""
    nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_certificates(str(folder))
    try:
        handle.connect_tcp("localhost", str(port))
        assert handle.get_tls_negotiated()
        handle.pwrite(b"stripewell", 512)
        assert handle.pread(10, 512) == b"stripewell"
        handle.shutdown()
    except nbd.Error as error:
        return str(error)
    return None


def qemu_io(folder: Path, port: int, **options: str) -> str | None:
    """The same with QEMU's client."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    node = {"driver": "nbd", "server.type": "inet", "server.host": "localhost"}
    node |= {"server.port": str(port), "tls-creds": "tls0"} | options
    command = ["qemu-io", "--object", f"tls-creds-x509,id=tls0,dir={folder},endpoint=client"]
    command += ["-c", "write -P 7 0 4k", "-c", "read -P 7 0 4k", "--image-opts"]
    command.append(",".join(f"{key}={value}" for key, value in node.items()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    return None if done.returncode == 0 else done.stdout + done.stderr


Client = Callable[..., str | None]
clients = pytest.mark.parametrize("client", [libnbd, qemu_io], ids=["libnbd", "qemu-io"])


@clients
def test_a_client_with_its_folder_reads_and_writes(
    start: Start, client: Client, made: Made
) -> None:
    assert client(made.client, start(made.server)) is None


@clients
@pytest.mark.parametrize("who", ["stranger", "impostor", "anonymous"])
def test_everybody_else_is_refused(start: Start, client: Client, made: Made, who: str) -> None:
    port = start(made.server)
    refusal = client(getattr(made, who), port)
    assert REFUSAL.search(refusal or "none"), refusal
    assert client(made.client, port) is None


@clients
def test_a_server_with_the_certificate_of_another_host_is_refused(
    start: Start, client: Client, made: Made
) -> None:
    refusal = client(made.client, start(made.elsewhere))
    assert REFUSAL.search(refusal or "none"), refusal


def test_qemu_can_be_told_the_name_to_expect(start: Start, made: Made) -> None:
    """For connections by another name, and over unix sockets."""
    port = start(made.elsewhere)
    assert qemu_io(made.client, port, **{"tls-hostname": "storage.example"}) is None


def test_nbdinfo_takes_the_folder_in_a_uri(start: Start, made: Made) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    uri = f"nbds://localhost:{start(made.server)}/?tls-certificates={made.client}"
    done = subprocess.run(
        ["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (0, f"{1 << 20}\n")
