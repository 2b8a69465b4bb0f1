"""TLS as the daemon's options ask for it: certificates, and who may see which volume.

A directory holds what `stripewell tls server` made, under the names that QEMU and libnbd use, too.
An allow-list has a line for each subject: its name, a colon, and patterns of volume names. Called
by the CLI; its result goes to `nbd_server`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from nbd_server.tls import Tls
from stripewell.errors import UserError, one_line

CA, CERTIFICATE, KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"


class Mode(Enum):
    """Whether clients may or must use TLS."""

    OFF = "off"
    ALLOWED = "allowed"
    REQUIRED = "required"


def load(
    mode: Mode, directory: Path | None, *, verify_clients: bool, allow: Path | None
) -> Tls | None:
    """What a server is given, None for off. Raises `UserError` for what does not fit together or
    cannot be read."""
    if mode is Mode.OFF:
        if directory or verify_clients or allow:
            raise UserError("certificates are for TLS: add --tls required (or allowed)")
        return None
    if directory is None:
        raise UserError(f"--tls {mode.value} needs --tls-certificates DIR: see `stripewell tls`")
    if allow is not None and not verify_clients:
        raise UserError("--tls-allow goes by certificates of clients: add --tls-verify-clients")
    context = _context(directory, verify_clients=verify_clients)
    permits = _permits(_read_allowed(allow)) if allow else _everybody
    return Tls(context, mode is Mode.REQUIRED, permits)


def _context(directory: Path, *, verify_clients: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    wanted = [CERTIFICATE, KEY, *([CA] if verify_clients else [])]
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory} has no {missing[0]}: make certificates with `stripewell tls server`"
        )
    try:
        context.load_cert_chain(directory / CERTIFICATE, directory / KEY)
        if verify_clients:
            context.load_verify_locations(directory / CA)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or one_line(error)
        raise UserError(
            f"the certificates in {directory} cannot be used ({why}): make new ones with"
            " `stripewell tls server`"
        ) from None
    return context


def _read_allowed(path: Path) -> dict[str, list[str]]:
    """Patterns of volume names by subject. Raises `UserError`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from None
    allowed: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        subject, colon, patterns = content.rpartition(":")
        if not colon or not subject.strip() or not patterns.split():
            raise UserError(f"{path}, line {number}: write SUBJECT: VOLUME..., as in vmhost1: vm1*")
        allowed.setdefault(subject.strip(), []).extend(patterns.split())
    if not allowed:
        raise UserError(f"{path} allows nobody anything: write lines SUBJECT: VOLUME...")
    return allowed


def _permits(allowed: Mapping[str, list[str]]) -> Callable[[str | None, str], bool]:
    def permits(subject: str | None, export: str) -> bool:
        patterns = allowed.get(subject, ()) if subject is not None else ()
        return any(fnmatchcase(export, pattern) for pattern in patterns)

    return permits


def _everybody(subject: str | None, export: str) -> bool:
    return True
