"""A client's key pair: the private half never leaves its machine, the public one is approved."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.errors import InputError, SecurityRefusal, writing

MAX_BYTES = 16 * 2**10
"""A key file is some hundred bytes; more is no key and is not read."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PRIVATE = ".key"
PUBLIC = ".pub"


@dataclass(frozen=True)
class PublicKey:
    """An approved or to be approved public key.

    Attributes:
        line: as in its file: type and base64, without a comment.
        pem: the form in which Flower knows it.
        fingerprint: as ``ssh-keygen -l`` shows it.
    """

    line: str
    pem: bytes
    fingerprint: str


def check_name(name: str, where: object = "--name") -> str:
    """A client's name, fit to be a file's name everywhere. Raises InputError."""
    if not NAME.fullmatch(name) or name.endswith((PRIVATE, PUBLIC)):
        raise InputError(
            "not a name for a client",
            where=where,
            got=repr(name),
            allowed="letters, digits, '.', '_' and '-', at most 64, the first a letter or digit",
        )
    return name


def machine_name() -> str:
    """A name for the client where the user gives none: the machine's, as far as it can be."""
    found = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node().split(".")[0]).strip("._-")[:64]
    return found or "client"


def only_name(folder: Path) -> str:
    """The name of the one client whose key is in the folder.

    Raises:
        InputError: there is no key, or more than one.
    """
    names = sorted(path.stem for path in folder.glob(f"*{PRIVATE}"))
    if len(names) == 1:
        return check_name(names[0])
    raise InputError(
        "several keys are here: which client is it?" if names else "there is no key here",
        where=folder.resolve().name or folder,
        got=", ".join(names[:5]) or None,
        do="Give --name" if names else "Type 'fedtl client keys --name NAME'",
    )


def make_keys(folder: Path, name: str) -> tuple[Path, Path, PublicKey]:
    """Write ``<name>.key`` (only its owner can read it) and ``<name>.pub``.

    Raises:
        InputError: the name is not allowed, or one of the files is there already.
    """
    private, public = folder / (check_name(name) + PRIVATE), folder / (name + PUBLIC)
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise InputError(
                "exists already and is never overwritten",
                where=path,
                do="Choose another --name, or move it away",
            )
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, form = serialization.Encoding, serialization.PrivateFormat
    secret = key.private_bytes(encoding.PEM, form.OpenSSH, serialization.NoEncryption())
    found = _public(key.public_key())
    write_secret(private, secret)
    write_new(public, f"{found.line} {name}\n".encode(), 0o644)
    return private, public, found


def read_private(path: Path, *, insecure_permissions: bool = False) -> ec.EllipticCurvePrivateKey:
    """The private key in a file that nobody but its owner can read.

    Raises:
        InputError: not there, or not such a key.
        SecurityRefusal: others can read it, unless ``insecure_permissions``.
    """
    content, mode = _read(path)
    if mode & 0o077 and not insecure_permissions:
        raise SecurityRefusal(
            "others on this machine can read this private key",
            where=path,
            got=f"mode {stat.S_IMODE(mode):04o}",
            allowed="0600",
            do=f"Type 'chmod 600 {path}', or make a new key if others were there",
        )
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise InputError(
            "not an unencrypted EC P-384 private key in OpenSSH form",
            where=path,
            do="Make one with 'fedtl client keys'",
        )
    return key


def read_public(path: Path) -> PublicKey:
    """The public key in a ``.pub`` file.

    Raises:
        InputError: not there, or not such a key.
        SecurityRefusal: it holds a private key, which must not travel.
    """
    content, _ = _read(path)
    if b"PRIVATE KEY" in content:
        raise SecurityRefusal(
            "this is a private key, which must never leave its machine",
            where=path,
            do="Make a new pair with 'fedtl client keys' and send only the .pub file",
        )
    try:
        key = serialization.load_ssh_public_key(b" ".join(content.split()[:2]))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise InputError(
            "not an EC P-384 public key in OpenSSH form",
            where=path,
            do="Make one with 'fedtl client keys'",
        )
    return _public(key)


def public_of(key: ec.EllipticCurvePrivateKey) -> PublicKey:
    """The public half of a private key."""
    return _public(key.public_key())


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, from its first byte on."""
    write_new(path, content, 0o600)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """A new file that lasts; an existing one is never overwritten."""
    with writing(path.name, path.parent):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise InputError("exists already and is never overwritten", where=path) from None
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> tuple[bytes, int]:
    """A small file's content and its mode."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=path,
            do="Make keys with 'fedtl client keys'",
        ) from error
    if len(content) > MAX_BYTES:
        raise InputError("too large for a key", where=path, allowed=f"{MAX_BYTES} bytes")
    return content, mode


def _public(key: ec.EllipticCurvePublicKey) -> PublicKey:
    encoding, form = serialization.Encoding, serialization.PublicFormat
    line = key.public_bytes(encoding.OpenSSH, form.OpenSSH).decode()
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    pem = key.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
    return PublicKey(line, pem, "SHA256:" + base64.b64encode(digest).decode().rstrip("="))
