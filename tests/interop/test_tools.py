"""Command line clients: qemu-img, qemu-io, nbdinfo, nbdcopy, nbdkit, nbd-client, fio."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.interop.conftest import SIZE, Served, serve


def run(tool: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Output of a tool that has to succeed."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{tool} is not installed")
    command = [path, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data with holes, of the export's size."""
    path = tmp_path / "image.raw"
    noise = random.Random(1)
    with path.open("wb") as file:
        for at in range(0, SIZE, 8 << 20):
            file.seek(at + (noise.randrange(1 << 20) & ~511))
            file.write(noise.randbytes(noise.randrange(4 << 20) & ~511))
        file.truncate(SIZE)
    return path


def soil(served: Served) -> None:
    """Leave no hole, so that what a copy does not zero shows."""
    run("qemu-io", "-f", "raw", "-c", f"write -P 1 0 {SIZE}", served.uri)


def test_nbdinfo_sees_what_is_offered(served: Served) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", served.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation", *served.contexts]
    wanted = ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"]
    assert all(export[f"can_{name}"] for name in wanted)
    sizes = [export[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 << 20]
    listed = json.loads(run("nbdinfo", "--json", "--list", served.tcp_uri))
    assert [e["export-name"] for e in listed["exports"]] == [served.name]
    assert listed["exports"][0]["description"] == served.description


def test_nbdinfo_refuses_an_unknown_export(served: Served) -> None:
    path = shutil.which("nbdinfo") or pytest.skip("nbdinfo is not installed")
    command = [path, f"nbd+unix:///other?socket={served.socket}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "No such file or directory for export: other" in done.stderr


def test_qemu_img_copies_in_and_out(served: Served, image: Path, tmp_path: Path) -> None:
    soil(served)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, served.uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, served.uri)
    out = tmp_path / "out.raw"
    run("qemu-img", "convert", "-W", "-m", "8", "-f", "raw", "-O", "raw", served.tcp_uri, out)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, out)
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", served.uri))
    assert {extent["data"] for extent in extents} == {True, False}
    data = image.read_bytes()
    for extent in extents:
        part = data[extent["start"] : extent["start"] + extent["length"]]
        assert not extent["zero"] or not any(part)
    assert sum(extent["length"] for extent in extents) == SIZE


def test_nbdcopy_uses_several_connections(served: Served, image: Path, tmp_path: Path) -> None:
    soil(served)
    run("nbdcopy", "--flush", "--connections=4", image, served.uri)
    out = tmp_path / "out.raw"
    run("nbdcopy", "--connections=4", served.uri, out)
    assert image.read_bytes() == out.read_bytes()
    assert "hole,zero" in run("nbdinfo", "--map", served.uri)


def test_qemu_io(served: Served) -> None:
    commands = [
        "write -P 7 513 1M",
        "read -P 7 513 1M",
        "write -z 4k 64k",
        "read -P 0 4k 64k",
        "write -f -P 9 8k 4k",
        "read -P 9 8k 4k",
        "discard 0 32M",
        "read -P 0 0 31M",
        "write -P 3 5M 17M",
        "read -P 3 6M 16M",
        "aio_write -P 4 0 8M",
        "aio_write -P 5 8M 8M",
        "aio_flush",
        "read -P 5 8M 8M",
        "flush",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, served.uri)
    assert "Pattern verification failed" not in output
    assert "error" not in output.lower()


def test_qemu_io_is_told_that_an_export_is_read_only(frozen: Served) -> None:
    path = shutil.which("qemu-io") or pytest.skip("qemu-io is not installed")
    command = [path, "-f", "raw", "-c", "write 0 4k", frozen.uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "read 4096" in run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 4k", frozen.uri)


def test_nbdkit_passes_everything_through(served: Served, image: Path) -> None:
    soil(served)
    nbdkit = ["--exit-with-parent", "-U", "-", "nbd", served.uri, "--run"]
    copy = f"nbdcopy --flush {image} $uri && nbdcopy $uri - | cmp - {image}"
    run("nbdkit", *nbdkit, copy)


def test_nbd_client_lists_exports(served: Served) -> None:
    listed = run("nbd-client", "-l", "127.0.0.1", "-p", str(served.port))
    assert f"{served.name}: {served.description}" in listed


def test_fio_verifies(served: Served, tmp_path: Path) -> None:
    engines = run("fio", "--enghelp")
    if "nbd" not in engines.split():
        pytest.skip("fio has no nbd engine")
    output = run(
        "fio",
        *("--name=x", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite"),
        *("--bsrange=512-256k", "--iodepth=32", "--size=64m", "--io_size=96m"),
        *("--verify=crc32c", "--verify_fatal=1", "--norandommap=0"),
        folder=tmp_path,
    )
    assert "READ: bw=" in output
    assert "WRITE: bw=" in output


def test_qemu_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    """SIGTERM in the middle of writes: QEMU reconnects to the next server and sees no error."""
    qemu_io = shutil.which("qemu-io") or pytest.skip("qemu-io is not installed")
    node = f"driver=nbd,server.type=unix,server.path={tmp_path}/nbd.sock,export=memory"
    writes = [f"aio_write -P 7 {at}M 1M" for at in range(32)]
    commands = [*writes, "sleep 300", *writes, "aio_flush", "read -P 7 0 32M", "flush"]
    arguments = [part for command in commands for part in ("-c", command)]
    first = serve(tmp_path, "--slow")
    next(first)
    options = ["--image-opts", f"{node},reconnect-delay=60"]
    with subprocess.Popen(
        [qemu_io, *options, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as client:
        time.sleep(0.2)
        first.close()
        second = serve(tmp_path)
        next(second)
        output = client.communicate(timeout=60)[0]
        second.close()
    assert client.returncode == 0, output
    assert "failed" not in output
