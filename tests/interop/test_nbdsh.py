"""The Python binding of libnbd and its shell in a virtual environment as `make setup` makes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.conftest import ROOT, Served

pytest.importorskip("nbd", reason="needs python3-libnbd")
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command with a fresh environment that is active; returns what it prints."""
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    subprocess.run([ROOT / "tools/link_libnbd.sh", environment], check=True, timeout=60)
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"VIRTUAL_ENV": str(environment)}
    variables |= {"PATH": f"{environment}/bin:{variables['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_the_binding_is_there_and_nothing_else_of_the_system(run: Run) -> None:
    program = "import nbd, sys; print(nbd.__file__); print(sys.prefix)"
    file, prefix = run("python3", "-c", program).split()
    assert file == f"{prefix}/lib/libnbd/nbd.py"
    assert sorted(path.name.partition(".")[0] for path in Path(file).parent.glob("*.*")) == [
        "libnbdmod",
        "nbd",
        "nbdsh",
    ]


@pytest.mark.skipif(shutil.which("nbdsh") is None, reason="needs nbdsh of python3-libnbd")
def test_nbdsh_runs(run: Run, frozen: Served) -> None:
    assert run("nbdsh", "--version").startswith("nbd")
    assert "nbd.NBD object" in run("nbdsh", "-c", "print(h)")
    assert run("nbdsh", "-u", frozen.uri, "-c", "print(h.get_size())") == "67108864\n"
