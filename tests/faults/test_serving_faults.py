"""A served model under abuse: a thousand at once, a gigabyte, a port that is taken, strangers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

PARALLEL = 1000
LIMIT = 16 * 2**20


def write_model(path: Path, kind: str) -> Path:
    place = Path(__file__).parents[1] / "unit" / "serve" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_models", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_model(path, kind)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """A server of rows as a process: its port, its id, its log."""
    folder = tmp_path_factory.mktemp("served")
    file, port = write_model(folder / "rows.onnx", "rows"), free_port()
    log = folder / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedtl.cli", "serve", str(file), "--port", str(port)],
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1"},
        )
    try:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield port, process.pid, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert "Traceback" not in log.read_text()
    assert "4.25" not in log.read_text()  # nothing of a request is written down


def memory(process: int) -> int:
    """Bytes that it has in memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


async def ask(port: int, body: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    content = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(content[9:12]), content.partition(b"\r\n\r\n")[2]


def test_a_thousand_at_once_are_all_answered(served: tuple[int, int, Path]) -> None:
    port, process, _ = served
    before = memory(process)
    bodies = [json.dumps({"rows": [[i, 4.25, -i, 1]]}).encode() for i in range(PARALLEL)]

    async def all_at_once() -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(ask(port, body) for body in bodies))

    found = asyncio.run(all_at_once())
    statuses = [status for status, _ in found]
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= PARALLEL // 2
    assert all(json.loads(body)["predictions"] for status, body in found if status == 200)
    assert memory(process) - before < 150 * 2**20
    assert httpx.get(f"http://127.0.0.1:{port}/health").json()["waiting"] == 0


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in pieces"])
def test_a_gigabyte_is_cut_off(served: tuple[int, int, Path], declared: bool) -> None:
    """Not much more than the limit is taken, and nearly nothing where the length is stated."""
    port, process, _ = served
    before, sent = memory(process), 0
    length = f"Content-Length: {2**30}" if declared else "Transfer-Encoding: chunked"
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"{length}\r\n\r\n"
    )
    piece = b"0" * 2**16
    framed = piece if declared else b"10000\r\n" + piece + b"\r\n"
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as to:
        to.sendall(head.encode())
        if declared:
            answer = to.recv(4096)
        with suppress(ConnectionError):
            while sent < 2**30:
                to.sendall(framed)
                sent += len(piece)
        with suppress(ConnectionError):
            answer += to.recv(4096)
    if answer:  # a reset may come before it
        assert b" 413 " in answer.splitlines()[0]
        assert b"16 MiB" in answer
    assert answer or not declared
    assert sent < LIMIT + 32 * 2**20
    assert memory(process) - before < 100 * 2**20
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_bodies_that_come_slowly_hold_up_nobody(served: tuple[int, int, Path]) -> None:
    """Twice as many as requests are worked on; they are answered too, once they are whole."""
    port, _, _ = served
    body = json.dumps({"rows": [[1, 4.25, 3, 4]]}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    framings = (
        (f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:9], body[9:]),
        (
            f"{head}Transfer-Encoding: chunked\r\n\r\n9\r\n".encode() + body[:9] + b"\r\n",
            f"{len(body) - 9:x}\r\n".encode() + body[9:] + b"\r\n0\r\n\r\n",
        ),
    )
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            for _ in range(16)
        ]
        for i, one in enumerate(slow):
            one.sendall(framings[i % 2][0])
        found = httpx.post(f"http://127.0.0.1:{port}/predict", json={"rows": [[1, 4.25, 3, 4]]})
        assert found.status_code == 200
        for i, one in enumerate(slow):
            one.sendall(framings[i % 2][1])
            answer = b""
            while not answer.endswith(b"}]}"):
                part = one.recv(65536)
                assert part
                answer += part
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == found.json()


def test_garbage_and_silence_do_no_harm(served: tuple[int, int, Path]) -> None:
    port, _, _ = served
    quiet = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(50)]
    for i, one in enumerate(quiet):
        one.sendall([b"\x16\x03\x01garbage\r\n\r\n", b"POST /predict HTTP/1.1\r\nHost:"][i % 2])
    url = f"http://127.0.0.1:{port}/predict"
    found = httpx.post(url, json={"rows": [[1, 2, 3, 4]]})
    assert found.status_code == 200
    for one in quiet:
        one.close()


Fedtl = Callable[..., subprocess.CompletedProcess[str]]


def test_a_port_that_is_taken(fedtl: Fedtl, tmp_path: Path) -> None:
    file = write_model(tmp_path / "rows.onnx", "rows")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = fedtl("serve", str(file), "--port", str(port))
    assert done.returncode == 3
    assert f"port {port} cannot be listened on" in done.stderr
    assert f"({os.getpid()})" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--host", "0.0.0.0"), 5, "--insecure-i-understand"),
        (("--tls-cert", "a.pem"), 2, "TLS needs both"),
        (("--tls-cert", "a.pem", "--tls-key", "b.pem"), 2, "no such file"),
        (("--port", "70000"), 2, "--port"),
        (("--host", "203.0.113.7", "--insecure-i-understand"), 3, "203.0.113.7 cannot be listened"),
        (("--host", "1::2::3", "--insecure-i-understand"), 3, "an address of this machine"),
        (("--tls-cert", "rows.onnx", "--tls-key", "rows.onnx"), 2, "no certificate with its key"),
    ],
)
def test_places_that_are_refused(
    fedtl: Fedtl, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    file = write_model(tmp_path / "rows.onnx", "rows")
    done = fedtl("serve", str(file), *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def _strange(path: Path, kind: str) -> Path:
    import onnx

    if kind == "no model":
        path.write_bytes(b"GIF89a" * 100)
        return path
    model = onnx.load(write_model(path, "images"))
    props: dict[str, Any] = {one.key: json.loads(one.value) for one in model.metadata_props}
    if kind == "no labels":
        props.pop("labels")
    elif kind == "a bomb of a crop":
        props["preprocessing"]["crop"] = props["preprocessing"]["resize"] = 10**6
    elif kind == "data elsewhere":
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../etc/passwd")
    onnx.helper.set_model_props(model, {key: json.dumps(one) for key, one in props.items()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "code"),
    [("no model", 2), ("no labels", 2), ("a bomb of a crop", 2), ("data elsewhere", 5)],
)
def test_files_that_are_none(fedtl: Fedtl, tmp_path: Path, kind: str, code: int) -> None:
    file = _strange(tmp_path / "strange.onnx", kind)
    done = fedtl("serve", str(file), "--port", str(free_port()))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "name", "says"),
    [
        ("serve", "model.pt2", "only ONNX files"),
        ("serve", "nothere.onnx", "there is no such run, and no such file"),
        ("serve", "nowhere", "there is no such run, and no such file"),
        ("serve", "empty", "not a run folder"),
        ("serve", "exported", "Type 'fedtl serve exported/a.onnx'"),
        ("export", "nowhere", "there is no such run"),
        ("export", "model.pt2", "not a run but a file"),
    ],
)
def test_paths_that_are_no_model(
    fedtl: Fedtl, tmp_path: Path, command: str, name: str, says: str
) -> None:
    for folder in ("empty", "exported"):
        (tmp_path / folder).mkdir()
    for file in ("model.pt2", "exported/a.onnx"):
        (tmp_path / file).write_bytes(b"x")
    done = fedtl(command, name)
    assert done.returncode == 2
    assert says in done.stderr
    assert name in done.stderr
