"""What can be wrong between a client and its server, and how it is told: FAULTS 30-38, 42."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.deployment.certificates import issue_server, make_authority
from fedtl.deployment.federation import own_facts
from fedtl.deployment.knock import check_approved, check_clock, check_versions, knock, resolve
from fedtl.errors import EnvironmentFault, SecurityRefusal

KEY = ec.generate_private_key(ec.SECP384R1())


def test_a_good_door(good_door, join_to) -> None:
    hello = knock(join_to(good_door.port), KEY)
    assert (hello.reason, hello.online) == ("", False)
    assert abs(hello.clock_seconds) < 2
    assert check_clock(hello).startswith("differs by")
    (headers,) = good_door.seen
    assert {name.lower() for name in headers} == {
        "host", "accept-encoding", "flwr-public-key", "flwr-timestamp", "flwr-signature",
    }  # fmt: skip  # nothing else leaves


def test_flower_knows_our_headers() -> None:
    from fedtl.engines import flower_gate

    assert flower_gate.FLEET_HTTP_PUBLIC_KEY_HEADER == "flwr-public-key"
    assert flower_gate.FLEET_HTTP_SIGNATURE_HEADER == "flwr-signature"
    assert flower_gate.TIMESTAMP_HEADER == "flwr-timestamp"
    from fedtl.deployment import knock as module

    assert module.HELLO == flower_gate.HELLO


def test_30_another_authority(open_door, join_to) -> None:
    other = make_authority("somebody else's authority")
    door = open_door(issue_server(other, []))
    join = join_to(door.port)
    with pytest.raises(SecurityRefusal) as raised:
        knock(join, KEY)
    line = raised.value.line()
    assert raised.value.exit_code == 5
    assert "somebody else's authority" in line
    assert "CN=test authority" in line
    assert "join.toml" in line
    assert door.seen == []  # it was not spoken to


def test_30_an_authority_of_the_same_name(open_door, join_to) -> None:
    door = open_door(issue_server(make_authority("test authority"), []))
    with pytest.raises(SecurityRefusal, match="not signed by the authority of this join file"):
        knock(join_to(door.port), KEY)


def test_31_an_expired_certificate(open_door, join_to, authority) -> None:
    door = open_door(issue_server(authority, [], days=-10))
    with pytest.raises(
        SecurityRefusal, match=r"expired on 20\d\d-\d\d-\d\d.*10 days ago"
    ) as raised:
        knock(join_to(door.port), KEY)
    assert "server init --renew" in raised.value.line()


def test_32_another_host_name(open_door, join_to, authority, monkeypatch) -> None:
    monkeypatch.setattr("fedtl.deployment.certificates.ALWAYS", ())
    door = open_door(issue_server(authority, ["fl.example.org", "10.0.0.9"]))
    with pytest.raises(SecurityRefusal, match="for other names") as raised:
        knock(join_to(door.port), KEY)
    line = raised.value.line()
    assert "fl.example.org" in line
    assert "10.0.0.9" in line
    assert "allowed: 127.0.0.1" in line
    assert "--name 127.0.0.1" in line


def test_33_no_tls(open_door, join_to) -> None:
    door = open_door(None)
    with pytest.raises(EnvironmentFault, match="does not speak TLS"):
        knock(join_to(door.port), KEY)


def test_34_an_unknown_key(good_door, join_to) -> None:
    good_door.status, good_door.content = 401, {"reason": "key"}
    hello = knock(join_to(good_door.port), KEY)
    with pytest.raises(SecurityRefusal, match=r"SHA256:abc.*fedtl server approve a\.pub") as raised:
        check_approved(hello, "a", "SHA256:abc")
    assert raised.value.exit_code == 5


@pytest.mark.parametrize(("ahead", "word"), [(612, "slow"), (-612, "fast"), (75, "slow")])
def test_38_clocks_that_differ(good_door, join_to, ahead: int, word: str) -> None:
    good_door.clock = timedelta(seconds=ahead)
    hello = knock(join_to(good_door.port), KEY)
    with pytest.raises(
        EnvironmentFault, match=rf"clock differs by \d+ s.*it is {word}.*NTP"
    ) as told:
        check_clock(hello)
    shown = int(told.value.what.split("by ")[1].split(" s")[0])
    assert abs(shown - abs(ahead)) <= 2


def test_38_a_clock_that_is_refused_is_told_as_a_clock(good_door, join_to) -> None:
    good_door.clock, good_door.status = timedelta(seconds=600), 401
    good_door.content = {"reason": "clock"}
    hello = knock(join_to(good_door.port), KEY)
    with pytest.raises(EnvironmentFault, match="clock differs"):
        check_approved(hello, "a", "SHA256:abc")


def test_small_differences_of_clocks_are_fine(good_door, join_to) -> None:
    good_door.clock = timedelta(seconds=-30)
    assert check_clock(knock(join_to(good_door.port), KEY)) in (
        "differs by 30 s",
        "differs by 29 s",
    )


@pytest.mark.parametrize("change", [{"fedtl": "9.9.0"}, {"protocol": 99}, {"fedtl": None}])
def test_42_versions_that_do_not_work_together(join_to, change) -> None:
    with pytest.raises(EnvironmentFault) as raised:
        check_versions(join_to(1), {**own_facts(), **change}, own_facts())
    line = raised.value.line()
    assert str(own_facts()["fedtl"]) in line
    assert str(next(iter(change.values()))) in line
    assert "pip install" in line


def test_42_a_newer_patch_is_fine(join_to) -> None:
    major, minor, _ = str(own_facts()["fedtl"]).split(".")
    newer = {**own_facts(), "fedtl": f"{major}.{minor}.99"}
    assert "99" in check_versions(join_to(1), newer, own_facts())


def test_nobody_listens(join_to) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(EnvironmentFault, match="nobody listens there"):
        knock(join_to(port), KEY)


def test_a_name_that_is_none(join_to) -> None:
    for host in ("no-such-host.invalid", "x" * 70 + ".org"):
        with pytest.raises(EnvironmentFault, match="cannot be resolved"):
            resolve(replace(join_to(1), address=f"{host}:1"))


def test_a_server_that_says_nothing_is_left_after_a_while(join_to) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        before = time.monotonic()
        with pytest.raises(EnvironmentFault, match="handshake failed"):
            knock(join_to(silent.getsockname()[1]), KEY, timeout=0.3)
        assert time.monotonic() - before < 5


@pytest.mark.parametrize("status", [200, 404, 500])
def test_another_server_under_our_certificate(good_door, join_to, status: int) -> None:
    good_door.status = status
    good_door.content = {"fedtl": "\x1b[31m" * 50, "reason": ["x"] * 10}
    if status == 200:
        hello = knock(join_to(good_door.port), KEY)
        assert "\x1b" not in hello.reason
        with pytest.raises(EnvironmentFault) as raised:
            check_versions(join_to(1), hello.facts, own_facts())
        assert "\x1b" not in raised.value.line()
    else:
        with pytest.raises(EnvironmentFault, match="does not answer as one of fedtl"):
            knock(join_to(good_door.port), KEY)


def test_a_starting_server_is_waited_for(good_door, join_to) -> None:
    good_door.status = 503
    with pytest.raises(EnvironmentFault, match="is starting"):
        knock(join_to(good_door.port), KEY)


@pytest.mark.parametrize("reply", [b"", b"\x00" * 1000, b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 10**6])
def test_garbage_behind_tls(join_to, authority, tmp_path, reply: bytes) -> None:
    import ssl

    issued = issue_server(authority, [])
    (tmp_path / "x.pem").write_bytes(issued.key + issued.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "x.pem")

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(10_000)
            try:
                secure.sendall(reply)
            except OSError:
                return

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with pytest.raises(EnvironmentFault, match="does not answer as one of fedtl"):
            knock(join_to(listener.getsockname()[1]), KEY)
        thread.join()
