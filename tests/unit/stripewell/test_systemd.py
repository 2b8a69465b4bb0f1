"""sd_notify: the message arrives, and nothing breaks where nobody listens."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stripewell import systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_the_supervisor_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    address = f"@{tmp_path.name}" if abstract else str(tmp_path / "n.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address.replace("@", "\0"))
        supervisor.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        systemd.notify("READY=1")
        assert supervisor.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nobody/here", "vsock:2:1234"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("READY=1")


def activated(*sockets: socket.socket, pid: str = "", names: str = "") -> str:
    """What a process with these as LISTEN_FDS makes of them."""
    code = (
        "from stripewell import systemd\n"
        "from stripewell.errors import UserError\n"
        "import os\n"
        "try: print([(s.type.name, os.get_inheritable(s.fileno())) for s in systemd.listening()])\n"
        "except UserError as error: print(error)\n"
        "assert not [name for name in os.environ if name.startswith('LISTEN_')]\n"
    )
    numbers = [sock.fileno() for sock in sockets]
    launch = (
        "import os, sys\n"
        f"high = [os.dup2(n, 100 + i) for i, n in enumerate({numbers})]\n"
        "for i, n in enumerate(high): os.dup2(n, 3 + i)\n"
        f"os.environ |= {{'LISTEN_PID': {pid!r} or str(os.getpid()),"
        f" 'LISTEN_FDS': '{len(sockets)}', 'LISTEN_FDNAMES': {names!r}}}\n"
        "os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", launch, code],
        capture_output=True, text=True, check=True, pass_fds=numbers,
    )  # fmt: skip
    return done.stdout.strip()


def test_sockets_that_somebody_listens_on() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        entry = "('SOCK_STREAM', False)"
        assert activated(one, two) == f"[{entry}, {entry}]"
        assert activated(one, pid="1") == "[]"
    assert activated() == "[]"


def test_what_is_no_listening_socket_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        said = activated(datagrams, names="web")
        assert said.startswith("descriptor 3 (web) of LISTEN_FDS does not listen")
    with socket.socket() as idle:
        assert "does not listen: use ListenStream=" in activated(idle)
