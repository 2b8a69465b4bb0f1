"""What commands print for people: plain aligned text of the data that --json prints whole. Pure."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Any

from stripewell.sizes import format_size


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def pool_status(status: dict[str, Any]) -> str:
    """`Pool.status()` for reading."""
    journal, stripes = status["journal"], status["stripes"]
    size = format_size
    lines = [
        f"pool      {status['name']} ({status['uuid']})",
        f"state     {status['state']}{_service(status)}",
        f"code      {status['data']}+{status['parity']}",
        f"space     {size(status['used_bytes'])} used, {size(status['free_bytes'])} free,"
        f" {size(status['capacity_bytes'])} in all",
        f"journal   {_journal(journal, served=status['served'])}",
        f"stripes   {stripes['total']}, {stripes['degraded']} degraded, {stripes['narrow']} narrow,"
        f" {stripes['lost']} lost",
        f"volumes   {status['volumes']}",
        "",
        _devices(status["devices"]),
    ]
    if status["problems"]:
        lines += ["", *(f"problem: {problem}" for problem in status["problems"])]
    return "\n".join(lines)


def _service(status: dict[str, Any]) -> str:
    return "" if status["served"] or status["state"].startswith("served") else ", not served"


def _journal(journal: dict[str, Any], *, served: bool) -> str:
    if not served:  # which replicas are in use is known to the daemon alone
        return format_size(journal["size_bytes"])
    used, size = format_size(journal["used_bytes"]), format_size(journal["size_bytes"])
    replicas = f"{len(journal['replicas'])} of {journal['target_replicas']} replicas"
    return f"{used} of {size} used, {replicas}"


def _devices(devices: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(device["index"]),
            device["state"],
            "yes" if device["journal"] else "",
            format_size(device["size_bytes"]),
            format_size(device["used_bytes"]),
            str(device["errors"]),
            device["url"],
        ]
        for device in devices
    ]
    return table(["DEVICE", "STATE", "JOURNAL", "SIZE", "USED", "ERRORS", "URL"], rows)


def pool_check(name: str, report: dict[str, Any]) -> str:
    """What `pool check` found: faults, the worst first, remarks, and how much was looked at."""
    checked, faults = report["checked"], report["faults"]
    counts = [
        f"{checked[what]} {what}"
        for what in ("members", "stripes", "shards", "blocks", "pages", "entries", "records")
    ]
    found = {0: "no faults", 1: "1 fault"}.get(len(faults), f"{len(faults)} faults")
    return "\n".join(
        [
            *faults,
            *(f"remark: {remark}" for remark in report["remarks"]),
            f"{name}: {found}; looked at {', '.join(counts)} in {checked['seconds']:.1f} s",
        ]
    )


def pool_list(pools: list[dict[str, Any]]) -> str:
    rows = [
        [pool["name"], "yes" if pool["served"] else "no", str(len(pool["devices"])), pool["uuid"]]
        for pool in pools
    ]
    return table(["POOL", "SERVED", "DEVICES", "UUID"], rows)


def volume_list(volumes: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{volume['pool']}/{volume['name']}",
            format_size(volume["size"]),
            format_size(volume["used_bytes"]),
            str(volume["state"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(volume["created"])),
        ]
        for volume in volumes
    ]
    return table(["VOLUME", "SIZE", "USED", "STATE", "CREATED"], rows)


def attachment(lines: dict[str, Any]) -> str:
    """`attach.describe()` for pasting."""
    arguments = iter(lines["qemu"])
    qemu = [
        f"  {flag} {shlex.quote(value)}" for flag, value in zip(arguments, arguments, strict=True)
    ]
    nbd_client = ["modprobe nbd", *map(shlex.join, lines["nbd_client"])]
    return "\n".join(
        [
            "# NBD URI (qemu-img, nbdinfo, nbdcopy, fio)",
            *lines["uris"],
            "",
            "# QEMU; werror and rerror=stop pause the guest on an error, `cont` tries again",
            "qemu-system-x86_64 ... \\",
            " \\\n".join(qemu),
            "",
            "# libvirt",
            lines["libvirt"],
            "",
            "# Linux's own client: connect, in the end disconnect. It does not survive a restart",
            "# of the daemon: for guests use the lines above.",
            *nbd_client,
        ]
    )
