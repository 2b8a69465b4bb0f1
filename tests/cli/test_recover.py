"""`stripewell recover` as an operator types it, over files and directories."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from backends.base import BLOCK_SIZE
from stripewell import __main__ as main
from tests.fuzz.anatomy import Anatomy
from tests.fuzz.images import Images, Sample, build, copied, write_files
from tests.fuzz.mutations import forge
from tests.sim.loop import run
from tests.vectors.test_vectors import images as golden
from tests.vectors.test_vectors import manifest

from .conftest import Stripewell


@pytest.fixture(scope="module")
def sample() -> Sample:
    return run(build(random.Random(1)))


@pytest.fixture
def urls(sample: Sample, stripewell: Stripewell) -> list[str]:
    return write_files(sample.images, stripewell.directory)


def recover(stripewell: Stripewell, *arguments: str) -> subprocess.CompletedProcess[str]:
    return stripewell("recover", *arguments)


def state_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of the last change of everything below a directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_it_lists_what_there_is_and_changes_nothing(
    stripewell: Stripewell, urls: list[str], sample: Sample
) -> None:
    before = state_of(stripewell.directory)
    out = stripewell.ok("recover", *urls)
    assert "complete, unless what was not read is damaged: --verify reads every block" in out
    for name in sample.volumes:
        [line] = [line for line in out.splitlines() if line.startswith(name)]
        assert line.endswith("unless damaged")
    out = stripewell.ok("recover", *urls, "--verify")
    assert "complete: everything that was ever flushed is here" in out
    for name in sample.volumes:
        [line] = [line for line in out.splitlines() if line.startswith(name)]
        assert line.endswith("yes")
    data = stripewell.json("recover", *urls, "--verify")
    assert {one["name"]: one["size"] for one in data["volumes"]} == {
        name: len(content) for name, content in sample.volumes.items()
    }
    assert data["pool"]["complete"]
    assert [device["state"] for device in data["pool"]["devices"]] == ["used"] * 4
    assert data["pool"]["journal"]["records"] == 6
    assert state_of(stripewell.directory) == before


def test_a_volume_becomes_a_sparse_file(
    stripewell: Stripewell, urls: list[str], sample: Sample
) -> None:
    before = state_of(stripewell.directory)
    said = stripewell.ok("recover", *urls[1:], "--volume", "beta", "--to", "beta.raw")
    assert "restored beta" in said
    assert "complete: everything of it that was ever flushed is here" in said
    path = stripewell.directory / "beta.raw"
    assert path.read_bytes() == sample.volumes["beta"]
    assert path.stat().st_blocks * 512 < len(sample.volumes["beta"]) // 2
    path.unlink()
    assert state_of(stripewell.directory) == before


def test_a_volume_is_named_as_everywhere_else(
    stripewell: Stripewell, urls: list[str], sample: Sample
) -> None:
    stripewell.ok("recover", *urls, "--volume", "tank/beta", "--to", "beta.raw")
    assert (stripewell.directory / "beta.raw").read_bytes() == sample.volumes["beta"]
    line = stripewell.refused("recover", *urls, "--volume", "lake/beta", "--to", "x")
    assert "these devices hold pool tank, not 'lake': write tank/VOLUME" in line
    line = stripewell.refused("recover", *urls, "--volume", "tank/nobody", "--to", "x")
    assert "there is no volume 'tank/nobody' (there are: alpha, beta, late)" in line


def test_an_older_root_is_found_looked_at_and_restored_from(
    stripewell: Stripewell, urls: list[str]
) -> None:
    """As the operations manual says."""
    line = stripewell.refused("recover", *urls, "--generation", "0")
    newest, older = (int(text) for text in re.findall(r"generation (\d+), digest", line)[:2])
    assert newest > older
    assert f"root      generation {newest}," in stripewell.ok("recover", *urls)
    wanted = ("--generation", str(older))
    looked = recover(stripewell, *urls, *wanted, "--verify")
    assert looked.returncode == 1
    assert f"chosen by hand; there is another: generation {newest}" in looked.stdout
    restore = ("--volume", "alpha", "--to", "alpha.raw")
    line = stripewell.refused("recover", *urls, *wanted, *restore)
    assert "chosen by hand" in line
    assert "--incomplete" in line
    done = recover(stripewell, *urls, *wanted, *restore, "--incomplete")
    assert (done.returncode, done.stderr) == (1, "")
    assert (stripewell.directory / "alpha.raw").exists()


def test_a_volume_goes_to_stdout(stripewell: Stripewell, urls: list[str], sample: Sample) -> None:
    done = streamed(urls)
    assert done.returncode == 0
    assert done.stdout == sample.volumes["alpha"]
    assert b"restored alpha" in done.stderr


def test_what_exists_and_what_is_a_device_is_not_overwritten(
    stripewell: Stripewell, urls: list[str], sample: Sample
) -> None:
    (stripewell.directory / "there").write_bytes(b"mine")
    want = (*urls, "--volume", "alpha", "--to")
    assert "exists: name another file, or --force" in stripewell.refused("recover", *want, "there")
    assert "one of the devices" in stripewell.refused("recover", *want, "a.img", "--force")
    few = (*urls[1:], "--volume", "alpha", "--to")
    assert "a stripewell pool" in stripewell.refused("recover", *few, "a.img", "--force")
    assert (stripewell.directory / "there").read_bytes() == b"mine"
    stripewell.ok("recover", *want, "there", "--force")
    assert (stripewell.directory / "there").read_bytes() == sample.volumes["alpha"]


def test_wrong_questions(stripewell: Stripewell, urls: list[str]) -> None:
    refused = stripewell.refused
    assert "belong together" in refused("recover", *urls, "--volume", "alpha", status=2)
    assert "belong together" in refused("recover", *urls, "--to", "x", status=2)
    assert "Missing argument" in refused("recover", status=2)
    line = refused("recover", *urls, "--volume", "nobody", "--to", "x")
    assert "there is no volume 'nobody' (there are: alpha, beta, late)" in line
    line = refused("recover", "nothing.img")
    assert "nothing.img does not exist" in line
    line = refused("recover", *urls, "--volume", "alpha", "--to", "no/where/x")
    assert "No such file or directory" in line


#: Pools that are made to find one whose checkpoint two devices can give.
POOLS = 40


def beyond_the_budget(stripewell: Stripewell) -> tuple[Sample, list[str]]:
    """A pool of which more than m devices are missing, those with the journal; what is left still
    has the whole checkpoint."""
    for seed in range(POOLS):
        sample = run(build(random.Random(seed)))
        left = write_files(sample.images, stripewell.directory)[2:]
        if recover(stripewell, *left).stdout:
            return sample, left
    raise AssertionError(f"none of {POOLS} pools could be listed from two devices")


def test_a_loss_is_refused_and_named(stripewell: Stripewell) -> None:
    _, left = beyond_the_budget(stripewell)
    listed = recover(stripewell, *left)
    assert listed.returncode == 1
    assert "not complete: 2 devices are missing, or have no superblock" in listed.stdout
    assert listed.stdout.count("last seen there") == 2
    [row] = [line for line in listed.stdout.splitlines() if line.startswith("alpha")]
    assert row.endswith("with --incomplete")
    line = stripewell.refused("recover", *left, "--volume", "alpha", "--to", "x")
    assert "bring devices back, or --incomplete" in line
    assert sorted(os.listdir(stripewell.directory)) == [f"{n}.img" for n in "abcd"]


def test_incomplete_restores_the_rest_and_says_where_zeros_are(stripewell: Stripewell) -> None:
    sample, left = beyond_the_budget(stripewell)
    wanted = ("--volume", "alpha", "--to", "x", "--incomplete")
    done = recover(stripewell, *left, *wanted, "--json")
    assert done.returncode == 1
    data: dict[str, Any] = json.loads(done.stdout)
    volume = data["volume"]
    assert volume["lost_blocks"] == sum(length for _, length in volume["lost"]) // BLOCK_SIZE > 0
    found = (stripewell.directory / "x").read_bytes()
    expected = bytearray(sample.history[0]["alpha"])
    for offset, length in volume["lost"]:
        assert found[offset : offset + length] == bytes(length)
        expected[offset : offset + length] = bytes(length)
    assert found == expected


def rotten(sample: Sample) -> Images:
    """All devices are there, and every shard on them is damaged, but not the map."""
    images = copied(sample.images)
    for region in Anatomy(images).regions():
        if region.structure in ("shard", "stripe header"):
            stripe_blocks = range(region.offset, region.offset + region.length, BLOCK_SIZE)
            for at in stripe_blocks:
                images[region.device][at + 9] ^= 1
    for at in Anatomy(copied(sample.images)).pages:
        for region in Anatomy(copied(sample.images)).page_regions(at):
            here = slice(region.offset, region.offset + region.length)
            images[region.device][here] = sample.images[region.device][here]
    return images


def streamed(
    urls: list[str], *arguments: str, volume: str = "alpha"
) -> subprocess.CompletedProcess[bytes]:
    """A volume restored to stdout. There is never a traceback."""
    command = [sys.executable, "-m", "stripewell", "recover", *urls, "--volume", volume]
    done = subprocess.run(
        [*command, "--to", "-", *arguments], capture_output=True, timeout=60, check=False
    )
    assert b"Traceback" not in done.stderr
    return done


def test_a_stream_ends_before_the_first_loss(stripewell: Stripewell, sample: Sample) -> None:
    """What is written cannot be taken back, so nothing that is not right is; unless it is asked
    for."""
    urls = write_files(rotten(sample), stripewell.directory)
    for volume, content in sample.volumes.items():
        done = streamed(urls, "--incomplete", volume=volume)
        assert len(done.stdout) == len(content)
        if done.returncode == 0:
            continue
        stopped = streamed(urls, volume=volume)
        assert stopped.returncode == 1
        assert stopped.stdout == content[: len(stopped.stdout)]
        [line] = stopped.stderr.decode().splitlines()
        end = len(stopped.stdout)
        assert f"lost (bytes {end}-" in line
        assert f"the {end} bytes before are right, and written; device 0 at " in line
        assert "bring devices back, or --incomplete" in line
        break
    else:
        raise AssertionError("no volume was damaged")


def test_stdout_that_fails_is_one_line(urls: list[str]) -> None:
    """A reader that left, no room, none at all: never silence with status 0."""
    command = f"{sys.executable} -m stripewell recover {' '.join(urls)} --volume beta --to -"
    for to, said in (
        ("| head -c 1", "Broken pipe"),
        ("> /dev/full", "No space left on device"),
        (">&-", "stdout is closed"),
    ):
        script = f"set -o pipefail; {command} {to}"
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith("stripewell: stdout ")
        assert said in line


def test_a_block_that_proves_damaged_leaves_no_file(stripewell: Stripewell, sample: Sample) -> None:
    """All devices are there, so that only reading finds it out."""
    urls = write_files(rotten(sample), stripewell.directory)
    before = sorted(os.listdir(stripewell.directory))
    assert "unless damaged" in stripewell.ok("recover", *urls)
    verified = recover(stripewell, *urls, "--verify")
    assert verified.returncode == 1
    assert "not complete: volume alpha: 27 blocks of 4 KiB are lost" in verified.stdout
    assert "with --incomplete" in verified.stdout
    assert "everything" not in verified.stdout
    line = stripewell.refused("recover", *urls, "--volume", "alpha", "--to", "x")
    assert "blocks of 4 KiB are lost (bytes " in line
    assert f"device 3 at {urls[3]} has " in line
    assert "shard blocks wrong or unreadable" in line
    assert sorted(os.listdir(stripewell.directory)) == before
    want = ("--volume", "alpha", "--to", "x", "--incomplete")
    done = recover(stripewell, *urls, *want)
    assert done.returncode == 1
    assert "; not complete: volume alpha: 27 blocks of 4 KiB are lost" in done.stdout
    assert "there are zeros where blocks are lost" in done.stdout
    assert "everything" not in done.stdout


def test_a_store_is_read_as_well(stripewell: Stripewell) -> None:
    """P8 with a directory of objects; its files are not touched."""
    urls = []
    for member, image in golden("store").items():
        place = stripewell.directory / member
        if isinstance(image, bytes):
            place.write_bytes(image)
            urls.append(f"file://{place}")
            continue
        place.mkdir()
        for name, data in image.items():
            (place / name).write_bytes(data)
        urls.append(f"dir://{place}")
    before = state_of(stripewell.directory)
    for missing in range(len(urls)):
        left = [url for number, url in enumerate(urls) if number != missing]
        data = stripewell.json("recover", *left, "--verify")
        assert [one["restorable"] for one in data["volumes"]] == ["yes"]
    stripewell.ok("recover", *urls, "--volume", "alpha", "--to", "../alpha.raw")
    restored = stripewell.directory.parent / "alpha.raw"
    assert restored.stat().st_size == manifest("store")["volumes"]["alpha"]["size"]
    assert state_of(stripewell.directory) == before


def test_a_device_that_hangs_is_left_behind(stripewell: Stripewell, sample: Sample) -> None:
    """A pipe that nobody writes to stands for it: opening one waits for ever."""
    urls = write_files(sample.images, stripewell.directory)
    store = stripewell.directory / "store"
    store.mkdir()
    os.mkfifo(store / "root-a")
    program = (
        "import sys, stripewell.recover.sources as s; s.READ_SECONDS = 1.0;"
        "from stripewell.__main__ import run; sys.exit(run(sys.argv[1:]))"
    )
    started = time.monotonic()
    for given, status in ((urls, 0), ([], 1)):
        done = subprocess.run(
            [sys.executable, "-c", program, "recover", *given, f"dir://{store}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "it did not answer for 1 s" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("seed", range(40))
def test_forged_devices_never_surprise_the_command(
    seed: int,
    sample: Sample,
    stripewell: Stripewell,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A report, or one line; and every volume that is listed restores, or is refused in a line."""
    images = copied(sample.images)
    what = forge(images, random.Random(f"command {seed}"))
    urls = write_files(images, stripewell.directory)
    before = state_of(stripewell.directory)
    status = main.run(["recover", *urls, "--json"])
    out, err = capfd.readouterr()
    assert status in (0, 1), what
    assert one_line_or_none(err), what
    for volume in json.loads(out)["volumes"] if out else []:
        target = stripewell.directory.parent / "restored"
        given = ["--volume", volume["name"], "--to", str(target), "--incomplete", "--force"]
        assert main.run(["recover", *urls, *given]) in (0, 1), what
        assert one_line_or_none(capfd.readouterr().err), what
    assert main.run(["recover", *urls]) == status
    assert capfd.readouterr().out.replace("\n", "").isprintable()
    assert state_of(stripewell.directory) == before


