"""`pool check` of a running daemon, over its control socket, while clients write: no false alarm.

The pool is so small that its journal laps, its stripes are collected and its volumes deleted inside
of every check; afterwards the same check without a daemon finds nothing either.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

pytest.importorskip("nbd", reason="needs python3-libnbd")

from tests.cli.conftest import Stripewell
from tests.crash.clients import Clients
from tests.crash.test_kill import create
from tests.crash.writer import Work

SECONDS = 8.0


def test_checks_beside_clients_find_nothing(
    stripewell: Stripewell, capsys: pytest.CaptureFixture[str]
) -> None:
    create(stripewell)
    daemon = stripewell.serve()
    looked: Counter[str] = Counter()
    began, checks = time.monotonic(), 0
    with Clients(3, seed=5) as clients:
        clients.start(Work(daemon.socket, "vm1", depth=16))
        while time.monotonic() - began < SECONDS:
            name = f"tank/t{checks}"
            stripewell.ok("volume", "create", name, "--size", "1M")
            found = stripewell.json("pool", "check", "tank")
            assert found["faults"] == []
            assert found["remarks"] == []
            looked.update({k: n for k, n in found["checked"].items() if k != "seconds"})
            stripewell.ok("volume", "delete", name)
            checks += 1
        status = stripewell.json("pool", "status", "tank")
        life = clients.finish()
    assert life.errors == []
    assert daemon.terminate() == (0, "", "")
    after = stripewell.json("pool", "check", "tank")
    assert (after["faults"], after["remarks"]) == ([], [])
    counters = status["counters"]
    with capsys.disabled():
        print(
            f"\n{checks} checks beside {len(life.acknowledged)} writes, {counters['checkpoints']}"
            f" checkpoints and {counters['collected_stripes']} collected stripes; looked at"
            f" {dict(looked)}"
        )
    assert checks >= 3
    assert looked["stripes"] > 0
    assert looked["records"] > 0
    assert counters["checkpoints"] > checks
    assert counters["stripes_released"] > 0
