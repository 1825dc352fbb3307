"""What serving a picture costs over the bare ONNX Runtime call, and how many it answers a second.

    python benchmarks/serving.py MODEL.onnx PICTURE [--seconds 10] [--connections 1 2 8 32]

``bare`` is the call in the load's own process: the picture's bytes are decoded, resized and cropped
as the server does it (Pillow), and the same file is run by ONNX Runtime with as many threads as the
server gives it (one). No HTTP, no JSON. ``session`` is the last part of it alone. The server is
``fedtl serve`` as a process; the load comes from another.

The first table is in pairs: a bare call, then one request over a kept connection, turn about, so
that both meet the same machine. The second has as many kept connections as is said, each with its
next request as soon as it has its answer; server and load share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.images import decode_image
from fedtl.serve.predictor import MAX_PIXELS, open_predictor

WARM_UP = 20


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--load", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = options.picture.read_bytes()
    if options.load:
        port, connections = options.load
        if connections:
            found = asyncio.run(load(port, data, connections, options.seconds))
        else:
            found = pairs(options.model, port, data, options.seconds)
        print(json.dumps(found))
        return
    print(f"{machine.cpu_model()}, {machine.allowed_cores()} cores")
    again = [sys.executable, __file__, str(options.model), str(options.picture)]
    again += ["--seconds", str(options.seconds), "--load"]
    port, server = start(options.model)
    try:
        found = run([*again, str(port), "0"])
        wide = {name: np.array(found[name]) for name in ("session", "bare", "served")}
        print(f"{'':24}{'p50 ms':>9}{'p99 ms':>9}")
        for name, seconds in wide.items():
            print(f"{name:24}{quantiles(seconds)}")
        over = np.median(wide["served"]) / np.median(wide["bare"])
        print(f"served / bare at p50: {over:.2f}; pair by pair, median: "
              f"{np.median(wide['served'] / wide['bare']):.2f}")  # fmt: skip
        print(f"\n{'connections':24}{'p50 ms':>9}{'p99 ms':>9}{'per s':>9}")
        for connections in options.connections:
            seconds = np.array(run([*again, str(port), str(connections)])["served"])
            rate = len(seconds) / options.seconds
            print(f"{connections:<24}{quantiles(seconds)}{rate:9.1f}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


def run(command: list[str]) -> dict[str, list[float]]:
    """A process's figures."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def quantiles(seconds: npt.NDArray[np.float64]) -> str:
    """p50 and p99 in milliseconds."""
    return f"{1e3 * np.median(seconds):9.2f}{1e3 * np.percentile(seconds, 99):9.2f}"


def request(port: int, data: bytes) -> bytes:
    """One picture as HTTP."""
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/jpeg\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def pairs(model: Path, port: int, data: bytes, seconds: float) -> dict[str, list[float]]:
    """Bare call and request, turn about."""
    predictor, asked = open_predictor(model), request(port, data)
    assert predictor._crop is not None
    found: dict[str, list[float]] = {"session": [], "bare": [], "served": []}
    with socket.create_connection(("127.0.0.1", port)) as to:
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.perf_counter() + seconds
        while (before := time.perf_counter()) < end:
            pixels = predictor._crop.apply(decode_image(data, MAX_PIXELS))[None]
            between = time.perf_counter()
            predictor._session.run(None, {"pixels": np.ascontiguousarray(pixels)})
            after = time.perf_counter()
            to.sendall(asked)
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}]}"):
                answer += to.recv(65536)
            served = time.perf_counter() - after
            assert b" 200 " in answer.splitlines()[0], answer
            found["session"].append(after - between)
            found["bare"].append(after - before)
            found["served"].append(served)
    return {name: taken[WARM_UP:] for name, taken in found.items()}


async def load(port: int, data: bytes, connections: int, seconds: float) -> dict[str, list[float]]:
    """Requests over kept connections, each with its next as soon as it is answered."""
    asked, taken = request(port, data), []
    end = time.perf_counter() + seconds + 1

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            before = time.perf_counter()
            writer.write(asked)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in answer.splitlines()[0], answer
            length = int(answer.lower().partition(b"content-length:")[2].splitlines()[0])
            await reader.readexactly(length)
            if before > end - seconds:  # the first second warms up
                taken.append(time.perf_counter() - before)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return {"served": taken}


def start(model: Path) -> tuple[int, subprocess.Popen[bytes]]:
    """A server as a process, once it answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command = [sys.executable, "-m", "fedtl.cli", "serve", str(model), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ})
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return port, server
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
