"""The command line. Each command checks what was typed, calls one operation, and prints its result.

Data goes to stdout (for reading, or with --json whole), warnings and progress to stderr. Exit
status: 0 done, 1 it could not be done, 2 it was asked wrongly. Called by `__main__`; what loads
the engine is imported where it is needed, so that `--help` and commands of a served pool answer at
once.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from stripewell import attach as attaching
from stripewell import output
from stripewell.certificates.command import COMMANDS as CERTIFICATE_COMMANDS
from stripewell.control import Progress, no_progress
from stripewell.endpoints import NBD_PORT, Address, Endpoints, parse_address, parse_socket
from stripewell.errors import UserError
from stripewell.names import split_volume
from stripewell.progress import shown
from stripewell.recover.command import recover
from stripewell.session import reach, served
from stripewell.sizes import format_size, parse_size
from stripewell.state import PoolRecord, State, default_directory

#: What the erasure code can express.
MAX_DATA = 64
MAX_PARITY = 16

T = TypeVar("T")
Command = Callable[..., None]


def _parsed(parse: Callable[[str], object]) -> Callable[..., Any]:
    """A callback that reads an option by one of our parsers; its `UserError` is a usage error."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        try:
            return None if value is None else parse(value)
        except UserError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


SIZE = _parsed(parse_size)
NBD_ADDRESS = _parsed(lambda text: parse_address(text, NBD_PORT))
HTTP_ADDRESS = _parsed(parse_address)
SOCKET = _parsed(parse_socket)
DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def _use_state(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.obj = State(value)


state_option = click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    expose_value=False,
    is_eager=True,
    callback=_use_state,
    help="Local state; also STRIPEWELL_STATE. It holds nothing that the devices don't.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")


def _prints(command: Command) -> Command:
    """Options of every command that prints data."""
    return json_option(state_option(command))


def _print(as_json: bool, data: object, text: str) -> None:
    click.echo(json.dumps(data, indent=2) if as_json else text)


def _warn(line: str) -> None:
    click.echo(f"stripewell: warning: {line}", err=True)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


async def _call(
    state: State,
    record: PoolRecord,
    operation: str,
    args: dict[str, Any] | None = None,
    *,
    read_only: bool = True,
    progress: Progress = no_progress,
) -> Any:
    async with reach(state, record, read_only=read_only, warn=_warn) as caller:
        return await caller.call(operation, args, progress)


class Group(click.Group):
    """Commands without guesses: "did you mean" next to a command that overwrites disks is none."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}: there are {', '.join(sorted(self.commands))}")
        return super().resolve_command(ctx, args)


Group.group_class = Group


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="stripewell", message="%(prog)s %(version)s")
@state_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Striped, erasure-coded storage pools, served to virtual machines over NBD."""
    if ctx.obj is None:
        ctx.obj = State(default_directory(os.environ, os.geteuid()))


@cli.group("pool")
def pool_group() -> None:
    """Make pools and look after them."""


