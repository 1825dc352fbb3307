"""Real processes of Flower on this machine and what befalls them: FAULTS 8, 16, 34, 35, 39-41."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtl.deployment.federation import Federation, create_federation
from fedtl.deployment.keys import make_keys, read_private
from fedtl.deployment.knock import knock
from fedtl.deployment.server import OpenGrid, open_grid
from fedtl.engines.flower_app import build_app
from fedtl.engines.flower_processes import free_port, quieten
from fedtl.errors import EnvironmentFault

quieten()
ECHO = Path(__file__).with_name("echo_client.py")
Client = Callable[..., subprocess.Popen[str]]


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    root = tmp_path_factory.mktemp("deployment")
    found = create_federation(root / "federation", f"127.0.0.1:{free_port()}", [], build_app())
    for name in ("hospital-a", "hospital-b"):
        found.approve(make_keys(root, name)[1])
    make_keys(root, "stranger")
    return found


@pytest.fixture(scope="module")
def opened(federation: Federation) -> Iterator[OpenGrid]:
    with open_grid(federation) as found:
        yield found


@pytest.fixture
def start(federation: Federation) -> Iterator[Client]:
    """Starts clients whose nodes echo; all are gone after the test."""
    started: list[subprocess.Popen[str]] = []

    def make(name: str, *arguments: str) -> subprocess.Popen[str]:
        key = federation.root.parent / f"{name}.key"
        process = subprocess.Popen(
            [sys.executable, str(ECHO), str(federation.join_path), str(key), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield make
    for process in started:
        process.kill()
        process.communicate()
    left = list(federation.root.parent.glob(".*.flower"))
    for folder in left:
        until(lambda folder=folder: not _users(folder), 15)


def _users(folder: Path) -> list[str]:
    """Processes that have this folder among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def online(opened: OpenGrid) -> dict[str, int]:
    return {opened.names[pem]: node for node, pem in opened.grid.keys().items()}


def ask(opened: OpenGrid, node: int, content: bytes, kind: str = "train") -> str:
    from flwr.app import ConfigRecord, Message, RecordDict

    record = ConfigRecord({"content": content, "signature": b"signed"})
    (sent,) = opened.grid.push_messages([Message(RecordDict({"fedtl": record}), node, kind)])
    return sent


def answer(opened: OpenGrid, sent: str, seconds: float = 30) -> Any:
    (message,) = until(lambda: opened.grid.pull_messages([sent]), seconds)
    return message


def text(message: Any) -> bytes:
    assert not message.has_error(), message.error
    return bytes(message.content["fedtl"]["content"])


def test_a_message_goes_there_and_back(opened: OpenGrid, start: Client) -> None:
    process = start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    for kind, word in (("query.join", b"join"), ("train", b"train"), ("train.alone", b"alone")):
        content = os.urandom(1000)
        assert text(answer(opened, ask(opened, node, content, kind))) == (
            word + b" " + content + b" signed"
        )
    large = bytes(3 * 2**20)
    assert text(answer(opened, ask(opened, node, large))) == b"train " + large + b" signed"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert "connected" in process.stdout.read()
    until(lambda: "hospital-a" not in online(opened), 5)  # it took its leave


def test_ctrl_c_lets_a_short_message_finish(opened: OpenGrid, start: Client) -> None:
    process = start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    sent = ask(opened, node, b"sleep 1")
    until(lambda: "busy" in process.stdout.readline())
    process.send_signal(signal.SIGINT)
    assert text(answer(opened, sent)) == b"train sleep 1 signed"
    assert process.wait(20) == 130


def test_15_a_client_that_was_stopped_for_a_while_answers_when_it_goes_on(
    opened: OpenGrid, start: Client
) -> None:
    process = start("hospital-b")
    node = until(lambda: online(opened).get("hospital-b"))
    process.send_signal(signal.SIGSTOP)
    sent = ask(opened, node, b"hello")
    time.sleep(2)
    assert opened.grid.pull_messages([sent]) == []
    process.send_signal(signal.SIGCONT)
    assert text(answer(opened, sent)) == b"train hello signed"


