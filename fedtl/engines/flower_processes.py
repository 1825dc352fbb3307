"""Flower's own programs as children of ours: started, watched, their output bounded, and ended.

``python -m fedtl.engines.flower_processes superlink|supernode ARGS`` is the child's side: it reads
its settings from standard input, whose other end only the parent holds. When that end closes, by
whatever death, SIGKILL too, the child ends itself; no orphan stays.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from fedtl.errors import EnvironmentFault

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Nothing is told to Flower's makers, asked of them or installed from elsewhere."""

LOG_BYTES = 2**20
"""Of a child's log; one older one is kept beside it."""

IDLE_SECONDS = 0.2, 1.0
"""Between two looks of a SuperNode for a message: a tenth of the time since the last one, within
these limits. Flower's own 3 s would be most of a round; a hundred nodes that look five times a
second would be most of the server."""

BUSY_SECONDS = 0.05
"""Between two looks of a SuperNode for our reply, in its own memory."""

RETRY_SECONDS = 3
"""At most between two attempts of a SuperNode to reach the server."""

PULL_SECONDS = 600.0
"""In which the content of an announced message must arrive."""


def quieten() -> None:
    """Set in this process what Flower reads from the environment, before it is imported."""
    os.environ.update(QUIET)
    for name in ("no_proxy", "NO_PROXY"):  # the parts on one machine talk without a proxy
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))


