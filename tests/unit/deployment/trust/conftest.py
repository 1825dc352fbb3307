"""A federation's folder, a client's keys, and a door that can be wrong in every way."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedtl.deployment.certificates import Issued, issue_server, make_authority
from fedtl.deployment.federation import Federation, create_federation, own_facts
from fedtl.deployment.join import JoinFile
from fedtl.deployment.keys import make_keys

APP = b"an app"


@pytest.fixture(scope="session")
def authority() -> Issued:
    return make_authority("test authority")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return create_federation(tmp_path / "federation", "127.0.0.1:8443", ["fl.example.org"], APP)


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    return make_keys(tmp_path, "hospital-a")[1]


@dataclass
class Door:
    """What a server says at its door."""

    port: int
    content: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    clock: timedelta = timedelta()
    seen: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    door: Door

    def do_GET(self) -> None:
        self.door.seen.append(dict(self.headers.items()))
        body = json.dumps({**own_facts(), **self.door.content}).encode()
        self.send_response_only(self.door.status)
        self.send_header("date", format_datetime(datetime.now(UTC) + self.door.clock, usegmt=True))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def open_door(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    """Opens a door on loopback; ``issued=None`` for one that speaks plain HTTP."""
    servers: list[ThreadingHTTPServer] = []

    def make(issued: Issued | None) -> Door:
        handler = type("DoorHandler", (Handler,), {})
        server = QuietServer(("127.0.0.1", 0), handler)
        handler.door = door = Door(server.server_address[1], {"reason": "", "online": False})
        if issued is not None:
            path = tmp_path / f"door-{len(servers)}.pem"
            path.write_bytes(issued.key + issued.certificate)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return door

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def join_to(authority: Issued) -> Callable[..., JoinFile]:
    """A join file for a port, believing the test's authority."""

    def make(port: int, host: str = "127.0.0.1", **changes: Any) -> JoinFile:
        join = JoinFile(
            f"{host}:{port}", authority.certificate, bytes(32), "0" * 64, 1, "0.1.0", "1.41.0"
        )
        return replace(join, **changes)

    return make


@pytest.fixture
def good_door(open_door: Callable[..., Door], authority: Issued) -> Door:
    return open_door(issue_server(authority, ["fl.example.org"]))
