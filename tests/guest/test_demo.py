"""`make demo` as a test: every row of its table is a check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demonstration_holds(folder: Path) -> None:
    command = [sys.executable, "-m", "bench.demo", "--folder", str(folder / "demo")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=540)
    finally:
        if process.poll() is None:
            process.terminate()  # unwinds, so that the demo ends what it started
            process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "state deleted, pool imported from four of six devices" in output
    assert not (folder / "demo").exists()
