"""Memory and opening time under a large volume.

8 GiB are written at random over a volume of 100 GiB. Promised: the daemon and its workers stay
below 350 MiB together at their peak, opening after kill -9 takes at most three seconds with a
cold page cache, and no more with twice the data.

Called by `bench.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import fio
from bench.deployment import Deployment
from bench.processes import MemoryPeak, drop_page_cache
from bench.report import table

VOLUME = "bench"
LIMIT_BYTES = 350 << 20
LIMIT_OPENING = 3.0
#: Openings scatter by a few hundredths of a second; this much more still counts as "no more".
OPENING_SLACK = 0.5


def measure(folder: Path, gib: int, say: Callable[[str], None]) -> dict[str, float | bool]:
    """Peak memory in bytes, openings in seconds. Raises `FioFailed`, `CommandFailed`."""
    with Deployment(folder) as site:
        size = f"{max(4, gib)}G"
        site.create_pool(devices=6, size=size, data=4, parity=2)
        site.create_volume(VOLUME, "100G")
        site.serve()
        peaks, openings, cold = [], [], True
        for step in (1, 2):
            say(f"writing {gib} GiB at random, {step} of 2")
            peaks.append(_write(site, gib))
            say("kill -9, cold page cache, opening")
            site.kill()
            cold = drop_page_cache() and cold
            openings.append(_open(site))
        return {
            "gib": gib,
            "peak_bytes": peaks[0],
            "peak_bytes_twice": peaks[1],
            "opening_seconds": openings[0],
            "opening_seconds_twice": openings[1],
            "cold": cold,
        }


def _write(site: Deployment, gib: int) -> int:
    options = {"rw": "randwrite", "bs": "4k", "iodepth": "32", "io_size": f"{gib}G"}
    with MemoryPeak(site.pid) as peak:
        fio.run(site.uri(VOLUME), options, timeout=3600)
        fio.flush(site.uri(VOLUME))
    return peak.bytes


def _open(site: Deployment) -> float:
    seconds = site.serve(timeout=300)
    fio.first_read(site.uri(VOLUME))
    return seconds


def markdown(result: dict[str, float | bool]) -> str:
    """The result as a table."""
    gib, slack = result["gib"], result["opening_seconds"] + OPENING_SLACK
    cache = "cold" if result["cold"] else "warm: dropping the page cache needs root"
    lines = [["measured", "value", "limit", ""], ["---", "---:", "---:", "---"]]
    for name, key, limit, scale, unit in (
        (f"peak memory, {gib} GiB written", "peak_bytes", LIMIT_BYTES, 1 << 20, "MiB"),
        (f"peak memory, {2 * gib} GiB", "peak_bytes_twice", LIMIT_BYTES, 1 << 20, "MiB"),
        (f"opening after kill -9 ({cache})", "opening_seconds", LIMIT_OPENING, 1, "s"),
        ("opening, twice the data", "opening_seconds_twice", min(LIMIT_OPENING, slack), 1, "s"),
    ):
        verdict = "met" if result[key] <= limit else "MISSED"
        lines.append([name, f"{result[key] / scale:.1f} {unit}", f"{limit / scale:.1f}", verdict])
    return table(lines)
