"""QEMU's control socket: commands with their answers, and the events seen on the way.

Called by `harness.Guest`. One thread uses it; every wait has a deadline.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

Message = dict[str, Any]


class QmpError(Exception):
    """QEMU refused a command; the text is QEMU's description."""


class Qmp:
    """Takes over a connection that QEMU has made."""

    def __init__(self, connection: socket.socket, timeout: float = 10) -> None:
        self.events: list[Message] = []
        self._socket = connection
        self._buffer = b""
        try:
            self._receive(time.monotonic() + timeout)  # the greeting
            self.call("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def call(self, command: str, timeout: float = 10, /, **arguments: object) -> Any:
        """The value a command returns. Raises `QmpError`, `TimeoutError`, `ConnectionError`."""
        request: Message = {"execute": command}
        if arguments:
            request["arguments"] = {
                key.replace("_", "-"): value for key, value in arguments.items()
            }
        self._socket.sendall(json.dumps(request).encode())
        deadline = time.monotonic() + timeout
        while True:
            message = self._receive(deadline)
            if "error" in message:
                raise QmpError(message["error"]["desc"])
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def wait_event(self, name: str, timeout: float) -> Message:
        """The first event of that name not taken yet. Raises `TimeoutError`, `ConnectionError`."""
        deadline = time.monotonic() + timeout
        while True:
            for position, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(position)
            self.events.append(self._receive(deadline))

    def close(self) -> None:
        """Drop the connection; QEMU goes on."""
        self._socket.close()

    def _receive(self, deadline: float) -> Message:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("QEMU closed its control socket")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: Message = json.loads(line)
        return message
