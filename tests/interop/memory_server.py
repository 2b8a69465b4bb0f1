"""Serves one memory export until it is told to stop; for tests, benchmarks and by hand.

    python -m tests.interop.memory_server --unix /tmp/nbd.sock --size 1073741824
    nbdinfo 'nbd+unix:///?socket=/tmp/nbd.sock'

Prints `ready` and the TCP port (0 without --tcp) once clients can connect. The export answers to
its name and to the empty one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nbd_server.export import Export
from nbd_server.server import Server
from stripewell import security
from tests.memory_export import MemoryExport


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    export = MemoryExport(
        arguments.name,
        arguments.size,
        read_only=arguments.read_only,
        description="a volume in memory",
    )
    export.slow = arguments.slow
    named: dict[str, Export] = {"": export, export.name: export}
    tls = security.load(
        security.Mode(arguments.tls),
        arguments.tls_certificates,
        verify_clients=arguments.tls_verify_clients,
        allow=arguments.tls_allow,
    )
    server = Server(named.get, lambda: [export], tls=tls)
    if arguments.unix:
        await server.listen_unix(arguments.unix)
    port = await server.listen_tcp("127.0.0.1", 0) if arguments.tcp else 0
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print("ready", port, flush=True)
    await stop.wait()
    await server.stop(grace_seconds=5)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="Serve a volume in memory over NBD.")
    parser.add_argument("--unix", help="path of a unix socket")
    parser.add_argument("--tcp", action="store_true", help="a free port of 127.0.0.1 as well")
    parser.add_argument("--size", type=int, default=64 << 20, help="bytes")
    parser.add_argument("--name", default="memory", help="name of the export")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--slow", action="store_true", help="answer everything from tasks")
    parser.add_argument("--tls", default="off", help="off, allowed or required")
    parser.add_argument("--tls-certificates", type=Path, help="a server's directory")
    parser.add_argument("--tls-verify-clients", action="store_true")
    parser.add_argument("--tls-allow", type=Path, help="volumes by subject")
    parser.add_argument("--plain", action="store_true", help="asyncio's own loop, not uvloop")
    arguments = parser.parse_args()
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = None if arguments.plain else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(arguments))


if __name__ == "__main__":
    main()
