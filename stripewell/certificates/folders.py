"""Folders of certificates: where they are, and how one is written whole or not at all. Blocking."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from stripewell.certificates.making import UNREADABLE, Credentials, load_credentials
from stripewell.errors import UserError, one_line
from stripewell.state import sync_directory

CA_CERTIFICATE = "ca-cert.pem"
CA_KEY = "ca-key.pem"


def authority_folder(root: Path) -> Path:
    return root / "ca"


def leaf_folder(root: Path, kind: str, name: str) -> Path:
    """`kind` is "server" or "client"."""
    return root / f"{kind}s" / name


def leaf_files(authority: Credentials, kind: str, leaf: Credentials) -> dict[str, bytes]:
    """What a server or client needs."""
    return {
        CA_CERTIFICATE: authority.certificate_pem,
        f"{kind}-key.pem": leaf.key_pem,
        f"{kind}-cert.pem": leaf.certificate_pem,
    }


def authority_files(authority: Credentials) -> dict[str, bytes]:
    return {CA_KEY: authority.key_pem, CA_CERTIFICATE: authority.certificate_pem}


def load_authority(root: Path) -> Credentials:
    """The CA that `stripewell tls ca` made there. Raises `UserError`."""
    folder = authority_folder(root)
    try:
        files = [(folder / name).read_bytes() for name in (CA_CERTIFICATE, CA_KEY)]
        return load_credentials(*files)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{root} holds no CA ({one_line(error)}):"
            f" make one with `stripewell tls ca {root}`, or name its directory"
        ) from None
    except UNREADABLE as error:
        raise UserError(
            f"the CA in {folder} is damaged ({_reason(error)}): bring its files back from a backup,"
            f" or make a new one with `stripewell tls ca {root} --force`, and all certificates anew"
        ) from None


def check_free(folder: Path, *, force: bool) -> None:
    """Raises `UserError` if something would be overwritten."""
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already: --force replaces the certificate and key in it")


def write(folder: Path, files: Mapping[str, bytes], *, force: bool) -> None:
    """Write a folder, durable; nobody sees a part of it. Raises `UserError`.

    With `force` the files of one that exists are replaced each for itself, when all are ready; what
    else somebody has put there stays.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, content in files.items():
                _write_file(staged / name, content)
            sync_directory(staged)
            _publish(staged, folder, force=force)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        sync_directory(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: see to room and permissions there, or choose another DIR"
        ) from None


def _publish(staged: Path, folder: Path, *, force: bool) -> None:
    try:
        staged.rename(folder)  # replaces an empty one, never one with files
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    check_free(folder, force=force)
    folder.chmod(0o700)
    for path in staged.iterdir():
        path.replace(folder / path.name)
    sync_directory(folder)


def _reason(error: Exception) -> str:
    """The first sentence: cryptography goes on about what it tried."""
    return one_line(error).partition(". ")[0][:120]


def _write_file(path: Path, content: bytes) -> None:
    mode = 0o600 if path.name.endswith("-key.pem") else 0o644
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
