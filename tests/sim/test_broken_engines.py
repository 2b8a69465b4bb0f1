"""Engines that are broken on purpose (`tests.sim.broken`): each must be caught, or the oracle is
too weak."""

from __future__ import annotations

import pytest

from . import broken


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", broken.ENGINES)
def test_the_simulation_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken.catch(name, monkeypatch)
    if found is None:
        pytest.fail(f"{name}: {broken.ENGINES[name].what}. Nobody noticed in {broken.LIMIT} seeds")
    seeds, error = found
    assert "internal error" not in str(error), f"the patch does not fit: {error}"
    print(f"{name}: caught after {seeds} seeds: {error!r}"[:300])
