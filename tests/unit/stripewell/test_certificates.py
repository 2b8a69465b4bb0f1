"""`stripewell tls`: what is in certificates, what is refused, and that nothing is half done."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cryptography
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from stripewell.__main__ import run
from stripewell.certificates import folders, making
from stripewell.certificates.hosts import parse_host, parse_hosts
from stripewell.certificates.listing import survey
from stripewell.errors import UserError

Run = Callable[..., tuple[int, str, str]]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def tls(capsys: pytest.CaptureFixture[str]) -> Run:
    """Status, stdout and stderr of `stripewell tls ...`."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        status = run(["tls", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def root(tls: Run, tmp_path: Path) -> Path:
    """A directory with a CA, a server and a client."""
    root = tmp_path / "tls"
    assert tls("ca", root)[0] == 0
    hosts = ("--host", "storage1", "--host", "10.0.0.1", "--host", "fd00::1")
    assert tls("server", root, *hosts)[0] == 0
    assert tls("client", root, "--name", "vmhost1")[0] == 0
    return root


def refused(tls: Run, *arguments: str | Path, status: int = 1) -> str:
    """The one line of a command that has to fail."""
    found, out, err = tls(*arguments)
    assert (found, out) == (status, ""), err
    [line] = err.splitlines()
    return line.removeprefix("stripewell: ")


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below a directory, hidden files too."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


# Contents


def test_the_files_have_the_names_that_clients_expect(root: Path) -> None:
    files = sorted(name for name, content in snapshot(root).items() if content)
    assert files == [
        "ca/ca-cert.pem",
        "ca/ca-key.pem",
        "clients/vmhost1/ca-cert.pem",
        "clients/vmhost1/client-cert.pem",
        "clients/vmhost1/client-key.pem",
        "servers/storage1/ca-cert.pem",
        "servers/storage1/server-cert.pem",
        "servers/storage1/server-key.pem",
    ]


