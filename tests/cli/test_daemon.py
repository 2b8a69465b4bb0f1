"""The daemon: serves real clients, one writer per pool, ends cleanly, and survives being killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM, SECONDS, Stripewell, gone

nbd = pytest.importorskip("nbd", reason="needs python3-libnbd")


@pytest.fixture
def tank(stripewell: Stripewell) -> Stripewell:
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "16M")
    return stripewell


def connect(path: str, export: str = "vm1") -> nbd.NBD:
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(path)
    return client


def test_ready_is_one_line_and_the_end_is_clean(tank: Stripewell) -> None:
    daemon = tank.serve()
    path = f"{tank.state}/run/tank.nbd.sock"
    assert daemon.ready == (f"stripewell: serving tank on nbd+unix:///?socket={path} (1 volume)\n")
    assert daemon.terminate() == (0, "", "")
    assert list((tank.state / "run").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_end_it(tank: Stripewell, number: signal.Signals) -> None:
    daemon = tank.serve()
    daemon.process.send_signal(number)
    _, err = daemon.process.communicate(timeout=SECONDS)
    assert (daemon.process.returncode, err) == (0, "")


def test_data_survives_a_clean_restart(tank: Stripewell) -> None:
    daemon = tank.serve()
    client = connect(daemon.socket)
    client.pwrite(b"x" * 4096, 8192)
    client.flush()
    client.shutdown()
    daemon.terminate()
    client = connect(tank.serve().socket)
    assert client.pread(4096, 8192) == b"x" * 4096
    assert client.pread(4096, 0) == bytes(4096)
    client.shutdown()


def test_acknowledged_data_survives_kill(tank: Stripewell) -> None:
    """P1, without a flush."""
    daemon = tank.serve()
    client = connect(daemon.socket)
    for block in range(64):
        client.pwrite(block.to_bytes(2, "big") * 2048, block * 4096)
    daemon.kill()
    client = connect(tank.serve().socket)
    for block in range(64):
        assert client.pread(4096, block * 4096) == block.to_bytes(2, "big") * 2048
    client.shutdown()


def test_sockets_left_by_kill_are_no_hindrance(tank: Stripewell) -> None:
    tank.serve().kill()
    assert (tank.state / "run/tank.ctl.sock").exists()
    assert tank.json("pool", "list")[0]["served"] is False
    assert [volume["name"] for volume in tank.json("volume", "list")] == ["vm1"]
    tank.serve()
    assert tank.json("pool", "list")[0]["served"] is True


def test_nothing_survives_kill(tank: Stripewell) -> None:
    daemon = tank.serve()
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    daemon.kill()
    assert all(gone(int(child)) for child in children)


def test_a_second_daemon_is_refused_with_any_state(tank: Stripewell, short_path: Path) -> None:
    """R22: the lock is on the devices."""
    tank.serve()
    other = short_path / "other"
    devices = tank.json("pool", "list")[0]["devices"]
    tank.ok("pool", "import", *devices, state=other)
    assert "d0" in tank.refused("serve", "tank")
    assert "d0" in tank.refused("serve", "tank", state=other)
    assert "d0" in tank.refused("volume", "create", "tank/x", "--size", "1G", state=other)
    assert tank.json("pool", "status", "tank")["state"] == "healthy"


def test_a_served_device_can_not_be_made_into_another_pool(tank: Stripewell) -> None:
    tank.serve()
    line = tank.refused(
        "pool", "create", "pond", "--data", "1", "--parity", "0", "--force", f"{tank.directory}/d0"
    )
    assert "d0" in line


def test_volumes_come_and_go_while_serving(tank: Stripewell) -> None:
    daemon = tank.serve()
    tank.ok("volume", "create", "tank/vm2", "--size", "8M")
    client = connect(daemon.socket, "vm2")
    assert client.get_size() == 8 << 20
    tank.ok("volume", "delete", "tank/vm2")
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
    with pytest.raises(nbd.Error):
        connect(daemon.socket, "vm2")
    other = connect(daemon.socket)
    assert other.pread(512, 0) == bytes(512)
    other.shutdown()


def test_tcp(tank: Stripewell) -> None:
    daemon = tank.serve("tank", "--tcp", "127.0.0.1:0")
    port = daemon.ready.partition("nbd://127.0.0.1:")[2].partition("/")[0]
    client = nbd.NBD()
    client.set_export_name("vm1")
    client.connect_tcp("127.0.0.1", port)
    assert client.get_size() == 16 << 20
    client.shutdown()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_metrics_and_health(tank: Stripewell) -> None:
    port = free_port()
    daemon = tank.serve("tank", "--http", f"127.0.0.1:{port}")
    client = connect(daemon.socket)
    client.pwrite(bytes(4096), 0)
    client.shutdown()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text = page.read().decode()
    assert 'stripewell_pool_state{pool="tank",state="healthy"} 1.0' in text.splitlines()
    assert 'stripewell_nbd_writes_total{pool="tank"} 1.0' in text.splitlines()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as page:
        assert page.read() == b"healthy\n"


def test_systemd_is_told(
    tank: Stripewell, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(short_path / "notify"))
        supervisor.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_path / "notify"))
        daemon = tank.serve()
        assert supervisor.recv(100) == b"READY=1"
        daemon.terminate()
        assert supervisor.recv(100) == b"STOPPING=1"


def test_the_daemon_stays_lean(tank: Stripewell) -> None:
    """What only the command line or --http needs is not in its memory."""
    program = (
        "import sys, stripewell.daemon\n"
        "print([m for m in ('rich', 'prometheus_client', 'pydantic', 'typer') if m in sys.modules])"
    )
    done = subprocess.run(
        [*tank._command((), None)[:1], "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_qemu_tools_read_the_uri_of_attach(tank: Stripewell) -> None:
    tank.serve()
    uri = tank.json("attach", "tank/vm1")["uris"][0]
    try:
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", uri], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("qemu-img is not installed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["virtual-size"] == 16 << 20


def test_qemu_takes_the_arguments_of_attach(tank: Stripewell) -> None:
    """A machine with the pasted lines starts and has the disk; it never runs."""
    tank.serve()
    arguments = tank.json("attach", "tank/vm1")["qemu"]
    qemu = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    commands = "".join(
        json.dumps({"execute": name}) for name in ("qmp_capabilities", "query-block", "quit")
    )
    try:
        done = subprocess.run(
            [*qemu, *arguments],
            input=commands,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("qemu-system-x86 is not installed")
    assert (done.returncode, done.stderr) == (0, "")
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    [[disk]] = [reply["return"] for reply in replies if isinstance(reply.get("return"), list)]
    assert disk["inserted"]["image"]["virtual-size"] == 16 << 20


def test_what_cannot_be_written_can_still_be_read(stripewell: Stripewell) -> None:
    """P6, P8: without `m` of the devices of 2+2 on four no root can be committed; all is there."""
    stripewell.create(data=2, parity=2)
    stripewell.ok("volume", "create", "tank/vm1", "--size", "16M")
    daemon = stripewell.serve()
    client = connect(daemon.socket)
    client.pwrite(b"kept" * 1024, 4096)
    client.flush()
    client.shutdown()
    daemon.terminate()
    record = stripewell.json("pool", "status", "tank")
    lost = [
        Path(device["url"].removeprefix("file://").partition("?")[0])
        for device in record["devices"]
    ]
    for path in lost[:2]:
        path.unlink()
    assert "serve --read-only" in stripewell.refused("serve", "tank")
    client = connect(stripewell.serve("tank", "--read-only").socket)
    assert client.is_read_only()
    assert client.pread(4096, 4096) == b"kept" * 1024
    client.flush()
    client.shutdown()


def test_devices_that_go_and_come_back_are_logged(tank: Stripewell) -> None:
    daemon = tank.serve()
    client = connect(daemon.socket)
    client.pwrite(b"x" * (1 << 20), 0)
    client.flush()
    device, copy = tank.directory / "d1", tank.directory / "copy"
    shutil.copy(device, copy)
    device.unlink()
    client.pwrite(b"y" * (1 << 20), 0)
    client.flush()
    client.shutdown()
    assert tank.json("pool", "status", "tank")["state"] == "degraded"
    _, _, err = daemon.terminate()
    name = f"device 1 (file://{device}?size=64M)"
    gone, *more, state = err.splitlines()
    assert gone.startswith(f"stripewell: warning: {name} is missing: file://{device}")
    assert "has vanished (file was deleted): bring it back" in gone
    assert all("the journal has" in line for line in more)
    assert state == "stripewell: warning: pool tank is degraded (it was healthy)"

    copy.rename(device)
    daemon = tank.serve()
    deadline = time.monotonic() + SECONDS
    while tank.json("pool", "status", "tank")["state"] != "healthy":
        assert time.monotonic() < deadline
    _, _, err = daemon.terminate()
    lines = err.splitlines()
    back = lines.index(f"stripewell: {name} is back; what it missed is rebuilt")
    assert back < lines.index(f"stripewell: {name} has everything again")
    if any("is degraded" in line for line in lines):
        assert lines[-1] == "stripewell: pool tank is healthy again (it was degraded)"


def test_socket_activation(tank: Stripewell) -> None:
    """As systemd does it, with libnbd in its place: the socket is there before the daemon is."""
    client = nbd.NBD()
    client.set_export_name("vm1")
    client.connect_systemd_socket_activation(
        [*PROGRAM, "serve", "tank", "--state", str(tank.state)]
    )
    client.pwrite(b"activated", 0)
    client.flush()
    assert client.pread(9, 0) == b"activated"
    # Nothing listens where it would have by itself.
    assert not (tank.state / "run" / "tank.nbd.sock").exists()
    said = json.loads(tank.ok("attach", "tank/vm1", "--json"))
    assert "tank.nbd.sock" not in said["uris"][0]
    client.shutdown()


def test_tls(tank: Stripewell) -> None:
    folder = tank.directory / "tls"
    tank.ok("tls", "ca", str(folder))
    tank.ok("tls", "server", str(folder), "--host", "localhost")
    tank.ok("tls", "client", str(folder), "--name", "vmhost1")
    allowed = tank.directory / "allowed"
    allowed.write_text("vmhost1: vm*\n")
    options = ("--tls", "required", "--tls-certificates", str(folder / "servers" / "localhost"))
    daemon = tank.serve("tank", *options, "--tls-verify-clients", "--tls-allow", str(allowed),
                        "--tcp", "127.0.0.1:0")  # fmt: skip
    assert "nbds+unix://" in daemon.ready
    port = daemon.ready.rpartition("nbds://127.0.0.1:")[2].partition("/")[0]
    client = nbd.NBD()
    client.set_tls(nbd.TLS_REQUIRE)
    client.set_tls_certificates(str(folder / "clients" / "vmhost1"))
    client.set_export_name("vm1")
    client.connect_tcp("localhost", port)
    client.pwrite(b"secret", 0)
    assert client.pread(6, 0) == b"secret"
    client.shutdown()
    with pytest.raises(nbd.Error, match="TLS"):
        connect(daemon.socket)
    said = json.loads(tank.ok("attach", "tank/vm1", "--json"))
    assert any(text.startswith("tls-creds-x509,") for text in said["qemu"])
    assert 'tls="yes"' in said["libvirt"]


def test_tls_options_that_do_not_fit(tank: Stripewell) -> None:
    assert "needs --tls-certificates" in tank.refused("serve", "tank", "--tls", "required")
    folder = str(tank.directory)
    line = tank.refused("serve", "tank", "--tls", "allowed", "--tls-certificates", folder)
    assert "has no server-cert.pem" in line


def test_a_successor_takes_over_live_connections(tank: Stripewell) -> None:
    """A load that reconnects by no means goes on through three successors, without an error."""
    first = tank.serve()
    client = connect(first.socket)
    stop, rounds, problems = threading.Event(), [0], list[Exception]()

    def load() -> None:
        rng = random.Random(3)
        try:
            while not stop.is_set():
                at, data = rng.randrange(15 << 20), rng.randbytes(rng.choice((512, 9000, 300_000)))
                client.pwrite(data, at)
                assert client.pread(len(data), at) == data
                rounds[0] += 1
        except Exception as error:
            problems.append(error)

    worker = threading.Thread(target=load)
    worker.start()
    daemon = first
    for _ in range(3):
        seen = rounds[0]
        successor = tank.serve("tank", "--take-over")
        out, err = daemon.process.communicate(timeout=SECONDS)
        assert (daemon.process.returncode, out, err) == (
            0, "stripewell: handed over 1 connection\n", "",
        )  # fmt: skip
        daemon = successor
        while rounds[0] < seen + 20 and not problems:
            time.sleep(0.05)
    stop.set()
    worker.join()
    assert not problems
    client.flush()
    client.shutdown()
    assert tank.ok("pool", "check", "tank")
    assert list(Path(tank.state / "run").glob("next-*")) == []


def test_taking_over_from_nobody_is_a_start(tank: Stripewell) -> None:
    daemon = tank.serve("tank", "--take-over")
    assert connect(daemon.socket).pread(1, 0) == b"\0"
