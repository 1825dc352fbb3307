"""Client keys: made once, private ones guarded, public ones checked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from shutil import which

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedtl.deployment.keys import check_name, make_keys, public_of, read_private, read_public
from fedtl.errors import InputError, SecurityRefusal


def test_a_pair_belongs_together_and_the_private_half_is_private(tmp_path: Path) -> None:
    private, public, made = make_keys(tmp_path, "hospital-a")
    assert (private.name, public.name) == ("hospital-a.key", "hospital-a.pub")
    assert private.stat().st_mode & 0o777 == 0o600
    assert public_of(read_private(private)) == read_public(public) == made
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert b"PRIVATE" not in public.read_bytes()


def test_a_file_is_private_from_its_first_byte_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private, _, _ = make_keys(tmp_path, "a")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_fingerprints_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    private, public, made = make_keys(tmp_path, "a")
    for path in (private, public):
        shown = subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, text=True)
        assert made.fingerprint in shown.stdout


@pytest.mark.parametrize("taken", ["a.key", "a.pub"])
def test_existing_files_are_never_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match="never overwritten"):
        make_keys(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="never overwritten"):
        make_keys(tmp_path, "a")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/etc/x", ".hidden", "a b", "a\n", "-x", "x" * 65,
             "a.pub", "a.key", "ä", "a\x00"],
)  # fmt: skip
def test_names_that_are_paths_or_worse_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "hospital-a", "Site_2.b", "0", "x" * 64])
def test_plain_names_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_37_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    private, _, _ = make_keys(tmp_path, "a")
    private.chmod(mode)
    with pytest.raises(SecurityRefusal, match="chmod 600") as raised:
        read_private(private)
    assert raised.value.exit_code == 5
    assert f"{mode:04o}" in raised.value.line()
    read_private(private, insecure_permissions=True)


def ssh(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, password: bytes = b""
) -> bytes:
    form = serialization.PrivateFormat.OpenSSH
    hidden = serialization.BestAvailableEncryption(password) if password else None
    encoding = serialization.Encoding.PEM
    return key.private_bytes(encoding, form, hidden or serialization.NoEncryption())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
        ssh(ed25519.Ed25519PrivateKey.generate()),
        ssh(ec.generate_private_key(ec.SECP256R1())),
        os.urandom(1000),
    ],
    ids=["empty", "text", "hollow", "ed25519", "p256", "bytes"],
)
def test_other_things_are_no_private_keys(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="P-384 private key"):
        read_private(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"ssh-rsa AAAA", b"ecdsa-sha2-nistp384 AAAA x", os.urandom(500), b"a " * 5000],
    ids=["empty", "line", "rsa", "hollow", "bytes", "many words"],
)
def test_other_things_are_no_public_keys(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pub"
    path.write_bytes(content)
    with pytest.raises(InputError, match="P-384 public key"):
        read_public(path)


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="too large"):
        read_public(path)


def test_a_private_key_sent_by_mistake_is_refused(tmp_path: Path) -> None:
    private, _, _ = make_keys(tmp_path, "a")
    with pytest.raises(SecurityRefusal, match="must never leave") as raised:
        read_public(private)
    assert "client keys" in raised.value.line()
