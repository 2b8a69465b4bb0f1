"""What the daemon tells systemd (sd_notify(3)) and gets from it (sd_listen_fds(3)).

Without NOTIFY_SOCKET nobody is told, without LISTEN_FDS there are no sockets.
"""

from __future__ import annotations

import os
import socket
import stat

from stripewell.errors import UserError

_FIRST_FD = 3
_FDS_MAX = 64


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


def listening() -> list[socket.socket]:
    """Sockets that somebody listens on for this process: connections made while it was away wait in
    them. Children do not inherit them. Raises `UserError` for anything but stream sockets."""
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal():
        return []
    if int(count) > _FDS_MAX:
        raise UserError(f"LISTEN_FDS={count} is too many: at most {_FDS_MAX}")
    sockets = []
    for number in range(int(count)):
        descriptor = _FIRST_FD + number
        os.set_inheritable(descriptor, False)
        sockets.append(_socket(descriptor, names.split(":")[number : number + 1]))
    return sockets


def _socket(descriptor: int, name: list[str]) -> socket.socket:
    called = f"descriptor {descriptor}" + (f" ({name[0]})" if name and name[0] else "")
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        raise UserError(f"{called} of LISTEN_FDS is no socket: give ListenStream= sockets only")
    sock = socket.socket(fileno=descriptor)
    stream = sock.type == socket.SOCK_STREAM
    if not stream or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UserError(f"{called} of LISTEN_FDS does not listen: use ListenStream=, Accept=no")
    return sock