class BoundedLog:
    """A file of lines that does not grow without end: full, it becomes ``<name>.1``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, line: bytes) -> None:
        """Append one line; a full disk loses the line, not the child."""
        with suppress(OSError):
            if self._file.tell() > LOG_BYTES:
                self._file.close()
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
                self._file = open(self._path, "ab")  # noqa: SIM115
            self._file.write(line[:4096].rstrip(b"\n") + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Child:
    """One of Flower's programs, alive as long as this process at most.

    Args:
        kind: "superlink" or "supernode".
        arguments: of Flower's command.
        settings: what our side of the child needs, JSON values; told over the pipe, so that no
            other process sees them.
        home: the child's FLWR_HOME.
        log: where its output goes.
    """

    def __init__(
        self,
        kind: str,
        arguments: Sequence[str],
        settings: Mapping[str, Any],
        home: Path,
        log: Path,
    ) -> None:
        quieten()
        self.kind = kind
        self._last: deque[str] = deque(maxlen=40)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, kind, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FLWR_HOME": str(home), "NO_COLOR": "1"},
            start_new_session=True,  # Ctrl-C is for us; we end the child when we are ready
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: poll() tells
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.flush()
        self._pump = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """The end of what it printed."""
        return list(self._last)

    def stop(self, grace_seconds: float = 8.0) -> None:
        """Ask it to end, then make it; returns when it is gone."""
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._pump.join(2)

    def _copy(self, path: Path) -> None:
        log = BoundedLog(path)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            log.write(line)
            self._last.append(line.decode("utf-8", "replace").rstrip())
        self._process.stdout.close()
        log.close()


def free_port() -> int:
    """A port of loopback that nobody listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def start_superlink(
    *,
    host: str,
    port: int,
    certificate: Path,
    key: Path,
    authority: Path,
    secret: Path,
    settings: Mapping[str, Any],
    home: Path,
    log: Path,
) -> Child:
    """Flower's server program: TLS, node keys, our own process as its ServerApp's executor.

    Its state is in memory: what must outlive it is in the run folder, and no message's content is
    written to a disk.
    """
    arguments = [
        *("--host", host, "--port", str(port)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        *("--ssl-ca-certfile", str(authority)),
        "--enable-supernode-auth",
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        "--disable-runtime-dependency-installation",
    ]
    return Child("superlink", arguments, settings, home, log)


def start_supernode(
    *, address: str, port: int, authority: Path, key: Path, secret: Path, home: Path, log: Path
) -> Child:
    """Flower's client program: it carries messages; answering them is our own process' work.

    Args:
        address: of the server, ``host:port``.
        port: of loopback, where we fetch the messages.
    """
    arguments = [
        *("--superlink", address, "--root-certificates", str(authority)),
        *("--auth-supernode-private-key", str(key)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
    ]
    return Child("supernode", arguments, {}, home, log)


def port_owner(port: int) -> str | None:
    """Name and id of the process that listens on a TCP port, None where that cannot be seen."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(fd) in sockets for fd in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} ({process.name})"
    return None


def refuse_taken_port(host: str, port: int) -> None:
    """Raise EnvironmentFault, naming port and process, where the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentFault(
                f"port {port} cannot be listened on: {error.strerror}",
                got=f"process {owner}" if (owner := port_owner(port)) else None,
                do="End that process, or make a federation with another --address",
            ) from error


def _end_with_parent() -> None:
    """End this process when the pipe from its parent closes, whatever the parent died of."""

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would stand in the way of the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _hasten(loops: Any) -> None:
    """Shorten the waits of a SuperNode's loops, and let it hand an answer over before it ends.

    Args:
        loops: Flower's module; nothing else in it uses ``time``.
    """
    leaving: list[Callable[[], None]] = []
    sending = threading.Event()
    shortest, longest = IDLE_SECONDS
    last = time.monotonic()

    def nap(seconds: float) -> None:  # it asks for 3 s where no message waits, 0.5 s for a reply
        idle = min(max((time.monotonic() - last) / 10, shortest), longest)
        time.sleep(idle if seconds > 1 else BUSY_SECONDS)
        if leaving:
            leaving.pop()()

    def push(
        *arguments: Any, _push: Callable[..., None] = loops._push_messages, **named: Any
    ) -> None:
        nonlocal last
        sending.set()
        try:
            _push(*arguments, **named)
        finally:
            sending.clear()
            last = time.monotonic()

    def register(
        _register: Callable[..., None] = loops.register_signal_handlers, **named: Any
    ) -> None:
        _register(**named)
        end: Any = signal.getsignal(signal.SIGTERM)

        def later(number: int, frame: Any) -> None:
            if sending.is_set():
                leaving.append(partial(end, number, frame))
            else:
                end(number, frame)

        signal.signal(signal.SIGTERM, later)
        # Flower sends itself this one where the server does not know its node any more.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(1))

    loops.time = SimpleNamespace(sleep=nap)
    loops._push_messages, loops.register_signal_handlers = push, register
    # A message is announced before its content is there; it comes in milliseconds, not in 1 s.
    loops.pull_objects = partial(
        loops.pull_objects, initial_backoff=BUSY_SECONDS / 2, backoff_cap=0.5,
        max_time=PULL_SECONDS, max_tries_per_object=None,
    )  # fmt: skip
    # Back after a break of the network within seconds, not within twenty.
    retries: Any = import_module("flwr.supercore.retry.http_retry")
    retries.MAX_RETRY_DELAY = RETRY_SECONDS
    _persist(import_module("flwr.supernode.fleet_http_connection"))


def _persist(connection: Any) -> None:
    """Let a SuperNode try again too where a connection broke in the middle of its TLS handshake.

    Flower takes that for a certificate that is wrong, and leaves; whether it is wrong our parent
    asks at the server's door.

    Args:
        connection: Flower's module.
    """
    make = connection.make_simple_http_retry_invoker

    def patient() -> Any:
        invoker = make()
        hopeless = invoker.should_giveup
        invoker.should_giveup = lambda error: (
            not isinstance(error, httpx.TransportError) and hopeless(error)
        )
        return invoker

    connection.make_simple_http_retry_invoker = patient


def main(arguments: Sequence[str]) -> None:
    """The child's side."""
    kind = arguments[0]
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        settings = json.loads(pipe.readline())
    _end_with_parent()
    sys.argv = [f"flower-{kind}", *arguments[1:]]
    if kind == "superlink":
        from fedtl.engines.flower_gate import serve

        program = import_module("flwr.superlink.cli.flower_superlink")
        program.uvicorn = SimpleNamespace(  # type: ignore[attr-defined]
            run=lambda app, **options: serve(app, settings, **options)
        )
        program.flower_superlink()
    else:
        _hasten(import_module("flwr.supernode.start_client_internal"))
        import_module("flwr.supernode.cli.flower_supernode").flower_supernode()
        os._exit(1)  # it gave up; its other threads would stay, and nobody would start it anew


if __name__ == "__main__":
    main(sys.argv[1:])
