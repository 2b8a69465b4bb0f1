"""The metrics page, read back by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbd_server.counters import Counters
from stripewell.metrics import PoolCollector, render
from tests.unit.stripewell.fakes import status

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def samples() -> Samples:
    counters = Counters(reads=5, read_bytes=4096, errors=1)
    counters.observe(3_000, 5)
    page = render(PoolCollector(status, counters)).decode()
    return {
        (sample.name, frozenset(sample.labels.items()) - {("pool", "tank")}): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"stripewell_{name}", frozenset(labels.items())]


def test_space_and_journal(samples: Samples) -> None:
    assert value(samples, "pool_capacity_bytes") == 1 << 30
    assert value(samples, "journal_used_bytes") == 1 << 12
    assert value(samples, "journal_replicas") == 1
    assert value(samples, "stripes_degraded") == 2


def test_one_state_is_set(samples: Samples) -> None:
    assert value(samples, "pool_state", state="degraded") == 1
    assert value(samples, "pool_state", state="healthy") == 0
    assert value(samples, "device_state", device="1", state="missing") == 1
    assert value(samples, "device_state", device="0", state="missing") == 0


def test_devices(samples: Samples) -> None:
    assert value(samples, "device_size_bytes", device="0") == 1 << 30
    assert value(samples, "device_errors_total", device="1") == 3
    assert value(samples, "device_written_bytes_total", device="0") == 8192
    assert value(samples, "device_repaired_total", device="0") == 2
    assert not any("member" in name for name, _ in samples)


def test_counters_end_in_total(samples: Samples) -> None:
    assert value(samples, "pool_stripes_written_total") == 4
    assert value(samples, "nbd_reads_total") == 5
    assert value(samples, "nbd_read_bytes_total") == 4096
    assert value(samples, "nbd_errors_total") == 1


def test_latency_is_a_cumulative_histogram(samples: Samples) -> None:
    assert value(samples, "nbd_request_seconds_bucket", le="2e-06") == 0
    assert value(samples, "nbd_request_seconds_bucket", le="4e-06") == 5
    assert value(samples, "nbd_request_seconds_bucket", le="+Inf") == 5


def test_every_name_has_our_prefix(samples: Samples) -> None:
    assert {name.split("_")[0] for name, _ in samples} == {"stripewell"}