def test_private_keys_are_for_their_owner_alone(tls: Run, root: Path) -> None:
    (root / "clients/vmhost1").chmod(0o755)
    (root / "clients/vmhost1/client-key.pem").chmod(0o644)
    assert tls("client", root, "--name", "vmhost1", "--force")[0] == 0
    for key in root.rglob("*-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_the_key_of_the_ca_is_in_no_other_folder(root: Path) -> None:
    secret = (root / "ca/ca-key.pem").read_bytes()
    assert [name for name, content in snapshot(root).items() if content == secret] == [
        "ca/ca-key.pem"
    ]


@pytest.mark.parametrize("pair", ["ca/ca", "servers/storage1/server", "clients/vmhost1/client"])
def test_keys_are_p256_and_belong_to_their_certificates(root: Path, pair: str) -> None:
    key = serialization.load_pem_private_key((root / f"{pair}-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == certificate(root / f"{pair}-cert.pem").public_key()


def test_the_ca_may_sign_leaves_and_nothing_else(root: Path) -> None:
    ca = certificate(root / "ca/ca-cert.pem")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature


@pytest.mark.parametrize(
    ("path", "purpose", "subject"),
    [
        ("servers/storage1/server-cert.pem", ExtendedKeyUsageOID.SERVER_AUTH, "CN=storage1"),
        ("clients/vmhost1/client-cert.pem", ExtendedKeyUsageOID.CLIENT_AUTH, "CN=vmhost1"),
    ],
)
def test_leaves_have_one_purpose(
    root: Path, path: str, purpose: x509.ObjectIdentifier, subject: str
) -> None:
    leaf, ca = certificate(root / path), certificate(root / "ca/ca-cert.pem")
    get = leaf.extensions.get_extension_for_class
    assert leaf.subject.rfc4514_string() == subject
    assert list(get(x509.ExtendedKeyUsage).value) == [purpose]
    assert (get(x509.BasicConstraints).critical, get(x509.BasicConstraints).value.ca) == (
        True,
        False,
    )
    usage = get(x509.KeyUsage)
    assert usage.value.digital_signature
    assert not usage.value.key_encipherment  # RFC 8813: never with EC keys
    assert not usage.critical  # so that QEMU before 7.2.22 takes it
    signer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert get(x509.AuthorityKeyIdentifier).value.key_identifier == signer
    assert get(x509.SubjectKeyIdentifier).value.digest != signer


def test_the_chains_verify(root: Path) -> None:
    ca = certificate(root / "ca/ca-cert.pem")
    builder = PolicyBuilder().store(Store([ca]))
    server = certificate(root / "servers/storage1/server-cert.pem")
    for name in (
        x509.DNSName("storage1"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("fd00::1")),
    ):
        builder.build_server_verifier(name).verify(server, [])
    for folder in ("servers/storage1", "clients/vmhost1"):
        assert certificate(root / folder / "ca-cert.pem") == ca
    certificate(root / "clients/vmhost1/client-cert.pem").verify_directly_issued_by(ca)


def handshake(server: ssl.SSLObject, client: ssl.SSLObject, pipes: list[ssl.MemoryBIO]) -> None:
    """Of two ends in memory; `pipes` are server in, server out, client in, client out."""
    ready: set[ssl.SSLObject] = set()
    for _ in range(10):
        for end in (client, server):
            try:
                end.do_handshake()
                ready.add(end)
            except ssl.SSLWantReadError:
                pass
            pipes[2].write(pipes[1].read())
            pipes[0].write(pipes[3].read())
    assert ready == {server, client}


@pytest.mark.parametrize("host", ["storage1", "10.0.0.1", "fd00::1"])
def test_openssl_takes_them_at_its_strictest(root: Path, host: str) -> None:
    """Both ends verify; from Python 3.13 on this is what a default context does."""
    contexts = []
    for protocol, pair in (
        (ssl.PROTOCOL_TLS_SERVER, root / "servers/storage1/server"),
        (ssl.PROTOCOL_TLS_CLIENT, root / "clients/vmhost1/client"),
    ):
        context = ssl.SSLContext(protocol)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(f"{pair}-cert.pem", f"{pair}-key.pem")
        context.load_verify_locations(pair.parent / "ca-cert.pem")
        contexts.append(context)
    pipes = [ssl.MemoryBIO() for _ in range(4)]
    server = contexts[0].wrap_bio(pipes[0], pipes[1], server_side=True)
    client = contexts[1].wrap_bio(pipes[2], pipes[3], server_hostname=host)
    handshake(server, client, pipes)
    peer = server.getpeercert()
    assert peer is not None
    assert peer["subject"] == ((("commonName", "vmhost1"),),)


def test_serial_numbers_are_random(tls: Run, root: Path) -> None:
    path = root / "clients/vmhost1/client-cert.pem"
    serials = set()
    for _ in range(3):
        assert tls("client", root, "--name", "vmhost1", "--force")[0] == 0
        serials.add(certificate(path).serial_number)
    assert len(serials) == 3
    assert all(serial.bit_length() > 100 for serial in serials)


def test_a_client_with_the_name_of_the_ca_is_not_the_ca(tls: Run, tmp_path: Path) -> None:
    assert tls("ca", tmp_path, "--name", "twin")[0] == 0
    assert tls("client", tmp_path, "--name", "twin")[0] == 0
    client = certificate(tmp_path / "clients/twin/client-cert.pem")
    assert client.subject != client.issuer


# How long


def test_days_are_counted_from_now(tls: Run, root: Path) -> None:
    status, out, _ = tls("client", root, "--name", "short", "--days", "7", "--json")
    entry = json.loads(out)
    assert (status, entry["days_left"]) == (0, 7)
    end = datetime.fromisoformat(entry["expires"])
    assert abs(end - datetime.now(UTC) - timedelta(days=7)) < timedelta(minutes=5)
    found = certificate(Path(entry["path"]))
    assert found.not_valid_after_utc == end
    assert found.not_valid_before_utc < datetime.now(UTC)


def test_no_leaf_outlives_its_ca() -> None:
    ca = making.make_authority("ca", NOW, days=100)
    end = ca.certificate.not_valid_after_utc
    assert making.make_client(ca, "a", NOW).certificate.not_valid_after_utc == end
    assert making.make_client(ca, "a", NOW, 100).certificate.not_valid_after_utc == end
    with pytest.raises(UserError, match="at most --days 100"):
        making.make_client(ca, "a", NOW, 101)
    with pytest.raises(UserError, match="at most --days 1$"):
        making.make_client(ca, "a", NOW + timedelta(days=99), 2)
    with pytest.raises(UserError, match="CA expires on 2026-06-09: make a new one"):
        making.make_client(ca, "a", NOW + timedelta(days=99, hours=1))
    with pytest.raises(UserError, match="CA has expired on 2026-06-09: make a new one"):
        making.make_client(ca, "a", NOW + timedelta(days=100))


@pytest.mark.parametrize("days", ["0", "-1", "36501", "soon", "1.5", ""])
def test_days_that_are_none(tls: Run, tmp_path: Path, days: str) -> None:
    assert "--days" in refused(tls, "ca", tmp_path / "tls", f"--days={days}", status=2)
    assert not (tmp_path / "tls").exists()


# What is refused


@pytest.mark.parametrize(
    "arguments", [("server", "--host", "storage1"), ("client", "--name", "vmhost1"), ("list",)]
)
def test_a_directory_without_a_ca(tls: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        line = refused(tls, arguments[0], directory, *arguments[1:])
        assert f"stripewell tls ca {directory}" in line
    assert snapshot(tmp_path) == {}


def test_a_directory_that_is_a_file(tls: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in refused(tls, "ca", tmp_path / "file", status=2)
    assert "file" in refused(tls, "ca", tmp_path / "file/below")
    (tmp_path / "ca").touch()
    assert "choose another DIR" in refused(tls, "ca", tmp_path)
    assert snapshot(tmp_path) == {"file": b"", "ca": b""}


def test_nothing_is_overwritten_without_force(tls: Run, root: Path) -> None:
    before = snapshot(root)
    for arguments in (
        ("ca", root),
        ("server", root, "--host", "storage1"),
        ("client", root, "--name", "vmhost1"),
    ):
        assert "--force" in refused(tls, *arguments)
    assert snapshot(root) == before


def test_force_replaces_a_certificate_and_nothing_else(tls: Run, root: Path) -> None:
    (root / "clients/vmhost1/ca-crl.pem").write_text("somebody's")
    before = snapshot(root)
    assert tls("client", root, "--name", "vmhost1", "--force")[0] == 0
    after = snapshot(root)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"clients/vmhost1/client-cert.pem", "clients/vmhost1/client-key.pem"}


def test_a_new_ca_says_what_it_means(tls: Run, root: Path) -> None:
    status, _, err = tls("ca", root, "--force")
    assert (status, "make all certificates anew" in err) == (0, True)
    _, out, err = tls("list", root, "--json")
    assert len(json.loads(out)) == 3
    assert [line.partition(": make it")[0].split(" ", 3)[-1] for line in err.splitlines()] == [
        "was signed by another CA"
    ] * 2
    assert tls("client", root, "--name", "vmhost1", "--force")[0] == 0
    assert "vmhost1" not in tls("list", root)[2]


HOSTS_THAT_ARE_NONE = [
    "", " ", ".", "-", "a b", "a_b", "-a", "a-", "a..b", "a.", ".a", "*.example", "a/b", "../a",
    "300.1.1.1", "10.0.0", "1", "10.0.0.1/24", "10.0.0.1:10809", "host:10809", "[::1]", "::1::",
    "fe80::1%eth0", "ä.example", "a\nb", "a\0", "x" * 64, ".".join(["x" * 60] * 5), "nbd://a",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS_THAT_ARE_NONE)
def test_a_host_that_is_none(tls: Run, root: Path, host: str) -> None:
    before = snapshot(root)
    assert "is no host" in refused(tls, "server", root, "--host", "good", f"--host={host}")
    assert snapshot(root) == before


def test_hosts() -> None:
    assert parse_host("Storage1.Example") == "storage1.example"
    assert parse_host("x" * 63) == "x" * 63
    assert parse_host("3com.example") == "3com.example"
    assert parse_host("FD00:0::1") == ipaddress.ip_address("fd00::1")
    assert parse_hosts(["a", "10.0.0.1", "A", "10.0.0.1"]) == [
        "a",
        ipaddress.ip_address("10.0.0.1"),
    ]
    long = ".".join(["x" * 60] * 2)
    assert parse_hosts(["a", long]) == ["a", long]
    with pytest.raises(UserError, match="put a shorter one first"):
        parse_hosts([long, "a"])


def test_a_server_without_hosts(tls: Run, root: Path) -> None:
    assert "--host" in refused(tls, "server", root, status=2)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "x" * 65, "ä", "a\nb"])
def test_a_client_name_that_is_none(tls: Run, root: Path, name: str) -> None:
    before = snapshot(root)
    assert "is no client name" in refused(tls, "client", root, f"--name={name}")
    assert snapshot(root) == before


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\nb", "a\0b"])
def test_a_ca_name_that_is_none(tls: Run, tmp_path: Path, name: str) -> None:
    assert "is no name of a CA" in refused(tls, "ca", tmp_path / "tls", f"--name={name}")
    assert not (tmp_path / "tls").exists()


@pytest.mark.parametrize("arguments", [("ca",), ("client", "--name", "x"), ("list",)])
def test_without_cryptography(
    tls: Run, root: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    before = snapshot(root)
    command = (arguments[0], root, *arguments[1:])
    with monkeypatch.context() as patch:
        patch.setattr(cryptography, "__version__", "38.0.4")
        assert "pip install 'cryptography>=42'" in refused(tls, *command)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert "pip install 'cryptography>=42'" in refused(tls, *command)
    assert snapshot(root) == before


def test_other_commands_do_not_load_it() -> None:
    code = "import sys, stripewell.cli; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Nothing half done


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "force"])
def test_a_full_disk_leaves_everything_as_it_was(
    tls: Run, root: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    before = snapshot(root)
    name = ("--name", "vmhost1", "--force") if replaced else ("--name", "vmhost2")
    sync, calls = os.fsync, [0]

    def fail(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", fail)
    assert "No space left on device: see to room" in refused(tls, "client", root, *name)
    assert snapshot(root) == before


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "clients/vmhost1"
    folder.mkdir(parents=True)
    folders.write(folder, {"client-key.pem": b"first"}, force=False)
    with pytest.raises(UserError, match="exists already"):
        folders.write(folder, {"client-key.pem": b"second"}, force=False)
    assert snapshot(tmp_path) == {
        "clients": None,
        "clients/vmhost1": None,
        "clients/vmhost1/client-key.pem": b"first",
    }


@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-key.pem"])
@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_ca_is_one_line(tls: Run, root: Path, name: str, seed: int) -> None:
    """Also for `list`, which reads certificates only."""
    noise, path = random.Random(seed), root / "ca" / name
    lines = path.read_bytes().splitlines(keepends=True)
    at = noise.randrange(1, len(lines))
    lines[at] = noise.choice([b"", b"AAAA" + lines[at], lines[at][:-9] + b"\n", b"\xff" * 9])
    path.write_bytes(b"".join(lines))
    line = refused(tls, "client", root, "--name", "x")
    assert f"the CA in {root}/ca is damaged" in line
    assert not (root / "clients/x").exists()
    status, _, err = tls("list", root)
    assert status == 0
    assert all(line.startswith("stripewell: warning: ") for line in err.splitlines())


def test_the_key_of_another_ca(tls: Run, root: Path, tmp_path: Path) -> None:
    assert tls("ca", tmp_path / "other")[0] == 0
    (tmp_path / "other/ca/ca-key.pem").replace(root / "ca/ca-key.pem")
    assert "do not belong together" in refused(tls, "client", root, "--name", "x")


# The list


def test_the_list(tls: Run, root: Path) -> None:
    status, out, err = tls("list", root)
    assert (status, err) == (0, "")
    header, *rows = (line.split("  ") for line in out.splitlines())
    assert [cell.strip() for cell in header if cell] == [
        "SUBJECT", "KIND", "HOSTS", "EXPIRES", "DAYS LEFT",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["stripewell CA", "storage1", "vmhost1"]
    entries = json.loads(tls("list", root, "--json")[1])
    assert [entry["kind"] for entry in entries] == ["ca", "server", "client"]
    assert entries[1]["hosts"] == ["storage1", "10.0.0.1", "fd00::1"]
    assert entries[1]["path"] == str(root / "servers/storage1/server-cert.pem")


def test_the_list_of_a_folder_on_a_host(tls: Run, root: Path) -> None:
    entries = json.loads(tls("list", root / "servers/storage1", "--json")[1])
    assert [entry["kind"] for entry in entries] == ["ca", "server"]


@pytest.mark.parametrize(
    ("days", "hours", "said"),
    [
        (30, 0, None),
        (29, 23, "expires in 29 days, on 2026-03-"),
        (1, 1, "expires in 1 day, on 2026-03-"),
        (0, 1, "expires today, on 2026-03-"),
        (0, -1, "has expired on 2026-03-01"),
        (-400, 0, "has expired on 2025-"),
    ],
)
def test_what_expires_soon_is_named(
    tmp_path: Path, days: int, hours: int, said: str | None
) -> None:
    left = timedelta(days=days, hours=hours)
    made = NOW - timedelta(days=500)
    ca = making.make_authority("ca", made)
    client = making.make_client(ca, "vmhost1", NOW + left - timedelta(days=10), 10)
    folders.write(tmp_path / "ca", folders.authority_files(ca), force=False)
    files = folders.leaf_files(ca, "client", client)
    folders.write(tmp_path / "clients/vmhost1", files, force=False)
    entries, warnings = survey(tmp_path, NOW)
    assert [entry["days_left"] for entry in entries] == [3150, left.days]
    assert len(warnings) == (said is not None)
    if said:
        assert said in warnings[0]
        assert warnings[0].endswith("make it anew with --force")


def test_leftovers_are_not_listed(root: Path) -> None:
    """What a crash may leave behind: a folder that was not yet given its name."""
    (root / "clients/vmhost1").rename(root / "clients/.vmhost1.abc")
    entries, _ = survey(root, NOW)
    assert [entry["kind"] for entry in entries] == ["ca", "server"]