def one_line_or_none(text: str) -> bool:
    return not text or (text.startswith("stripewell: ") and text.count("\n") == 1)


def test_a_pool_that_is_being_served_can_be_read_with_a_warning(stripewell: Stripewell) -> None:
    """No lock is taken, and none is in the way."""
    stripewell.create()
    daemon = stripewell.serve()
    stripewell.ok("volume", "create", "tank/vm1", "--size", "8M")
    urls = [url.partition("?")[0] for url in stripewell.devices(3)]
    listed = recover(stripewell, *urls, "--json")
    data = json.loads(listed.stdout)
    assert [(one["name"], one["size"]) for one in data["volumes"]] == [("vm1", 8 << 20)]
    assert data["pool"]["name"] == "tank"
    assert [device["in_use"] for device in data["pool"]["devices"]] == [True] * 3
    done = recover(stripewell, *urls, "--volume", "vm1", "--to", "vm1.raw")
    assert done.returncode == 0
    for said in (listed.stderr, done.stderr):
        [line] = said.splitlines()
        assert line.startswith("stripewell: warning: another process, a daemon perhaps, may write")
        assert all(url in line for url in urls)
        assert "stop it first" in line
    assert (stripewell.directory / "vm1.raw").read_bytes() == bytes(8 << 20)
    assert stripewell.json("pool", "status", "tank")["state"] == "healthy"
    daemon.terminate()
    assert recover(stripewell, *urls).stderr == ""
