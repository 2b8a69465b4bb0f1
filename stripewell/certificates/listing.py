"""What certificates there are, for whom, and how long they are good. Blocking reads, no changes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID

from stripewell.certificates.folders import CA_CERTIFICATE, authority_folder
from stripewell.certificates.making import UNREADABLE, signed_by
from stripewell.errors import UserError, one_line
from stripewell.output import table

#: So many days before a certificate expires there is a warning.
WARN_DAYS = 30

_KINDS = ("server", "client")


def survey(root: Path, now: datetime) -> tuple[list[dict[str, Any]], list[str]]:
    """Every certificate in a directory, or in a folder that was copied from one; and warnings.
    Raises `UserError` if there is none."""
    found, warnings = [], []
    authority: x509.Certificate | None = None
    for kind, path in _paths(root):
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            entry = describe(certificate, kind, path, now)
        except UNREADABLE:
            warnings.append(f"{path} is no certificate: make it anew with --force")
            continue
        except OSError as error:
            warnings.append(f"{path} can't be read ({one_line(error)}): see to its permissions")
            continue
        if kind == "ca":
            authority = certificate
        elif authority and not signed_by(certificate, authority):
            warnings.append(f"{path} was signed by another CA: make it anew with --force")
        if entry["days_left"] < WARN_DAYS:
            warnings.append(_expiry(entry))
        found.append(entry)
    if not found and not warnings:
        raise UserError(
            f"{root} holds no certificates: make a CA with `stripewell tls ca {root}`, or name the"
            " directory of one"
        )
    return found, warnings


def describe(certificate: x509.Certificate, kind: str, path: Path, now: datetime) -> dict[str, Any]:
    """What people want to know of a certificate. Raises one of `UNREADABLE`."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    end = certificate.not_valid_after_utc
    return {
        "subject": str(names[0].value) if names else "",
        "kind": kind,
        "hosts": _hosts(certificate),
        "expires": end.isoformat(),
        "days_left": (end - now).days,
        "path": str(path),
    }


def listing(entries: list[dict[str, Any]]) -> str:
    """`survey()` for reading."""
    rows = [
        [
            entry["subject"],
            entry["kind"],
            ", ".join(entry["hosts"]),
            day(entry),
            "expired" if entry["days_left"] < 0 else str(entry["days_left"]),
        ]
        for entry in entries
    ]
    return table(["SUBJECT", "KIND", "HOSTS", "EXPIRES", "DAYS LEFT"], rows)


def day(entry: dict[str, Any]) -> str:
    """The day on which a certificate expires."""
    return str(entry["expires"])[:10]


def _paths(root: Path) -> Iterator[tuple[str, Path]]:
    """The CA's first: it is needed to judge the others."""
    for folder in (root, authority_folder(root)):
        if (folder / CA_CERTIFICATE).exists():
            yield "ca", folder / CA_CERTIFICATE
    folders = [root, *(path for kind in _KINDS for path in sorted(root.glob(f"{kind}s/[!.]*")))]
    for folder in folders:
        for kind in _KINDS:
            if (folder / f"{kind}-cert.pem").exists():
                yield kind, folder / f"{kind}-cert.pem"


def _hosts(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    dns = names.get_values_for_type(x509.DNSName)
    return dns + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def _expiry(entry: dict[str, Any]) -> str:
    path, days = entry["path"], entry["days_left"]
    again = "make it anew with --force"
    if entry["kind"] == "ca":
        again += ", and then all that it signed"
    if days < 0:
        return f"{path} has expired on {day(entry)}: {again}"
    left = "in 1 day" if days == 1 else f"in {days} days" if days else "today"
    return f"{path} expires {left}, on {day(entry)}: {again}"
