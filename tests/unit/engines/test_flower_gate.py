"""The gate before Flower's server, with nothing of Flower behind it."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.engines import flower_gate
from fedtl.engines.flower_gate import Gate, ImpatientProtocol

TOKEN = "t" * 64
KEY = ec.generate_private_key(ec.SECP384R1())
PEM = KEY.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


@dataclass
class App:
    """Stands for Flower's: knows one key, remembers what it was passed."""

    port: int = 0
    paths: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def state(self) -> Any:
        nodes = {PEM: 7}
        known = SimpleNamespace(
            get_node_id_by_public_key=nodes.get,
            get_node_info=lambda node_ids: [SimpleNamespace(status="online")],
        )
        return SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: known))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self.paths.append(scope["path"])
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"flower"})


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setattr(flower_gate, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(flower_gate, "MAX_BODY_BYTES", 1000)
    made = App()
    config = uvicorn.Config(
        Gate(made, TOKEN, {"fedtl": "1"}), port=0, http=ImpatientProtocol, lifespan="off",
        log_config=None, access_log=False, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    made.port = server.servers[0].sockets[0].getsockname()[1]
    yield made
    server.should_exit = True
    thread.join()


def client(app: App, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{app.port}", headers=headers)


def signed(stamp: str | None = None) -> dict[str, str]:
    stamp = stamp or datetime.now(UTC).isoformat()
    signature = KEY.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(PEM).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


def open_it(app: App) -> None:
    with client(app, **{"fedtl-token": TOKEN}) as ours:
        assert ours.get("/fedtl/ready").status_code == 200


def test_until_it_is_open_nodes_are_put_off(app: App) -> None:
    with client(app, **signed()) as node:
        assert node.post("/v1/fleet/x").status_code == 503
        open_it(app)
        assert node.post("/v1/fleet/x", content=b"hello").text == "flower"
    assert app.bodies == [b"hello"]


def test_only_our_own_process_gets_past_the_nodes_interface(app: App) -> None:
    open_it(app)
    for headers in ({}, {"fedtl-token": ""}, {"fedtl-token": "T" * 64}, signed()):
        with client(app, **headers) as somebody:
            for path in (
                "/v1/control/start-run",
                "/docs",
                "/v1/fleet",
                "/V1/fleet/x",
                "//v1/fleet/x",
            ):
                assert somebody.get(path).status_code == 404, (headers, path)
    with client(app, **{"fedtl-token": TOKEN}) as ours:
        assert ours.post("/v1/control/start-run").text == "flower"
    assert app.paths == ["/v1/control/start-run"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flwr-public-key": ""}, "key"),
        ({"flwr-public-key": "%"}, "malformed"),
        ({"flwr-public-key": "AAAA"}, "key"),
        ({"flwr-signature": "AAAA"}, "signature"),
        ({"flwr-signature": "\x7f"}, "malformed"),
        ({"flwr-timestamp": "now"}, "malformed"),
        ({"flwr-timestamp": "2020-01-01T00:00:00+00:00"}, "clock"),
        ({"flwr-timestamp": "2020-01-01T00:00:00"}, "malformed"),
    ],
)
def test_who_is_not_let_in(app: App, change: dict[str, str], reason: str) -> None:
    open_it(app)
    with client(app, **{**signed(), **change}) as node:
        hello = node.get("/fedtl/hello")
        assert (hello.status_code, hello.json()["reason"]) == (401, reason)
        assert node.post("/v1/fleet/x", content=b"x" * 900).status_code == 401
    assert app.paths == []


def test_hello_says_who_is_there(app: App) -> None:
    open_it(app)
    with client(app, **signed()) as node:
        assert node.get("/fedtl/hello").json() == {
            "fedtl": "1", "reason": "", "node": 7, "online": True,
        }  # fmt: skip
    assert app.paths == []


def test_bodies_are_bounded_before_they_are_read(app: App) -> None:
    open_it(app)
    with client(app, **signed()) as node:
        assert node.post("/v1/fleet/x", content=b"x" * 1000).text == "flower"
        for content in (b"x" * 1001, iter([b"x"])):  # too long, and of unknown length
            with suppress(httpx.TransportError):  # it need not wait for the rest
                assert node.post("/v1/fleet/x", content=content).status_code == 413
    assert [len(body) for body in app.bodies] == [1000]


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /fedtl/hello HTTP/1.1\r\nhost: x\r\n"])
def test_39_a_head_that_does_not_come_is_not_waited_for(app: App, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", app.port), 5) as slow:
        slow.sendall(sent)
        before = time.monotonic()
        with suppress(ConnectionResetError):
            assert slow.recv(10) == b""
        assert time.monotonic() - before < 3


def test_39_a_second_head_is_waited_for_no_longer(app: App) -> None:
    open_it(app)
    with socket.create_connection(("127.0.0.1", app.port), 5) as slow:
        slow.sendall(
            b"GET /nothing HTTP/1.1\r\nhost: x\r\nfedtl-token: " + TOKEN.encode() + b"\r\n\r\n"
        )
        assert slow.recv(10_000).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /noth")
        with suppress(ConnectionResetError):
            assert slow.recv(10) == b""


def test_39_an_endless_head_is_cut_off(app: App) -> None:
    with socket.create_connection(("127.0.0.1", app.port), 5) as endless:
        endless.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            endless.sendall(b"a: " + b"b" * 2**28)


def test_a_slow_body_of_an_approved_node_is_waited_for(app: App) -> None:
    open_it(app)
    lines = "".join(f"{name}: {value}\r\n" for name, value in signed().items())
    head = f"POST /v1/fleet/x HTTP/1.1\r\nhost: x\r\n{lines}content-length: 4\r\n\r\n"
    with socket.create_connection(("127.0.0.1", app.port), 5) as slow:
        slow.sendall(head.encode())
        time.sleep(0.8)  # twice the time a head has
        slow.sendall(b"body")
        assert slow.recv(10_000).startswith(b"HTTP/1.1 200")
    assert app.bodies == [b"body"]