def test_a_killed_supernode_comes_back_by_itself(opened: OpenGrid, start: Client) -> None:
    process = start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    text(answer(opened, ask(opened, node, b"before")))
    until(lambda: "connected" in process.stdout.readline())
    (supernode,) = children(process.pid)
    os.kill(supernode, signal.SIGKILL)
    # No wait of a minute until the server believes it: the supervisor takes leave for it.
    until(lambda: "hospital-a" not in online(opened), 10)
    assert until(lambda: online(opened).get("hospital-a"), 20) == node
    assert text(answer(opened, ask(opened, node, b"after"))) == b"train after signed"


def test_nothing_outlives_a_killed_client(opened: OpenGrid, start: Client) -> None:
    process = start("hospital-b")
    until(lambda: online(opened).get("hospital-b"))
    (supernode,) = children(process.pid)
    process.kill()
    process.wait()
    until(lambda: not alive(supernode), 15)


def test_a_killed_client_is_taken_back_at_once(opened: OpenGrid, start: Client) -> None:
    process = start("hospital-a")
    until(lambda: "connected" in process.stdout.readline())
    until(lambda: list(opened.federation.root.parent.glob(".hospital-a.flower/node")))
    process.kill()
    process.wait()
    assert online(opened).get("hospital-a")  # so the server still believes
    before = time.monotonic()
    again = start("hospital-a")
    until(lambda: "connected" in again.stdout.readline())
    assert time.monotonic() - before < 30


def test_34_an_unknown_key_is_told_what_to_type(opened: OpenGrid, start: Client) -> None:
    process = start("stranger")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "SHA256:" in out
    assert "fedtl server approve stranger.pub" in out
    assert "Traceback" not in out


