"""Results as a Markdown table and as JSON. Called by the measurements and `bench.__main__`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS = "stripewell"


@dataclass(frozen=True)
class Row:
    """One job: medians by server, ratios to each peer, and what each round gave."""

    job: str
    unit: str
    values: dict[str, float]
    rounds: dict[str, list[float]]
    ratios: dict[str, float]
    goal: float | None
    device_bytes_per_user_byte: dict[str, float]
    write_p99_ms: dict[str, float]

    @property
    def verdict(self) -> str:
        """Whether the ratio to qemu-nbd is the one aimed at."""
        if self.goal is None:
            return "-"
        met = self.ratios["qemu-nbd"] >= self.goal
        return f">= {self.goal:g}x {'met' if met else 'MISSED'}"


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a table."""
    peers = [name for name in rows[0].values if name != OURS]
    head = ["job", "unit", OURS, *peers, *(f"to {peer}" for peer in peers), "goal (qemu-nbd)"]
    lines = [head, ["---"] * 2 + ["---:"] * (1 + 2 * len(peers)) + ["---"]]
    for row in rows:
        figures = [f"{row.values[name]:,.0f}" for name in (OURS, *peers)]
        ratios = [f"{row.ratios[peer]:.2f}x" for peer in peers]
        lines.append([row.job, row.unit, *figures, *ratios, row.verdict])
    text = table(lines)
    for row in rows:
        if row.device_bytes_per_user_byte:
            costs = ", ".join(f"{k} {v:.1f}" for k, v in row.device_bytes_per_user_byte.items())
            text += f"\n\nDevice bytes per user byte, {row.job}: {costs}"
            text += " (sectors the disk wrote)"
    return text


def table(lines: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def store(path: Path, name: str, result: object) -> None:
    """Write a result with the machine it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": name, "machine": machine(), "result": result}, indent=1))


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [asdict(row) for row in rows]
