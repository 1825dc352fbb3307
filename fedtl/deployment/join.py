"""The join file: all a client must know of a federation, and nothing secret.

It says whom the client trusts: the authority behind the server's certificate, the key that signs
every request, and the one app whose messages are answered. Get it over a way that nobody can tamper
with, or compare the authority's fingerprint by phone.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from cryptography import x509

from fedtl.deployment.certificates import fingerprint, load_certificate
from fedtl.errors import InputError

MAX_BYTES = 64 * 2**10
FORMAT = 1
HEADER = """\
# Give this file to every client. Nothing in it is secret, but who changes it on its way can stand
# in for the server: compare the fingerprint below by phone.
"""


@dataclass(frozen=True)
class JoinFile:
    """What a join file says.

    Attributes:
        address: host and port of the server, as clients reach it.
        authority: PEM of the certificate that the server's must be signed by.
        signing_key: Ed25519 public key, raw, that signs the server's requests.
        app_sha256: of the one Flower app that is answered.
        protocol: of fedtl's messages.
        fedtl, flwr: the server's versions when it was made.
    """

    address: str
    authority: bytes
    signing_key: bytes
    app_sha256: str
    protocol: int
    fedtl: str
    flwr: str

    @property
    def host(self) -> str:
        """The server's host."""
        return split_address(self.address)[0]

    @property
    def port(self) -> int:
        """The server's port."""
        return split_address(self.address)[1]

    def certificate(self) -> x509.Certificate:
        """The authority's certificate."""
        return load_certificate(self.authority, "join file: ca_certificate")

    def dump(self) -> bytes:
        """As TOML."""
        facts = {
            "format": FORMAT,
            "address": self.address,
            "protocol": self.protocol,
            "fedtl": self.fedtl,
            "flwr": self.flwr,
            "app_sha256": self.app_sha256,
            "signing_key": base64.b64encode(self.signing_key).decode(),
            "ca_fingerprint": fingerprint(self.certificate()),
            "ca_certificate": self.authority.decode(),
        }
        return (HEADER + tomli_w.dumps(facts, multiline_strings=True)).encode()


def read_join(path: Path) -> JoinFile:
    """Read a join file. Raises InputError saying what is wrong with it."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=path,
            do="Get join.toml from whoever runs the server",
        ) from error
    if len(content) > MAX_BYTES:
        raise InputError("too large for a join file", where=path, allowed=f"{MAX_BYTES} bytes")
    try:
        facts = tomllib.loads(content.decode())
    except ValueError as error:
        raise InputError("not a join file", where=path, got=str(error)[:200]) from error
    kinds = {"format": int, "protocol": int} | dict.fromkeys(
        ("address", "fedtl", "flwr", "app_sha256", "signing_key", "ca_certificate",
         "ca_fingerprint"), str,
    )  # fmt: skip
    wrong = [key for key, kind in kinds.items() if type(facts.get(key)) is not kind]
    if wrong:
        raise InputError("not a join file", where=path, got=f"missing or wrong: {', '.join(wrong)}")
    if facts["format"] != FORMAT:
        raise InputError(
            f"a join file of format {facts['format']}", where=path, allowed=FORMAT,
            do=f"Install fedtl {facts['fedtl']}",
        )  # fmt: skip
    try:
        signing_key = base64.b64decode(facts["signing_key"], validate=True)
    except binascii.Error:
        signing_key = b""
    if len(signing_key) != 32:
        raise InputError("not an Ed25519 key", where=f"{path}: signing_key")
    join = JoinFile(
        facts["address"],
        facts["ca_certificate"].encode(),
        signing_key,
        facts["app_sha256"],
        facts["protocol"],
        facts["fedtl"],
        facts["flwr"],
    )
    split_address(join.address)
    if fingerprint(join.certificate()) != facts["ca_fingerprint"]:
        raise InputError("certificate and fingerprint do not belong together", where=path)
    return join


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[ipv6]:port``. Raises InputError."""
    host, colon, port = address.rpartition(":")
    plain = host.removeprefix("[").removesuffix("]")
    wrapped = host != plain
    if (
        not colon
        or not plain
        or not port.isdecimal()
        or not 1 <= int(port) <= 65535
        or (":" in plain) != wrapped
        or any(c.isspace() or c in "/@" for c in plain)
    ):
        raise InputError(
            "not an address", where="address", got=repr(address), allowed="host:port, [ipv6]:port"
        )
    return plain, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
