"""What a server has done so far, as plain integers that anything may read at any time.

Sessions add to them once per batch, not per request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_BUCKETS = 32


def _empty_histogram() -> list[int]:
    return [0] * _BUCKETS


@dataclass(slots=True)
class Counters:
    """Totals since the server was created; bytes count payload alone.

    `latency` counts requests by time from receipt to reply: bucket i holds those that took less
    than 2**i µs (and not less than half of that), the last one everything longer.
    """

    connections: int = 0
    refused_connections: int = 0
    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    statuses: int = 0
    caches: int = 0
    errors: int = 0
    latency: list[int] = field(default_factory=_empty_histogram)

    def observe(self, nanoseconds: int, requests: int = 1) -> None:
        """Count `requests` that took `nanoseconds` each."""
        self.latency[min((nanoseconds // 1000).bit_length(), _BUCKETS - 1)] += requests
