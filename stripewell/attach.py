"""The lines to paste for QEMU, libvirt and nbd-client. Pure text; called by the CLI.

* reconnect-delay: QEMU retries about 0, 1, 3, 7, 15, 31 and 47 s after a loss; with 30 an outage of
  16 s already gives the guest an I/O error, so 60. Without it every restart of the daemon is an
  error.
* werror/rerror=stop: an error pauses the guest instead of reaching its file system; `cont` retries.
* discard=unmap on both nodes: either one alone drops the guest's TRIM.
"""

from __future__ import annotations

import json
import socket
import zlib
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

from stripewell.endpoints import Address, Endpoints

RECONNECT_SECONDS = 60
#: Where a client's certificate is expected (`docs/operations.md`, "TLS").
CREDENTIALS = "/etc/pki/stripewell"
_CONNECTIONS = 4
#: QEMU's limit of a node name is 31; ours get "-nbd" appended.
_NODE_LENGTH = 27


def describe(pool: str, volume: str, endpoints: Endpoints) -> dict[str, Any]:
    """Everything about attaching one volume, JSON-able."""
    where = replace(endpoints, tcp=_reachable(endpoints.tcp))
    return {
        "pool": pool,
        "volume": volume,
        "uris": where.uris(volume),
        "qemu": qemu_arguments(volume, where),
        "libvirt": libvirt_disk(volume, where),
        "nbd_client": nbd_client_commands(volume, where),
    }


def node_name(volume: str) -> str:
    """A well-formed QEMU node name, distinct for distinct volumes, short enough for a suffix."""
    name = f"sw-{volume}"
    if len(name) <= _NODE_LENGTH:
        return name
    return f"{name[: _NODE_LENGTH - 9]}-{zlib.crc32(volume.encode()):08x}"


def qemu_arguments(volume: str, endpoints: Endpoints) -> list[str]:
    """Arguments of qemu-system-*: the NBD node, the raw node over it, and the virtio disk."""
    node = node_name(volume)
    client = {
        "driver": "nbd",
        "node-name": f"{node}-nbd",
        "server": {"type": "unix", "path": endpoints.unix},
        "export": volume,
        "reconnect-delay": RECONNECT_SECONDS,
        "discard": "unmap",
    }
    credentials = []
    if endpoints.tls:
        client |= {"tls-creds": "tls0"} | _tls_server(endpoints)
        credentials = ["-object", f"tls-creds-x509,id=tls0,dir={CREDENTIALS},endpoint=client"]
    raw = {"driver": "raw", "node-name": node, "file": f"{node}-nbd", "discard": "unmap"}
    device = f"virtio-blk-pci,drive={node},werror=stop,rerror=stop"
    return [
        *credentials,
        "-blockdev",
        json.dumps(client),
        "-blockdev",
        json.dumps(raw),
        "-device",
        device,
    ]


def _tls_server(endpoints: Endpoints) -> dict[str, Any]:
    """How QEMU reaches and checks a server with TLS: by the name in its certificate."""
    if endpoints.tcp:
        port = str(endpoints.tcp.port)
        return {"server": {"type": "inet", "host": endpoints.tcp.host, "port": port}}
    return {"tls-hostname": socket.gethostname()}


def libvirt_disk(volume: str, endpoints: Endpoints) -> str:
    """The <disk> element of a libvirt domain."""
    disk = ElementTree.Element("disk", type="network", device="disk")
    ElementTree.SubElement(
        disk,
        "driver",
        name="qemu",
        type="raw",
        discard="unmap",
        error_policy="stop",
        rerror_policy="stop",
    )
    source = ElementTree.SubElement(disk, "source", protocol="nbd", name=volume)
    if endpoints.tls:
        source.set("tls", "yes")
    if endpoints.tls and endpoints.tcp:
        host, port = endpoints.tcp.host, str(endpoints.tcp.port)
        ElementTree.SubElement(source, "host", name=host, port=port)
    else:
        ElementTree.SubElement(source, "host", transport="unix", socket=endpoints.unix)
    ElementTree.SubElement(source, "reconnect", delay=str(RECONNECT_SECONDS))
    ElementTree.SubElement(disk, "target", dev="vda", bus="virtio")
    ElementTree.indent(disk)
    return ElementTree.tostring(disk, encoding="unicode")


def nbd_client_commands(volume: str, endpoints: Endpoints) -> list[list[str]]:
    """The kernel's client: connect over the unix socket, over TCP if served there, disconnect."""
    device, tail = "/dev/nbd0", ["-N", volume, "-C", str(_CONNECTIONS)]
    if endpoints.tls:
        files = {"-A": "ca-cert", "-F": "client-cert", "-K": "client-key"}
        for option, name in files.items():
            tail += [option, f"{CREDENTIALS}/{name}.pem"]
    commands = [["nbd-client", "-unix", endpoints.unix, device, *tail]]
    if endpoints.tcp:
        host, port = endpoints.tcp.host, str(endpoints.tcp.port)
        commands.append(["nbd-client", host, port, device, *tail])
    return [*commands, ["nbd-client", "-d", device]]


def _reachable(address: Address | None) -> Address | None:
    """An address that others can use: listening on all interfaces is no place to connect to."""
    if address and address.host in {"0.0.0.0", "::", "*"}:
        return Address(socket.gethostname(), address.port)
    return address