@pool_group.command("create")
@click.argument("name")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--data", type=click.IntRange(1, MAX_DATA), required=True, help="Data shards (k).")
@click.option(
    "--parity",
    type=click.IntRange(0, MAX_PARITY),
    required=True,
    help="Parity shards (m): so many devices may be missing.",
)
@click.option("--journal", multiple=True, metavar="URL", help="A device for the journal; repeat.")
@click.option("--slot-size", metavar="SIZE", callback=SIZE, help="Of a shard; by device size.")
@click.option("--journal-size", metavar="SIZE", callback=SIZE, help="On each; by device size.")
@click.option("--force", is_flag=True, help="Overwrite what is on the devices.")
@_prints
@click.pass_obj
def pool_create(
    state: State,
    name: str,
    urls: tuple[str, ...],
    data: int,
    parity: int,
    journal: tuple[str, ...],
    slot_size: int | None,
    journal_size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make a pool of devices: file:///disk.img?size=10G, /dev/sdb, dir:///mnt/nas."""
    if state.find(name):
        raise UserError(f"there is a pool {name!r} already: choose another name or another --state")
    if len(urls) + len(journal) < data + parity:
        raise UserError(
            f"{data}+{parity} needs at least {data + parity} devices, {len(urls) + len(journal)}"
            " given: give more, or choose smaller --data or --parity"
        )
    state.make_directories()
    from pool import PoolSpec
    from pool.words import counted
    from stripewell.opening import create

    spec = PoolSpec(name, data, parity, slot_size, journal_size)
    with shown(f"create {name}") as progress:
        record = _run(create(spec, urls, journal, force=force, progress=progress))
    state.save(record)
    text = f"created pool {name} ({data}+{parity}, {counted(len(record.devices), 'device')})"
    _print(as_json, asdict(record), text)


@pool_group.command("import")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@_prints
@click.pass_obj
def pool_import(state: State, urls: tuple[str, ...], as_json: bool) -> None:
    """Make a pool known here, from its devices alone. Some may be missing."""
    from pool.words import counted
    from stripewell.opening import identify

    record, status = _run(identify(urls))
    known = state.find(record.name)
    if known and known.uuid != record.uuid:
        raise UserError(
            f"another pool {record.name!r} ({known.uuid}) is known in {state.root}:"
            " import this one with another --state"
        )
    state.save(record)
    missing = [device for device in status["devices"] if device["state"] != "active"]
    if status["state"] == "failed":
        for problem in status["problems"]:
            _warn(problem)
    devices = counted(len(record.devices), "device")
    lines = [f"imported pool {record.name} ({status['state']}, {devices})"]
    lines += [f"without device {one['index']}, last seen at {one['url']}" for one in missing]
    data = asdict(record) | {"state": status["state"], "missing": [one["url"] for one in missing]}
    _print(as_json, data, "\n".join(lines))


@pool_group.command("status")
@click.argument("name")
@_prints
@click.pass_obj
def pool_status(state: State, name: str, as_json: bool) -> None:
    """State, space and devices of a pool."""
    status = _run(_call(state, state.record(name), "pool.status"))
    _print(as_json, status, output.pool_status(status))


@pool_group.command("check")
@click.argument("name")
@_prints
@click.pass_context
def pool_check(ctx: click.Context, name: str, as_json: bool) -> None:
    """Read and verify everything; exit status 1 if there are faults."""
    state = ctx.obj
    record = state.record(name)
    with shown(f"check {name}") as progress:
        report = _run(_call(state, record, "pool.check", progress=progress))
    _print(as_json, {"name": name} | report, output.pool_check(name, report))
    if report["faults"]:
        ctx.exit(1)


@pool_group.command("list")
@_prints
@click.pass_obj
def pool_list(state: State, as_json: bool) -> None:
    """Pools known here."""
    pools = [
        asdict(record) | {"served": _run(served(state, record.name))}
        for record in state.records(_warn)
    ]
    _print(as_json, pools, output.pool_list(pools) if pools else f"no pool known in {state.root}")


@cli.group("volume")
def volume_group() -> None:
    """Make volumes and look after them."""


@volume_group.command("create")
@click.argument("path", metavar="POOL/VOLUME")
@click.option("--size", metavar="SIZE", callback=SIZE, required=True, help="As in 20G.")
@_prints
@click.pass_obj
def volume_create(state: State, path: str, size: int, as_json: bool) -> None:
    """Make a volume. It takes space as it is written."""
    pool_name, name = split_volume(path)
    args = {"name": name, "size": size}
    made = _run(_call(state, state.record(pool_name), "volume.create", args, read_only=False))
    _print(as_json, made, f"created volume {path} ({format_size(made['size'])})")


@volume_group.command("list")
@click.argument("pool_name", metavar="[POOL]", required=False)
@_prints
@click.pass_obj
def volume_list(state: State, pool_name: str | None, as_json: bool) -> None:
    """Volumes of a pool, or of all pools known here."""
    records = [state.record(pool_name)] if pool_name else state.records()
    volumes = [volume for record in records for volume in _run(_call(state, record, "volume.list"))]
    _print(as_json, volumes, output.volume_list(volumes) if volumes else "no volumes")


@volume_group.command("delete")
@click.argument("path", metavar="POOL/VOLUME")
@_prints
@click.pass_obj
def volume_delete(state: State, path: str, as_json: bool) -> None:
    """Delete a volume. Clients that are connected to it are cut off."""
    pool_name, name = split_volume(path)
    args = {"name": name}
    _run(_call(state, state.record(pool_name), "volume.delete", args, read_only=False))
    _print(as_json, {"pool": pool_name, "name": name}, f"deleted volume {path}")


@cli.command()
@click.argument("path", metavar="POOL/VOLUME")
@_prints
@click.pass_obj
def attach(state: State, path: str, as_json: bool) -> None:
    """Print the lines that attach a volume: QEMU, libvirt, nbd-client, NBD URI."""
    pool_name, name = split_volume(path)
    endpoints = _run(_endpoints(state, state.record(pool_name), name))
    if endpoints is None:
        _warn(f"{pool_name} is not served now: run `stripewell serve {pool_name}` first")
        endpoints = Endpoints(str(state.nbd_socket(pool_name)))
    lines = attaching.describe(pool_name, name, endpoints)
    _print(as_json, lines, output.attachment(lines))


async def _endpoints(state: State, record: PoolRecord, volume: str) -> Endpoints | None:
    """Where a volume is served; None if it exists but is not served. Raises `UserError`."""
    async with reach(state, record, read_only=True, warn=_warn) as caller:
        volumes = await caller.call("volume.list")
        where = await caller.call("pool.endpoints")
    if all(known["name"] != volume for known in volumes):
        names = ", ".join(known["name"] for known in volumes) or "none"
        raise UserError(f"pool {record.name} has no volume {volume!r} (it has: {names})")
    if where is None:
        return None
    tcp = Address(**where["tcp"]) if where["tcp"] else None
    return Endpoints(where["unix"], tcp, where.get("tls", False))


@cli.command()
@click.argument("name")
@click.option("--unix", callback=SOCKET, metavar="PATH", help="NBD socket.")
@click.option("--tcp", callback=NBD_ADDRESS, metavar="HOST[:PORT]", help="Serve NBD over TCP, too.")
@click.option("--http", callback=HTTP_ADDRESS, metavar="HOST:PORT", help="/metrics and /healthz.")
@click.option(
    "--tls", type=click.Choice(["off", "allowed", "required"]), default="off", show_default=True
)
@click.option(
    "--tls-certificates", type=DIRECTORY, metavar="DIR", help="Made by `stripewell tls server`."
)
@click.option(
    "--tls-verify-clients", is_flag=True, help="Only clients with a certificate of the CA."
)
@click.option(
    "--tls-allow", type=FILE, metavar="FILE", help="Volumes by subject: lines SUBJECT: VOLUME..."
)
@click.option("--read-only", is_flag=True, help="Change nothing; for a pool that lacks devices.")
@click.option(
    "--take-over", is_flag=True, help="Go on with the connections of the daemon that serves it now."
)
@state_option
@click.pass_obj
def serve(
    state: State,
    name: str,
    unix: Path | None,
    tcp: Address | None,
    http: Address | None,
    tls: str,
    tls_certificates: Path | None,
    tls_verify_clients: bool,
    tls_allow: Path | None,
    read_only: bool,
    take_over: bool,
) -> None:
    """Serve a pool's volumes over NBD until SIGTERM or SIGINT."""
    record = state.record(name)
    from stripewell import daemon, security

    policy = security.load(
        security.Mode(tls), tls_certificates, verify_clients=tls_verify_clients, allow=tls_allow
    )
    socket = unix or parse_socket(str(state.nbd_socket(name)))
    listen = daemon.Listen(socket, tcp, http, policy)
    daemon.serve(state, record, listen, read_only=read_only, take_over=take_over)


@cli.group("tls")
def tls_group() -> None:
    """Make certificates for NBD over TLS."""


for _command in CERTIFICATE_COMMANDS:
    tls_group.add_command(_command)

cli.add_command(recover)
