"""The server's folder: authority, certificate, keys, the approved app and the approved clients."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtl.deployment.certificates import (
    ALWAYS,
    Issued,
    days_left,
    issue_server,
    load_certificate,
    make_authority,
    names_of,
)
from fedtl.deployment.join import JoinFile, read_join, split_address
from fedtl.deployment.keys import (
    PUBLIC,
    PublicKey,
    check_name,
    read_public,
    write_new,
    write_secret,
)
from fedtl.engines.wire import PROTOCOL
from fedtl.errors import InputError, SecurityRefusal, writing
from fedtl.results.files import write_atomic

APPROVED = "approved"


@dataclass(frozen=True)
class Federation:
    """A federation's folder at the server.

    Attributes:
        root: holds ca.pem, ca.key, server.pem, server.key, signing.key, app.fab, join.toml and
            approved/<name>.pub; private files are readable by their owner only.
    """

    root: Path

    @property
    def join_path(self) -> Path:
        """What clients are given."""
        return self.root / "join.toml"

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.root / name

    def join(self) -> JoinFile:
        """What the join file says. Raises InputError where this is no federation's folder."""
        if not self.join_path.is_file():
            raise InputError(
                "not a federation's folder",
                where=self.root,
                do="Go where it is or give --folder; 'fedtl server init' makes a new one",
            )
        return read_join(self.join_path)

    def app(self) -> bytes:
        """The bundle of the approved app."""
        return self.path("app.fab").read_bytes()

    def signing_key(self) -> Ed25519PrivateKey:
        """Signs every request to a node."""
        key = serialization.load_pem_private_key(self.path("signing.key").read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        return key

    def certificate_days(self) -> float:
        """Days that the server's certificate is still valid; negative when it has expired."""
        return days_left(load_certificate(self.path("server.pem").read_bytes(), "server.pem"))

    def approved(self) -> dict[str, PublicKey]:
        """Approved clients by name, sorted."""
        folder = self.root / APPROVED
        return {path.stem: read_public(path) for path in sorted(folder.glob(f"*{PUBLIC}"))}

    def approve(self, path: Path) -> tuple[str, PublicKey]:
        """Approve the client whose public key is in a file; its name is the file's.

        Raises:
            InputError: not such a key, or its name is not allowed.
            SecurityRefusal: another client has this name, or this key.
        """
        self.join()
        key = read_public(path)
        name = check_name(path.name.removesuffix(PUBLIC), where=path)
        for other, known in self.approved().items():
            if known.line == key.line and other == name:
                raise InputError(f"{name} is approved already", got=key.fingerprint)
            if known.line == key.line:
                raise SecurityRefusal(
                    f"this key is approved already, as {other}; one key is one client",
                    where=path,
                    got=key.fingerprint,
                )
            if other.casefold() == name.casefold():
                raise SecurityRefusal(
                    f"another key is approved as {other}",
                    where=path,
                    got=key.fingerprint,
                    do=f"To replace that client's key, first remove {APPROVED}/{other}{PUBLIC}",
                )
        write_new(self.root / APPROVED / (name + PUBLIC), f"{key.line} {name}\n".encode(), 0o644)
        return name, key


def create_federation(root: Path, address: str, names: Iterable[str], app: bytes) -> Federation:
    """Make a federation's folder: once, for existing files are never overwritten.

    Args:
        address: host:port as clients reach the server.
        names: further DNS names and IP addresses of the server.
        app: bundle of the Flower app that clients will answer.
    """
    host, _ = split_address(address)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(
            "exists already and is never overwritten",
            where=root,
            do="Choose another --folder; a new certificate is made with --renew",
        )
    authority = make_authority(f"fedtl authority of {host}")
    server = issue_server(authority, [host, *names])
    signing = Ed25519PrivateKey.generate()
    with writing("the federation's folder", root):
        existed = root.exists()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.chmod(0o700)
        (root / APPROVED).mkdir()
    federation = Federation(root)
    try:
        write_new(federation.path("ca.pem"), authority.certificate, 0o644)
        write_secret(federation.path("ca.key"), authority.key)
        write_new(federation.path("server.pem"), server.certificate, 0o644)
        write_secret(federation.path("server.key"), server.key)
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = signing.private_bytes(encoding, form, serialization.NoEncryption())
        write_secret(federation.path("signing.key"), secret)
        write_new(federation.path("app.fab"), app, 0o644)
        join = _join(address, authority.certificate, _raw(signing), app)
        write_new(federation.join_path, join.dump(), 0o644)  # last: with it the folder is whole
    except BaseException:
        for path in root.iterdir():  # nothing but ours was in it
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)
        if not existed:
            root.rmdir()
        raise
    return federation


def renew(federation: Federation, address: str | None, names: Iterable[str]) -> JoinFile:
    """A new server certificate from the same authority, for a new address or further names too.

    Clients go on with the join file they have, unless the address has changed.
    """
    old = federation.join()
    address = address or old.address
    authority = Issued(
        federation.path("ca.key").read_bytes(), federation.path("ca.pem").read_bytes()
    )
    before = names_of(load_certificate(federation.path("server.pem").read_bytes(), "server.pem"))
    kept = [name for name in before if name not in ALWAYS]
    server = issue_server(authority, [split_address(address)[0], *names, *kept])
    join = _join(address, authority.certificate, old.signing_key, federation.app())
    with writing("server.key", federation.root):
        federation.path("server.key").unlink(missing_ok=True)
    write_secret(federation.path("server.key"), server.key)
    write_atomic(federation.path("server.pem"), server.certificate)
    write_atomic(federation.join_path, join.dump())
    return join


def own_facts() -> dict[str, str | int]:
    """Versions and protocol of this side, told to the other."""
    return {
        "fedtl": metadata.version("fedtl"),
        "flwr": metadata.version("flwr"),
        "protocol": PROTOCOL,
    }


def _join(address: str, authority: bytes, signing_key: bytes, app: bytes) -> JoinFile:
    from fedtl.engines.flower_app import app_hash

    return JoinFile(
        address,
        authority,
        signing_key,
        app_hash(app),
        PROTOCOL,
        metadata.version("fedtl"),
        metadata.version("flwr"),
    )


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()
