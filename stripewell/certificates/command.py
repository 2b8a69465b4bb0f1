"""`stripewell tls`: make a CA and certificates, and see when they expire.

Added to the command line by `cli`. What needs the package cryptography is loaded when a command
runs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stripewell.certificates.hosts import MAX_NAME, parse_hosts
from stripewell.errors import UserError
from stripewell.names import check_name

if TYPE_CHECKING:
    from stripewell.certificates.making import Credentials

#: The first one that tells times with their zone.
_CRYPTOGRAPHY = 42
_MAX_DAYS = 36500

directory_argument = click.argument(
    "root", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)
)
days_option = click.option(
    "--days", type=click.IntRange(1, _MAX_DAYS), metavar="N", help="How long it is good."
)
force_option = click.option("--force", is_flag=True, help="Replace what is there.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")


def _makes(command: Callable[..., None]) -> Callable[..., None]:
    """Argument and options of every command that makes a certificate."""
    return directory_argument(days_option(force_option(json_option(command))))


@click.command("ca")
@click.option("--name", default="stripewell CA", show_default=True, help="Its common name.")
@_makes
def ca(root: Path, name: str, days: int | None, force: bool, as_json: bool) -> None:
    """Make a private CA in DIR/ca. Its key signs all others and stays there."""
    _require_cryptography()
    from stripewell.certificates import folders, making

    if not (name.strip() and name.isprintable() and len(name) <= MAX_NAME):
        raise UserError(
            f"{name[:80]!r} is no name of a CA: use 1 to {MAX_NAME} printable characters"
        )
    folder, now = folders.authority_folder(root), _now()
    folders.check_free(folder, force=force)
    replaces = folder.exists()
    made = making.make_authority(name, now, days)
    folders.write(folder, folders.authority_files(made), force=force)
    if replaces:
        _warn("what the old CA has signed is refused from now on: make all certificates anew")
    _tell(made, "ca", folder, now, as_json=as_json)


@click.command("server")
@click.option("--host", "names", multiple=True, required=True, help="DNS name or IP; repeat.")
@_makes
def server(
    root: Path, names: tuple[str, ...], days: int | None, force: bool, as_json: bool
) -> None:
    """Make a server's certificate in DIR/servers/HOST, by the first of its hosts."""
    hosts = parse_hosts(names)
    _require_cryptography()
    from stripewell.certificates.making import make_server

    def make(authority: Credentials, now: datetime) -> Credentials:
        return make_server(authority, hosts, now, days)

    _make_leaf(root, "server", str(hosts[0]), make, force=force, as_json=as_json)


@click.command("client")
@click.option("--name", required=True, metavar="SUBJECT", help="Its common name.")
@_makes
def client(root: Path, name: str, days: int | None, force: bool, as_json: bool) -> None:
    """Make a client's certificate in DIR/clients/SUBJECT."""
    check_name("client", name)
    _require_cryptography()
    from stripewell.certificates.making import make_client

    def make(authority: Credentials, now: datetime) -> Credentials:
        return make_client(authority, name, now, days)

    _make_leaf(root, "client", name, make, force=force, as_json=as_json)


@click.command("list")
@directory_argument
@json_option
def list_(root: Path, as_json: bool) -> None:
    """Certificates in DIR and when they expire; also of a folder that was copied to a host."""
    _require_cryptography()
    from stripewell.certificates.listing import listing, survey

    entries, warnings = survey(root, _now())
    for warning in warnings:
        _warn(warning)
    if entries or as_json:
        click.echo(json.dumps(entries, indent=2) if as_json else listing(entries))


COMMANDS = (ca, server, client, list_)


def _make_leaf(
    root: Path,
    kind: str,
    name: str,
    make: Callable[[Credentials, datetime], Credentials],
    *,
    force: bool,
    as_json: bool,
) -> None:
    from stripewell.certificates import folders

    folder, now = folders.leaf_folder(root, kind, name), _now()
    authority = folders.load_authority(root)
    folders.check_free(folder, force=force)
    made = make(authority, now)
    folders.write(folder, folders.leaf_files(authority, kind, made), force=force)
    _tell(made, kind, folder, now, as_json=as_json)


def _tell(made: Credentials, kind: str, folder: Path, now: datetime, *, as_json: bool) -> None:
    from stripewell.certificates.listing import day, describe

    entry: dict[str, Any] = describe(made.certificate, kind, folder / f"{kind}-cert.pem", now)
    what = "CA" if kind == "ca" else f"{kind} certificate"
    whose = f"for {', '.join(entry['hosts'])}" if entry["hosts"] else entry["subject"]
    text = f"made {what} {whose} in {folder}, expires {day(entry)}"
    click.echo(json.dumps(entry, indent=2) if as_json else text)


def _warn(line: str) -> None:
    click.echo(f"stripewell: warning: {line}", err=True)


def _require_cryptography() -> None:
    """Raises `UserError` if the package is missing or too old."""
    try:
        version = importlib.import_module("cryptography").__version__
    except ImportError:
        version = "0"
    if int(version.partition(".")[0]) < _CRYPTOGRAPHY:
        raise UserError(
            "certificates are made with the Python package cryptography:"
            f" `pip install 'cryptography>={_CRYPTOGRAPHY}'` first"
        )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
