"""Prometheus metrics of one served pool: its status and the NBD server's counters at scrape.

Names follow Prometheus' conventions: base units, `_total` for what only grows. Labels have a
bounded number of values: pool, device index, state. Called by `daemon` when --http is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_POOL_STATES = ("healthy", "degraded", "full", "read-only", "failed")
_DEVICE_STATES = ("active", "missing", "expelled")


class PoolCollector(Collector):
    """Reads `status` (see `Pool.status`) and `counters` (a dataclass) when collected."""

    def __init__(self, status: Callable[[], dict[str, Any]], counters: object) -> None:
        self._status = status
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        pool = status["name"]
        yield from _space(pool, status)
        yield from _devices(pool, status["devices"])
        yield _states("pool_state", "State of the pool: 1 for the one it is in", [([pool], status)])
        for name, value in sorted(status["counters"].items()):
            if name.startswith("member_"):
                continue  # told as device_written_bytes, with a label instead of a name each
            yield _counter(f"pool_{name}", "Counted by the pool since it was opened", pool, value)
        yield from _server(pool, self._counters)


def render(collector: Collector) -> bytes:
    """The page in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _space(pool: str, status: dict[str, Any]) -> Iterator[Metric]:
    for name, text, value in (
        ("pool_capacity_bytes", "User data the pool can hold", status["capacity_bytes"]),
        ("pool_used_bytes", "User data the pool holds", status["used_bytes"]),
        ("pool_free_bytes", "User data that still fits", status["free_bytes"]),
        ("journal_size_bytes", "Size of the journal", status["journal"]["size_bytes"]),
        ("journal_used_bytes", "Journal not yet in stripes", status["journal"]["used_bytes"]),
        ("journal_replicas", "Journal replicas there are", len(status["journal"]["replicas"])),
        ("journal_replicas_wanted", "Replicas aimed at", status["journal"]["target_replicas"]),
        ("stripes", "Stripes in the pool", status["stripes"]["total"]),
        ("stripes_degraded", "Stripes that miss a shard", status["stripes"]["degraded"]),
        ("stripes_lost", "Stripes that cannot be read", status["stripes"]["lost"]),
        ("stripes_narrow", "Stripes written with fewer devices", status["stripes"]["narrow"]),
        ("volumes", "Volumes in the pool", status["volumes"]),
        ("pool_problems", "Problems that `pool status` names", len(status["problems"])),
    ):
        family = GaugeMetricFamily(f"stripewell_{name}", text, labels=["pool"])
        family.add_metric([pool], value)
        yield family


def _devices(pool: str, devices: list[dict[str, Any]]) -> Iterator[Metric]:
    for name, text in (
        ("size_bytes", "Usable size of a device"),
        ("used_bytes", "Bytes in use on a device"),
    ):
        family = GaugeMetricFamily(f"stripewell_device_{name}", text, labels=["pool", "device"])
        for device in devices:
            family.add_metric([pool, str(device["index"])], device[name])
        yield family
    for name, text, key in (
        ("errors", "Failed operations of a device", "errors"),
        ("repaired", "Blocks of a device that were bad and written anew", "repaired"),
        ("written_bytes", "Bytes written to a device", "written_bytes"),
    ):
        counter = CounterMetricFamily(f"stripewell_device_{name}", text, labels=["pool", "device"])
        for device in devices:
            counter.add_metric([pool, str(device["index"])], device[key])
        yield counter
    labelled = [([pool, str(device["index"])], device) for device in devices]
    yield _states("device_state", "State of a device: 1 for the one it is in", labelled)


def _states(name: str, text: str, things: list[tuple[list[str], dict[str, Any]]]) -> Metric:
    device = name.startswith("device")
    labels = ["pool", "device", "state"] if device else ["pool", "state"]
    family = GaugeMetricFamily(f"stripewell_{name}", text, labels=labels)
    for values, thing in things:
        for state in _DEVICE_STATES if device else _POOL_STATES:
            family.add_metric([*values, state], float(thing["state"] == state))
    return family


def _server(pool: str, counters: object) -> Iterator[Metric]:
    if not is_dataclass(counters):
        return
    for field in fields(counters):
        value = getattr(counters, field.name)
        if isinstance(value, int):
            text = "Counted by the NBD server since it started"
            yield _counter(f"nbd_{field.name}", text, pool, value)
        elif field.name == "latency":
            yield _latency(pool, value)


def _latency(pool: str, buckets: list[int]) -> Metric:
    """`buckets[i]` requests took less than 2**i µs; the last bucket has no bound."""
    family = HistogramMetricFamily(
        "stripewell_nbd_request_seconds", "From receipt of a request to its reply", labels=["pool"]
    )
    total, cumulative = 0, []
    for index, count in enumerate(buckets):
        total += count
        last = index == len(buckets) - 1
        cumulative.append(("+Inf" if last else f"{2**index / 1e6:g}", total))
    family.add_metric([pool], cumulative, sum_value=None)
    return family


def _counter(name: str, text: str, pool: str, value: int) -> Metric:
    family = CounterMetricFamily(f"stripewell_{name}", text, labels=["pool"])
    family.add_metric([pool], value)
    return family
