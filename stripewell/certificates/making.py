"""Certificates as such: who signs what, for how long, with which extensions. Pure but for the keys.

Keys are EC P-256: small, and known to every GnuTLS and OpenSSL that is still in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from stripewell.certificates.hosts import Host
from stripewell.errors import UserError

CA_DAYS = 3650
LEAF_DAYS = 730

#: What is raised for files that hold no certificate or key, or one that is encrypted or odd.
UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

#: Clocks of hosts differ; a new certificate is to be good on all of them.
_SKEW = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make_authority(name: str, now: datetime, days: int | None = None) -> Credentials:
    """A CA that signs servers and clients, but no other CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The organisation keeps it apart from a client of the same name, which would seem self-signed.
    subject = _name((NameOID.ORGANIZATION_NAME, "stripewell"), (NameOID.COMMON_NAME, name))
    end = now + timedelta(days=days or CA_DAYS)
    builder = (
        _builder(subject, subject, key, key, now, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return Credentials(builder.sign(key, hashes.SHA256()), key)


def make_server(
    authority: Credentials, hosts: Sequence[Host], now: datetime, days: int | None = None
) -> Credentials:
    """A server's certificate, named after the first of its hosts."""
    names = x509.SubjectAlternativeName(
        [x509.DNSName(one) if isinstance(one, str) else x509.IPAddress(one) for one in hosts]
    )
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    return _leaf(authority, str(hosts[0]), purpose, now, days, names)


def make_client(
    authority: Credentials, name: str, now: datetime, days: int | None = None
) -> Credentials:
    """A client's certificate."""
    return _leaf(authority, name, ExtendedKeyUsageOID.CLIENT_AUTH, now, days)


def load_credentials(certificate: bytes, key: bytes) -> Credentials:
    """Of PEM. Raises one of `UNREADABLE` if it is damaged or does not belong together."""
    found = x509.load_pem_x509_certificate(certificate)
    private = serialization.load_pem_private_key(key, password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not EC")
    if private.public_key() != found.public_key():
        raise ValueError("key and certificate do not belong together")
    return Credentials(found, private)


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether it is the authority's, by name and signature."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _leaf(
    authority: Credentials,
    name: str,
    purpose: ObjectIdentifier,
    now: datetime,
    days: int | None,
    *extensions: x509.ExtensionType,
) -> Credentials:
    end = _end(authority.certificate, now, days)
    key = ec.generate_private_key(ec.SECP256R1())
    subject, issuer = _name((NameOID.COMMON_NAME, name)), authority.certificate.subject
    builder = (
        _builder(subject, issuer, key, authority.key, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # QEMU before 7.2.22 refuses a critical one without keyEncipherment, which EC keys lack.
        .add_extension(_usage(signs=False), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return Credentials(builder.sign(authority.key, hashes.SHA256()), key)


def _end(authority: x509.Certificate, now: datetime, days: int | None) -> datetime:
    """When a leaf expires: never after the CA. Raises `UserError`."""
    last = authority.not_valid_after_utc
    left = (last - now).days
    if left < 1:
        verb = "has expired" if last <= now else "expires"
        raise UserError(
            f"the CA {verb} on {last:%Y-%m-%d}: make a new one with"
            " `stripewell tls ca DIR --force`, and all certificates anew"
        )
    if days is not None and days > left:
        raise UserError(f"the CA expires on {last:%Y-%m-%d}: choose at most --days {left}")
    return min(now + timedelta(days=days or LEAF_DAYS), last)


def _name(*attributes: tuple[ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    """What all certificates have."""
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
    )
