"""Whatever is given wrongly gets one clear line or a closed connection, and damages no pool."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c

from tests.cli.conftest import Stripewell

CODE = ("--data", "2", "--parity", "1")


@pytest.fixture
def tank(stripewell: Stripewell) -> Iterator[Stripewell]:
    """A sound pool, which must be sound at the end, too."""
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "16M")
    yield stripewell
    found = stripewell.json("pool", "check", "tank")
    assert (found["name"], found["faults"], found["findings"]) == ("tank", [], [])
    assert [volume["name"] for volume in stripewell.json("volume", "list", "tank")] == ["vm1"]


def create(stripewell: Stripewell, *urls: str, code: tuple[str, ...] = CODE) -> str:
    return stripewell.refused("pool", "create", "pond", *code, *urls)


def test_a_device_too_small(stripewell: Stripewell) -> None:
    first, second, _ = stripewell.devices(3)
    small = f"file://{stripewell.directory}/small?size=64K"
    assert "small" in create(stripewell, first, second, small)
    assert stripewell.json("pool", "list") == []


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "hardlink", "scheme"])
def test_a_device_given_twice(stripewell: Stripewell, how: str) -> None:
    directory = stripewell.directory
    for name in ("a", "b"):
        (directory / name).touch()
        os.truncate(directory / name, 64 << 20)
    (directory / "symlink").symlink_to("a")
    (directory / "hardlink").hardlink_to(directory / "a")
    again = {"same": f"{directory}/a", "relative": "./a", "scheme": f"file://{directory}/a"}
    line = create(stripewell, f"{directory}/a", f"{directory}/b", again.get(how, how))
    assert "given twice" in line
    assert not any((directory / "a").read_bytes())


def test_a_device_given_as_data_and_journal(stripewell: Stripewell) -> None:
    urls = stripewell.devices(3)
    assert "given twice" in create(stripewell, *urls, "--journal", urls[0])


def test_a_device_of_another_pool(tank: Stripewell) -> None:
    urls = [str(tank.directory / "d0"), *tank.devices(2, "other")]
    line = create(tank, *urls)
    assert "d0" in line
    assert "tank" in line


def test_a_device_with_something_foreign(stripewell: Stripewell) -> None:
    disk = stripewell.directory / "ext4"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(1024 + 0x38)
        file.write(b"\x53\xef")
    before = disk.read_bytes()
    assert "ext4" in create(stripewell, str(disk), *stripewell.devices(2))
    assert disk.read_bytes() == before


def test_half_a_superblock_is_no_traceback(tank: Stripewell) -> None:
    """A torn superblock: the copies at the other end, or the other devices, must do."""
    device = tank.directory / "d0"
    whole = device.read_bytes()
    shutil.rmtree(tank.state)
    for length in (8, 100, 2048, 4095, 4097):
        device.write_bytes(whole[:length] + bytes(65536 - length) + whole[65536:])
        done = tank("pool", "import", *(str(tank.directory / f"d{n}") for n in range(3)))
        assert done.returncode in {0, 1}
        assert len(done.stderr.splitlines()) == done.returncode
    device.write_bytes(whole)
    tank.ok("pool", "import", *(str(tank.directory / f"d{n}") for n in range(3)))


@pytest.mark.parametrize("seed", range(5))
def test_a_device_of_noise(stripewell: Stripewell, seed: int) -> None:
    (stripewell.directory / "noise").write_bytes(random.Random(seed).randbytes(4 << 20))
    assert "noise" in stripewell.refused("pool", "import", "noise")


def make_newer(device: Path) -> int:
    """Give every superblock of a device the next format revision; how many there were."""
    data = bytearray(device.read_bytes())
    heads = [at for at in range(0, len(data), 4096) if data[at : at + 8] == b"STRIPEWL"]
    for at in heads:
        data[at + 8 : at + 10] = (int.from_bytes(data[at + 8 : at + 10], "little") + 1).to_bytes(
            2, "little"
        )
        data[at + 252 : at + 256] = crc32c(data[at : at + 252]).to_bytes(4, "little")
    device.write_bytes(data)
    return len(heads)


def test_a_newer_format_revision(tank: Stripewell) -> None:
    """A device whose superblocks announce a revision from the future is refused, not guessed at."""
    device = tank.directory / "d0"
    whole = device.read_bytes()
    assert make_newer(device) > 0
    shutil.rmtree(tank.state)
    line = tank.refused("pool", "import", *(str(tank.directory / f"d{n}") for n in range(3)))
    assert "revision" in line
    device.write_bytes(whole)
    tank.ok("pool", "import", *(str(tank.directory / f"d{n}") for n in range(3)))


def test_fewer_devices_than_the_code_needs(stripewell: Stripewell) -> None:
    assert "3 devices" in create(stripewell, *stripewell.devices(2))
    assert list(stripewell.directory.iterdir()) == []


@pytest.mark.parametrize(
    "code",
    [("0", "1"), ("-1", "1"), ("65", "1"), ("2", "-1"), ("2", "17"), ("two", "1"), ("2.5", "1")],
)
def test_a_code_out_of_range(stripewell: Stripewell, code: tuple[str, str]) -> None:
    arguments = ("--data", code[0], "--parity", code[1], *stripewell.devices(3))
    line = stripewell.refused("pool", "create", "tank", *arguments, status=2)
    assert "--data" in line or "--parity" in line
    assert list(stripewell.directory.iterdir()) == []


def test_a_size_that_is_no_size(tank: Stripewell) -> None:
    for size in ("", "big", "20X", "-1G", "0", "1e9", "99999999999T", "1.0001K"):
        assert "size" in tank.refused("volume", "create", "tank/x", f"--size={size}", status=2)


@pytest.mark.parametrize("size", ["", "big", "-1G", "0"])
def test_a_device_size_that_is_no_size(stripewell: Stripewell, size: str) -> None:
    odd = f"file://{stripewell.directory}/odd?size={size}"
    assert "size" in create(stripewell, odd, *stripewell.devices(2))


NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/b", "-x", ".x", "x" * 65, "a b", "ä", "a\nb"]


@pytest.mark.parametrize("served", [False, True], ids=["direct", "served"])
def test_a_name_that_is_no_name(tank: Stripewell, served: bool) -> None:
    if served:
        tank.serve()
    for name in NAMES:
        assert "name" in tank.refused("volume", "create", f"tank/{name}", "--size", "1G")


@pytest.mark.parametrize("name", ["", "..", "../tank", "/etc/passwd", "x" * 65])
def test_a_pool_name_that_is_no_name(stripewell: Stripewell, name: str) -> None:
    line = stripewell.refused("pool", "create", *CODE, "--", name, *stripewell.devices(3))
    assert "no pool name" in line
    assert list(stripewell.directory.iterdir()) == []


def test_unknown_pools_and_volumes(tank: Stripewell) -> None:
    for command in (("pool", "status"), ("pool", "check"), ("serve",), ("volume", "list")):
        assert "known: tank" in tank.refused(*command, "pond")
    assert "vm1" in tank.refused("attach", "tank/nope")
    assert "nope" in tank.refused("volume", "delete", "tank/nope")


def test_too_few_devices_at_import_names_the_missing(tank: Stripewell) -> None:
    shutil.rmtree(tank.state)
    line = tank.refused("pool", "import", str(tank.directory / "d0"))
    assert "/d1" in line
    assert "/d2" in line
    assert tank.json("pool", "list") == []
    tank.ok("pool", "import", *(str(tank.directory / f"d{n}") for n in range(3)))


def test_devices_of_two_pools(tank: Stripewell) -> None:
    tank.create("pond", prefix="p")
    line = tank.refused("pool", "import", f"{tank.directory}/d0", f"{tank.directory}/p0")
    assert "tank" in line
    assert "pond" in line


def test_import_of_a_blank_or_missing_device(tank: Stripewell) -> None:
    blank = tank.directory / "blank"
    blank.touch()
    os.truncate(blank, 64 << 20)
    assert "blank" in tank.refused("pool", "import", str(blank))
    assert "nowhere" in tank.refused("pool", "import", f"{tank.directory}/nowhere")
    assert "gopher" in tank.refused("pool", "import", "gopher://x/y")
    assert str(tank.directory) in tank.refused("pool", "import", f"{tank.directory}")


def test_a_name_taken_by_another_pool(tank: Stripewell, short_path: Path) -> None:
    devices = tank.devices(3, "o")
    tank.ok("pool", "create", "tank", *CODE, *devices, state=short_path / "other")
    assert "another pool" in tank.refused(
        "pool", "import", *(str(tank.directory / f"o{n}") for n in range(3))
    )
    assert "already" in tank.refused("pool", "create", "tank", *CODE, *tank.devices(3, "x"))


def test_garbage_on_the_nbd_socket(tank: Stripewell) -> None:
    daemon = tank.serve()
    rng = random.Random(1)
    for length in (1, 4, 28, 1000, 100_000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(daemon.socket)
            try:
                client.sendall(rng.randbytes(length))
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except ConnectionError:
                pass  # closed on us, as it may
    assert tank.json("pool", "status", "tank")["state"] == "healthy"
    status, _, err = daemon.terminate()
    assert status == 0
    assert "Traceback" not in err


def test_garbage_on_the_control_socket(tank: Stripewell) -> None:
    daemon = tank.serve()
    rng = random.Random(2)
    for length in (1, 100, 200_000):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(f"{tank.state}/run/tank.ctl.sock")
            try:
                client.sendall(rng.randbytes(length) + b"\n")
                client.recv(65536)
            except ConnectionError:
                pass  # closed on us, as it may
    assert tank.json("pool", "status", "tank")["state"] == "healthy"
    status, _, err = daemon.terminate()
    assert (status, err) == (0, "")


def test_a_damaged_record_is_told(tank: Stripewell) -> None:
    record = tank.state / "pools/tank.json"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    assert "pool import" in tank.refused("pool", "status", "tank")
    assert "pool import" in tank.refused("serve", "tank")
    record.write_bytes(whole)


def test_a_socket_path_in_use(tank: Stripewell) -> None:
    taken = tank.directory / "taken"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(taken))
        other.listen()
        assert "taken" in tank.refused("serve", "tank", "--unix", str(taken))
    (tank.directory / "file").write_text("mine")
    assert "file" in tank.refused("serve", "tank", "--unix", str(tank.directory / "file"))
    assert (tank.directory / "file").read_text() == "mine"


@pytest.mark.parametrize("at", [0, (1 << 20) - 1, 63 << 20, (64 << 20) - 1])
def test_a_device_with_data_of_an_unknown_kind(stripewell: Stripewell, at: int) -> None:
    disk = stripewell.directory / "raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(at)
        file.write(b"x")
    before = disk.read_bytes()
    line = create(stripewell, str(disk), *stripewell.devices(2))
    assert "raw is not blank" in line
    assert "--force" in line
    assert disk.read_bytes() == before
    urls = (str(disk), *stripewell.devices(2))
    stripewell.ok("pool", "create", "pond", *CODE, "--force", *urls)


def test_no_command_is_suggested(tank: Stripewell) -> None:
    """`replace` must not lead to `create`, which overwrites."""
    line = tank.refused("pool", "replace", "tank", "x", status=2)
    assert "no such command 'replace'" in line
    assert "mean" not in line


def test_addresses_and_paths_that_cannot_be(tank: Stripewell) -> None:
    for option in ("--tcp", "--http"):
        line = tank.refused("serve", "tank", option, "256.1.1.1:9")
        assert f"{option} 256.1.1.1:9" in line
    path = tank.directory / ("x" * 120)
    assert "107 bytes" in tank.refused("serve", "tank", "--unix", str(path), status=2)


def test_a_damaged_record_hides_no_other(tank: Stripewell) -> None:
    (tank.state / "pools/bad.json").write_text("{")
    done = tank("pool", "list", "--json")
    assert (done.returncode, '"tank"' in done.stdout) == (0, True)
    assert "bad.json is damaged" in done.stderr
    (tank.state / "pools/bad.json").unlink()


def test_a_lost_device_is_left_out_of_an_import(tank: Stripewell) -> None:
    line = tank.refused("pool", "import", f"{tank.directory}/d0", f"{tank.directory}/gone")
    assert "leave it out" in line


def test_a_pool_that_is_served_elsewhere(tank: Stripewell, short_path: Path) -> None:
    """Its devices say how it was, not how it is."""
    tank.serve()
    other = short_path / "other"
    devices = tank.json("pool", "list")[0]["devices"]
    assert "served by another process" in tank.ok("pool", "import", *devices, state=other)
    assert "served by another process" in tank.ok("pool", "status", "tank", state=other)
    assert "another process" in tank.refused("pool", "check", "tank", state=other)


def test_a_daemon_names_devices_that_were_not_imported(stripewell: Stripewell) -> None:
    stripewell.create()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "16M")
    assert stripewell.json("volume", "list")[0]["state"] == "not served"
    shutil.rmtree(stripewell.state)
    left = [f"{stripewell.directory}/d{n}" for n in (0, 2)]
    (stripewell.directory / "d1").rename(stripewell.directory / "away")
    assert "without device 1" in stripewell.ok("pool", "import", *left)
    daemon = stripewell.serve()
    _, _, err = daemon.terminate()
    assert "warning: device 1 (last seen at" in err
