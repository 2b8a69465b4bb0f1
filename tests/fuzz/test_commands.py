"""Commands on files with damaged and hostile content: a line and a status, never a traceback.

`import`, `status`, `check` and `volume list` run in this process; none may change a device.
"""

from __future__ import annotations

import faulthandler
import json
import random
from functools import cache
from pathlib import Path

import pytest

from stripewell.__main__ import run as command
from tests.fuzz.images import Sample, build, write_files
from tests.fuzz.trial import bounded, spoil
from tests.sim.loop import run

QUICK, MANY = 24, 300


@cache
def sample() -> Sample:
    return run(build(random.Random(21)))


class Operator:
    """Runs commands with a state directory and keeps them to the rules."""

    def __init__(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._state = state
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str]:
        with bounded():
            status = command(["--state", str(self._state), *arguments])
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if "warning" not in line]
        if status and not out:
            assert len(errors) == 1, err
            assert errors[0].startswith("stripewell: ")
        return status, out


def trial(directory: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Import a sound pool, spoil it, and look at it in every way; then import what is left."""
    directory.mkdir()
    operator = Operator(directory / "state", capsys)
    urls = write_files(sample().images, directory)
    assert operator("pool", "import", *urls)[0] == 0
    spoilt = spoil(sample(), seed, forged=seed % 2 == 0)
    for path in directory.glob("*.img"):
        path.unlink()
    urls = write_files(spoilt.images, directory)
    before = {path: path.read_bytes() for path in directory.glob("*.img")}
    operator("pool", "status", "tank")
    operator("volume", "list", "tank")
    status, out = operator("pool", "check", "tank", "--json")
    if out:
        found = json.loads(out)
        assert status == bool(found["faults"])
        assert len(found["findings"]) == len(found["faults"])
    operator("pool", "import", *urls)
    assert {path: path.read_bytes() for path in directory.glob("*.img")} == before
    return "checked" if out else "refused"


def test_commands_on_spoilt_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endings = {trial(tmp_path / str(seed), seed, capsys) for seed in range(QUICK)}
    assert endings == {"checked", "refused"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # It takes longer than what pytest takes for a hang; the timeout above is the limit.
    faulthandler.cancel_dump_traceback_later()
    for seed in range(1000, 1000 + MANY):
        trial(tmp_path / str(seed), seed, capsys)
