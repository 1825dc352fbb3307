"""The server's folder: made once and whole, clients approved one by one, certificate renewed."""

from __future__ import annotations

import ssl
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from fedtl.deployment.certificates import days_left, issue_server, load_certificate, names_of
from fedtl.deployment.federation import Federation, create_federation, renew
from fedtl.deployment.join import JoinFile, is_loopback, read_join, split_address
from fedtl.deployment.keys import make_keys
from fedtl.engines.wire import PROTOCOL
from fedtl.errors import InputError, SecurityRefusal


def modes(root: Path) -> dict[str, str]:
    return {path.name: f"{path.stat().st_mode & 0o777:o}" for path in sorted(root.iterdir())}


def test_what_is_secret_is_private(federation: Federation) -> None:
    assert federation.root.stat().st_mode & 0o777 == 0o700
    found = modes(federation.root)
    assert {name for name, mode in found.items() if mode == "600"} == {
        "ca.key", "server.key", "signing.key",
    }  # fmt: skip
    join = federation.join_path.read_bytes()
    for name in ("ca.key", "server.key", "signing.key"):
        secret = federation.path(name).read_bytes().split(b"\n")[1]
        assert secret not in join


def test_the_server_certificate_is_for_every_name_given_and_loopback(
    federation: Federation,
) -> None:
    certificate = load_certificate(federation.path("server.pem").read_bytes(), "")
    assert set(names_of(certificate)) == {"fl.example.org", "localhost", "127.0.0.1", "::1"}
    authority = federation.join().certificate()
    certificate.verify_directly_issued_by(authority)
    assert 729 < days_left(certificate) < 731
    assert 3649 < days_left(authority) < 3651
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


