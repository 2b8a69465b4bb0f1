"""What people read: aligned, complete, and made of the same data as --json."""

from __future__ import annotations

import json

from pool.check import Report
from stripewell import output
from tests.unit.stripewell.fakes import status


def test_a_table_is_aligned() -> None:
    text = output.table(["A", "LONGER"], [["x" * 5, "1"], ["y", "2"]])
    assert [line.find("1") for line in text.splitlines()[1:2]] == [text.find("LONGER")]
    assert text.splitlines()[2] == "y      2"


def test_status_tells_devices_and_problems() -> None:
    text = output.pool_status(status())
    assert "degraded" in text
    assert "1+1" in text
    assert any(line.startswith("1       missing ") for line in text.splitlines())
    assert "1 of 2 replicas" in text
    assert "problem: device 1 is missing" in text.splitlines()


def test_status_of_a_pool_that_is_not_served() -> None:
    text = output.pool_status(status(served=False))
    assert "degraded, not served" in text
    assert "replicas" not in text


def test_status_is_json() -> None:
    assert json.loads(json.dumps(status())) == status()


def test_lists() -> None:
    pool = {"name": "tank", "uuid": "0123", "devices": ["a", "b"], "served": True}
    assert output.pool_list([pool]).splitlines()[1].split() == ["tank", "yes", "2", "0123"]
    volume = {
        "pool": "tank",
        "name": "vm1",
        "size": 20 << 30,
        "used_bytes": 0,
        "created": 0.0,
        "state": "online",
    }
    line = output.volume_list([volume]).splitlines()[1]
    assert line.startswith("tank/vm1  20 GiB  0 B   online")


def test_check_tells_faults_remarks_and_what_was_looked_at() -> None:
    report = Report()
    report.degraded("block", "stripe 7: shard 2 is bad", stripe=7, shard=2)
    report.lost("page", "leaf 3 is lost")
    report.remark("device 1 missed a commit")
    report.checked.stripes = 9
    report.finish(1.25)
    lines = output.pool_check("tank", report.to_json()).splitlines()
    assert lines[:3] == [
        "leaf 3 is lost",
        "stripe 7: shard 2 is bad",
        "remark: device 1 missed a commit",
    ]
    assert lines[3].startswith("tank: 2 faults; looked at 0 members, 9 stripes")