def test_35_one_key_is_one_machine(
    opened: OpenGrid, start: Client, federation: Federation, tmp_path: Path
) -> None:
    start("hospital-a")
    until(lambda: online(opened).get("hospital-a"))
    stolen = tmp_path / "hospital-a.key"
    stolen.write_bytes((federation.root.parent / "hospital-a.key").read_bytes())
    stolen.chmod(0o600)
    second = subprocess.run(
        [sys.executable, str(ECHO), str(federation.join_path), str(stolen), "3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 5
    assert "in use on another machine" in second.stdout
    assert online(opened).get("hospital-a")


def evil_app(canary: Path) -> bytes:
    """An app that shows that it was run, or only imported."""
    code = f"open({str(canary)!r}, 'w')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    project = build_app()
    with zipfile.ZipFile(io.BytesIO(project)) as bundle:
        config = bundle.read("pyproject.toml").decode().replace("shell:app", "evil:app")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        files = {"pyproject.toml": config, "evil.py": code}
        lines = [
            f"{name},{hashlib.sha256(body.encode()).hexdigest()},{len(body) * 8}"
            for name, body in files.items()
        ]
        for name, body in {**files, ".info/CONTENT": "\n".join(lines)}.items():
            bundle.writestr(name, body)
    return buffer.getvalue()


@contextmanager
def another_run(opened: OpenGrid, app: bytes) -> Iterator[OpenGrid]:
    """A second run on the same SuperLink, as somebody with the server's secrets could start it."""
    from flwr.supercore.task_identity import TaskIdentity

    from fedtl.engines.flower_gate import TOKEN
    from fedtl.engines.flower_submission import Submission

    before = TaskIdentity.task_id, TaskIdentity.run_id
    grid = Submission(
        opened.grid._addr, opened.grid._cert, opened.grid._headers.headers[TOKEN], lambda: True
    )
    secret = opened.federation.path("flower") / "secret"
    try:
        with grid.open(app, secret.read_bytes()):
            yield OpenGrid(opened.federation, grid, opened.child, opened.sign, opened.names)
    finally:
        TaskIdentity.task_id, TaskIdentity.run_id = before


def test_an_app_that_was_not_approved_is_refused_and_not_run(
    opened: OpenGrid, start: Client, tmp_path: Path
) -> None:
    process = start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    canary = tmp_path / "canary"
    with another_run(opened, evil_app(canary)) as other:
        reply = answer(other, ask(other, node, b"hello"))
    assert reply.has_error()
    assert "one approved app only" in reply.error.reason
    assert not canary.exists()
    until(lambda: "refused a message of another app" in process.stdout.readline())
    assert text(answer(opened, ask(opened, node, b"still here"))) == b"train still here signed"


def test_a_message_of_another_kind_gets_an_error(opened: OpenGrid, start: Client) -> None:
    start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    reply = answer(opened, ask(opened, node, b"x", "query.shell"))
    assert reply.has_error()
    assert reply.error.reason == "not a message of fedtl"


def test_the_network_can_reach_the_nodes_interface_only(
    opened: OpenGrid, federation: Federation
) -> None:
    context = ssl.create_default_context(cadata=federation.join().authority.decode())
    address = f"https://{federation.join().address}"
    headers = {"content-type": "application/x-protobuf"}
    with httpx.Client(verify=context, base_url=address, headers=headers) as client:
        for path in ("control/register-node", "control/start-run", "control/list-nodes",
                     "runtime/acquire-task", "runtime/responses"):  # fmt: skip
            assert client.post(f"/v1/{path}", content=b"").status_code == 404, path
        for path in ("/docs", "/openapi.json", "/health"):
            assert client.get(path).status_code == 404
        wrong = client.post("/v1/control/list-nodes", headers={"fedtl-token": "0" * 64})
        assert wrong.status_code == 404
        for path in ("activate-node", "register-node", "push-object"):
            assert client.post(f"/v1/fleet/{path}", content=b"x").status_code == 401, path


def test_39_40_hostile_bytes_leave_the_server_well(
    opened: OpenGrid, federation: Federation, start: Client
) -> None:
    join = federation.join()
    context = ssl.create_default_context(cadata=join.authority.decode())
    before = memory(opened.child.pid)

    def plain() -> socket.socket:
        return socket.create_connection((join.host, join.port), 5)

    def secure() -> ssl.SSLSocket:
        return context.wrap_socket(plain(), server_hostname=join.host)

    held = [plain() for _ in range(50)]  # half a handshake: the hello never comes
    held += [secure() for _ in range(20)]  # and requests whose head never ends
    for connection in held[50:]:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
    for garbage in (os.urandom(10**5), b"\x16\x03\x01\xff\xff" + os.urandom(1000), b"GET / HTTP"):
        with plain() as connection, suppress(OSError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(100)
    for garbage in (os.urandom(10**5), b"POST /v1/fleet/x HTTP/1.1\r\n" + b"a: b\r\n" * 10**5):
        with secure() as connection, suppress(OSError):
            connection.sendall(garbage)
            connection.recv(100)
    announced = (
        b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n"
    )
    with secure() as connection:
        connection.sendall(announced)
        assert connection.recv(100).startswith(b"HTTP/1.1 401")  # before a byte of the body
    start("hospital-a")
    node = until(lambda: online(opened).get("hospital-a"))
    assert text(answer(opened, ask(opened, node, b"well"))) == b"train well signed"
    assert memory(opened.child.pid) - before < 64 * 2**20
    for connection in held:
        connection.close()


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_approved_key_cannot_send_a_body_without_end(
    opened: OpenGrid, federation: Federation
) -> None:
    import base64
    from datetime import UTC, datetime

    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedtl.deployment.keys import public_of

    key = read_private(federation.root.parent / "hospital-b.key")
    stamp = datetime.now(UTC).isoformat()
    headers = {
        "flwr-public-key": base64.b64encode(public_of(key).pem).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(
            key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
        ).decode(),
    }
    join = federation.join()
    context = ssl.create_default_context(cadata=join.authority.decode())
    with httpx.Client(verify=context, base_url=f"https://{join.address}") as client:
        assert client.get("/fedtl/hello", headers=headers).json()["reason"] == ""
        endless = client.post("/v1/fleet/push-object", headers=headers, content=iter([b"x"]))
        assert endless.status_code == 413
        stolen = {**headers, "flwr-timestamp": datetime.now(UTC).isoformat()}
        assert client.get("/fedtl/hello", headers=stolen).json()["reason"] == "signature"
        old = {**headers, "flwr-timestamp": "2020-01-01T00:00:00+00:00"}
        assert client.get("/fedtl/hello", headers=old).json()["reason"] == "clock"


def test_who_is_approved_while_the_server_waits_is_let_in(
    opened: OpenGrid, federation: Federation, tmp_path: Path
) -> None:
    _, public, _ = make_keys(tmp_path, "late")
    key = read_private(tmp_path / "late.key")
    assert knock(federation.join(), key).reason == "key"
    federation.approve(public)
    assert opened.admit() == ["late"]
    assert opened.admit() == []
    assert knock(federation.join(), key).reason == ""


def test_41_a_taken_port_is_named_with_its_process(federation: Federation) -> None:
    port = free_port()
    other = create_federation(
        federation.root.parent / "other", f"127.0.0.1:{port}", [], build_app()
    )
    with (
        closing(socket.create_server(("127.0.0.1", port))),
        pytest.raises(EnvironmentFault, match=rf"port {port} .*\({os.getpid()}\)") as raised,
        open_grid(other),
    ):
        pass
    assert raised.value.exit_code == 3
    assert not (other.root / "flower").exists()


SERVER = """
import sys, time
from pathlib import Path
from fedtl.deployment.federation import Federation
from fedtl.deployment.server import open_grid
with open_grid(Federation(Path(sys.argv[1]))) as opened:
    print(opened.child.pid, flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_a_killed_server(federation: Federation, tmp_path: Path) -> None:
    made = create_federation(tmp_path / "f", f"127.0.0.1:{free_port()}", [], build_app())
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(made.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    superlink = int(process.stdout.readline())
    process.kill()
    process.communicate()
    until(lambda: not alive(superlink), 15)
    with open_grid(made):  # the port is free, and what was left behind is no hindrance
        pass
    assert not (made.root / "flower").exists()


def test_a_dead_superlink_is_told_at_once(tmp_path: Path) -> None:
    made = create_federation(tmp_path / "f", f"127.0.0.1:{free_port()}", [], build_app())
    with open_grid(made) as opened:
        assert opened.trouble() is None
        os.kill(opened.child.pid, signal.SIGKILL)
        before = time.monotonic()
        with pytest.raises(EnvironmentFault, match="fedtl server resume"):
            opened.grid.keys()
        assert time.monotonic() - before < 5
        assert "SuperLink ended" in str(opened.trouble())


def test_logs_are_bounded(tmp_path: Path) -> None:
    from fedtl.engines.flower_processes import LOG_BYTES, BoundedLog

    log = BoundedLog(tmp_path / "x.log")
    for _ in range(LOG_BYTES // 1000 * 3):
        log.write(b"x" * 999 + b"\n")
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["x.log", "x.log.1"]
    assert max(sizes.values()) < LOG_BYTES + 2000


def test_waits_grow_to_a_limit_and_differ() -> None:
    from fedtl.deployment.client import LONGEST_WAIT_SECONDS, Backoff

    waits = [[backoff.next() for _ in range(12)] for backoff in (Backoff(), Backoff())]
    assert waits[0] != waits[1]
    assert waits[0][0] <= 0.5
    assert 15 <= waits[0][-1] <= LONGEST_WAIT_SECONDS
