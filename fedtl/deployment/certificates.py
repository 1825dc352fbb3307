"""The federation's own authority and the server's certificate: who a client believes it talks to.

The authority's key stays at the server; its certificate travels in the join file and is the only
one that clients believe, whatever the machine's own list of authorities says.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtl.errors import InputError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
WARNING_DAYS = 14
"""Before its end a certificate is complained about."""

ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names that every server certificate has: the server's own parts talk over loopback."""

_DNS = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)(\.|$)"
                  r"(([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)(\.|$))*")  # fmt: skip


@dataclass(frozen=True)
class Issued:
    """A private key and its certificate, both as PEM."""

    key: bytes
    certificate: bytes


def make_authority(name: str) -> Issued:
    """A new authority that may sign server certificates and nothing deeper."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _pem(key, builder.sign(key, hashes.SHA384()))


def issue_server(authority: Issued, names: Iterable[str], days: float = SERVER_DAYS) -> Issued:
    """A server certificate for these DNS names and IP addresses and for loopback.

    Raises:
        InputError: a name is neither a DNS name nor an IP address.
    """
    ca_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP384R1())
    wanted = list(dict.fromkeys([*names, *ALWAYS]))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, wanted[0][:64])])
    builder = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([*map(_general, wanted)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    return _pem(key, builder.sign(ca_key, hashes.SHA384()))


def load_certificate(pem: bytes, where: object) -> x509.Certificate:
    """A certificate from PEM. Raises InputError where it is none."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InputError("not a certificate in PEM form", where=where) from error


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses that a server certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return (*found.get_values_for_type(x509.DNSName), *addresses)


def days_left(certificate: x509.Certificate) -> float:
    """Days until a certificate ends; negative when it has ended."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, written as ``openssl x509 -fingerprint -sha256`` does."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=max(1, 1 - days)))  # clocks differ a little
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Issued:
    encoding = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    return Issued(
        key.private_bytes(encoding, form, serialization.NoEncryption()),
        certificate.public_bytes(encoding),
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _DNS.fullmatch(name):
        raise InputError("neither a DNS name nor an IP address", where="--name", got=repr(name))
    return x509.DNSName(name)
