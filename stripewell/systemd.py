"""Tell systemd how far the daemon is (sd_notify(3)). Without NOTIFY_SOCKET nothing happens."""

from __future__ import annotations

import os
import socket


def notify(message: str) -> None:
    """Send "READY=1", "STOPPING=1" and the like. A supervisor that does not listen is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as supervisor:
        try:
            supervisor.sendto(message.encode(), address)
        except OSError:
            return