def test_python_believes_it_under_its_strictest_rules(federation: Federation) -> None:
    context = ssl.create_default_context(cadata=federation.join().authority.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(federation.path("server.pem"), federation.path("server.key"))
    for name in ("fl.example.org", "127.0.0.1"):
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(theirs, ours, server_hostname=name)
        other = server.wrap_bio(ours, theirs, server_side=True)
        for _ in range(4):
            for side in (client, other):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        assert client.version() == "TLSv1.3"


def test_an_existing_folder_is_never_touched(federation: Federation) -> None:
    before = {path: path.read_bytes() for path in federation.root.glob("*.*")}
    with pytest.raises(InputError, match="never overwritten"):
        create_federation(federation.root, "localhost:1", [], b"")
    assert {path: path.read_bytes() for path in federation.root.glob("*.*")} == before


@pytest.mark.parametrize("name", ["a b", "", "http://x", "x/y", "*", "a..b", "-x"])
def test_bad_names_leave_nothing_behind(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="neither a DNS name nor an IP address"):
        create_federation(tmp_path / "f", "localhost:8443", [name], b"")
    assert not (tmp_path / "f").exists()


def test_renewal_keeps_authority_names_and_clients(
    federation: Federation, public_key: Path
) -> None:
    federation.approve(public_key)
    before = federation.join()
    old = federation.path("server.pem").read_bytes()
    join = renew(federation, None, ["10.0.0.7"])
    assert join == before
    assert federation.path("server.pem").read_bytes() != old
    certificate = load_certificate(federation.path("server.pem").read_bytes(), "")
    certificate.verify_directly_issued_by(before.certificate())
    assert {"fl.example.org", "10.0.0.7", "127.0.0.1"} <= set(names_of(certificate))
    assert federation.path("server.key").stat().st_mode & 0o777 == 0o600
    assert list(federation.approved()) == ["hospital-a"]
    moved = renew(federation, "new.example.org:9000", [])
    assert federation.join() == moved
    assert moved.authority == before.authority


def test_a_client_is_approved_under_its_files_name(
    federation: Federation, public_key: Path
) -> None:
    name, key = federation.approve(public_key)
    assert name == "hospital-a"
    assert federation.approved() == {"hospital-a": key}


def test_one_key_is_one_client_and_one_name_is_one_key(
    federation: Federation, public_key: Path, tmp_path: Path
) -> None:
    federation.approve(public_key)
    with pytest.raises(InputError, match="hospital-a is approved already"):
        federation.approve(public_key)
    (tmp_path / "other.pub").write_bytes(public_key.read_bytes())
    with pytest.raises(SecurityRefusal, match="approved already, as hospital-a"):
        federation.approve(tmp_path / "other.pub")
    for name in ("hospital-a", "HOSPITAL-A"):
        (tmp_path / "second").mkdir(exist_ok=True)
        _, public, _ = make_keys(tmp_path / "second", name)
        with pytest.raises(SecurityRefusal, match="another key is approved as hospital-a"):
            federation.approve(public)
    assert list(federation.approved()) == ["hospital-a"]


@pytest.mark.parametrize("name", ["..pub", ".pub", ".hidden.pub", "a b.pub", "x.key.pub"])
def test_files_with_odd_names_are_refused(
    federation: Federation, public_key: Path, name: str
) -> None:
    path = public_key.with_name(name)
    path.write_bytes(public_key.read_bytes())
    with pytest.raises(InputError, match="not a name"):
        federation.approve(path)
    assert federation.approved() == {}


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fedtl server init"):
        Federation(tmp_path).join()
    with pytest.raises(InputError, match="fedtl server init"):
        Federation(tmp_path).approve(tmp_path / "x.pub")


def test_a_join_file_survives_its_file(federation: Federation) -> None:
    join = federation.join()
    assert read_join(federation.join_path) == join
    assert (join.host, join.port) == ("127.0.0.1", 8443)
    key = federation.signing_key()
    assert join.signing_key == key.public_key().public_bytes_raw()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "missing or wrong: format"),
        (lambda text: "\x00", "not a join file"),
        (lambda text: text.replace("format = 1", "format = 2"), "format 2"),
        (lambda text: text.replace(f"protocol = {PROTOCOL}", 'protocol = "1"'), "wrong: protocol"),
        (lambda text: text.replace("8443", "99999"), "not an address"),
        (lambda text: text.replace('signing_key = "', 'signing_key = "A'), "Ed25519"),
        (lambda text: text.replace("BEGIN CERT", "BEGIN XERT"), "not a certificate"),
        (lambda text: text.replace('ca_fingerprint = "', 'ca_fingerprint = "00:'), "fingerprint"),
        (lambda text: text + "#" * 2**17, "too large"),
    ],
)
def test_broken_join_files_are_named(federation: Federation, change, message: str) -> None:
    path = federation.join_path
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message):
        read_join(path)


def test_a_join_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Get join\.toml from"):
        read_join(tmp_path / "join.toml")


@pytest.mark.parametrize(
    ("address", "parts"),
    [("a:1", ("a", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:8443", ("::1", 8443))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", "a", ":1", "a:", "a:0", "a:65536", "a:x", "::1:80", "http://a:1", "a b:1", "[a:1"],
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError, match="not an address"):
        split_address(address)


@pytest.mark.parametrize(
    ("host", "near"),
    [("localhost", True), ("127.3.2.1", True), ("::1", True), ("10.0.0.1", False), ("x.de", False)],
)
def test_loopback(host: str, near: bool) -> None:
    assert is_loopback(host) is near


def test_a_certificate_can_be_over(authority) -> None:
    certificate = load_certificate(issue_server(authority, ["x"], days=-3).certificate, "")
    assert -3.1 < days_left(certificate) < -2.9


def test_join_files_are_made_of_plain_values(federation: Federation) -> None:
    assert isinstance(federation.join(), JoinFile)
    assert "BEGIN CERTIFICATE" in federation.join_path.read_text()
    assert "\\n" not in federation.join_path.read_text()


def test_31_a_server_does_not_start_with_an_expired_certificate(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtl.deployment.server import open_grid

    monkeypatch.setattr("fedtl.deployment.federation.issue_server", partial(issue_server, days=-5))
    renew(federation, None, [])
    assert -5.1 < federation.certificate_days() < -4.9
    with (
        pytest.raises(SecurityRefusal, match=r"expired 5 days ago.*--renew"),
        open_grid(federation),
    ):
        pass
