"""A pool that is 70 % full, overwritten with twenty times its capacity.

Never stopping is the promise: every write is answered, whatever the collector of dead blocks has
to do meanwhile. The tail of the latency shows how close it came.

Called by `bench.__main__`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import fio
from bench.deployment import Deployment
from bench.report import table

VOLUME = "bench"
FILL = 0.7
BLOCK = 1 << 20


def measure(folder: Path, device: str, times: int, say: Callable[[str], None]) -> dict[str, float]:
    """Latencies in seconds, sizes in bytes. Raises `FioFailed` when a write was refused or hung."""
    with Deployment(folder) as site:
        site.create_pool(devices=6, size=device, data=4, parity=2)
        capacity = int(site.status()["capacity_bytes"])
        size = int(capacity * FILL) // BLOCK * BLOCK
        site.create_volume(VOLUME, str(size))
        site.serve()
        uri = site.uri(VOLUME)
        say(f"filling {size >> 20} MiB of {capacity >> 20} MiB")
        fio.run(uri, {"rw": "write", "bs": "1M", "iodepth": "8"}, timeout=3600)
        say(f"overwriting at random with {times} times the capacity")
        options = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
        options |= {"size": str(size), "io_size": str(times * capacity)}
        result = fio.run(uri, options, timeout=4 * 3600)
        return {
            "capacity_bytes": capacity,
            "volume_bytes": size,
            "written_bytes": result.bytes,
            "iops": result.iops,
            **{f"p{key:g}_seconds": value for key, value in result.write_latency.items()},
            "max_seconds": result.write_latency_max,
        }


def markdown(result: dict[str, float]) -> str:
    """The result as a table."""
    lines = [["measured", "value"], ["---", "---:"]]
    lines += [
        [name, f"{result[f'{name}_bytes'] / (1 << 20):,.0f} MiB"]
        for name in ("capacity", "volume", "written")
    ]
    lines.append(["rate", f"{result['iops']:,.0f} IOPS"])
    for key, value in result.items():
        if key.endswith("_seconds"):
            label = key.removesuffix("_seconds")
            lines.append([f"write latency {label}", f"{value * 1000:,.1f} ms"])
    return table(lines)
