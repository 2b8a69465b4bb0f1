"""What commands do to an open pool, by name and with JSON arguments.

The same `Controller` is called directly by a command that opened the pool itself and by the
control socket of the daemon, so that both behave alike. Arguments are checked here, since they may
come off a socket; what is wrong with a pool or a device becomes a `UserError`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from pool import Pool, PoolError
from stripewell.control import Progress, no_progress
from stripewell.endpoints import Endpoints
from stripewell.errors import UserError, one_line
from stripewell.names import check_name

Arguments = dict[str, Any]

#: How a successor asks the daemon for its connections.
HAND_OVER = "daemon.hand_over"

#: The state of a pool whose devices another process has locked.
ELSEWHERE = "served by another process"


class Controller:
    """Operations on one open pool. `dropped` is told the name of every volume that was deleted.

    `elsewhere`: another process serves the pool, so that its state can't be told from here.
    `hand_over` is told the path of a successor's socket."""

    def __init__(
        self,
        pool: Pool,
        endpoints: Endpoints | None = None,
        dropped: Callable[[str], None] = lambda name: None,
        *,
        elsewhere: bool = False,
        hand_over: Callable[[str], None] | None = None,
    ) -> None:
        self._elsewhere = elsewhere
        self._pool = pool
        self._endpoints = endpoints
        self._dropped = dropped
        self._operations: dict[
            str, tuple[dict[str, type], Callable[[Arguments, Progress], Awaitable[Any]]]
        ] = {
            "pool.status": ({}, self._status),
            "pool.check": ({}, self._check),
            "pool.endpoints": ({}, self._where),
            "volume.list": ({}, self._list),
            "volume.create": ({"name": str, "size": int}, self._create),
            "volume.delete": ({"name": str}, self._delete),
        }
        if hand_over is not None:
            self._hand_over_to = hand_over
            self._operations[HAND_OVER] = ({"path": str}, self._hand_over)

    async def call(
        self, operation: str, args: Arguments | None = None, progress: Progress = no_progress
    ) -> Any:
        """The operation's JSON-able result. Raises `UserError`."""
        known = self._operations.get(operation)
        if known is None:
            raise UserError(f"unknown operation {operation[:80]!r}: command and daemon differ")
        schema, method = known
        args = args or {}
        if set(args) != set(schema) or any(type(args[key]) is not schema[key] for key in schema):
            raise UserError(f"{operation} takes {', '.join(schema) or 'no arguments'}")
        try:
            return await method(args, progress)
        except ConnectionError:
            raise
        except (PoolError, OSError) as error:
            raise UserError(one_line(error)) from error

    async def _status(self, args: Arguments, progress: Progress) -> dict[str, Any]:
        status = self._pool.status() | {"served": self._endpoints is not None}
        if self._elsewhere:
            status |= {"state": ELSEWHERE, "problems": []}
        return status

    async def _check(self, args: Arguments, progress: Progress) -> dict[str, Any]:
        if self._elsewhere:
            raise UserError(f"pool {self._pool.name} is {ELSEWHERE}: use the --state of its daemon")
        return (await self._pool.check_report(progress)).to_json()

    async def _where(self, args: Arguments, progress: Progress) -> dict[str, Any] | None:
        return asdict(self._endpoints) if self._endpoints else None

    async def _list(self, args: Arguments, progress: Progress) -> list[dict[str, Any]]:
        return [
            {
                "pool": self._pool.name,
                "name": volume.name,
                "size": volume.size,
                "used_bytes": volume.used_bytes,
                "created": volume.created,
                "state": volume.state if self._endpoints else "not served",
            }
            for volume in self._pool.volumes()
        ]

    async def _create(self, args: Arguments, progress: Progress) -> dict[str, Any]:
        name = check_name("volume", args["name"])
        await self._pool.create_volume(name, args["size"])
        volumes: list[dict[str, Any]] = await self._list({}, progress)
        return next(volume for volume in volumes if volume["name"] == name)

    async def _hand_over(self, args: Arguments, progress: Progress) -> None:
        self._hand_over_to(args["path"])

    async def _delete(self, args: Arguments, progress: Progress) -> None:
        name = check_name("volume", args["name"])
        await self._pool.delete_volume(name)
        self._dropped(name)
