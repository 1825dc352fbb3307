"""``fedtl serve``: one exported model on a port, for browsers and programs."""

from __future__ import annotations

import errno
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl import machine
from fedtl.deployment.join import is_loopback
from fedtl.engines.flower_processes import port_owner
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.export import FOLDER, Observer, export_run
from fedtl.interrupts import Interrupts
from fedtl.results.runs import SCENARIO, RunFolder

if TYPE_CHECKING:
    from fedtl.serve.predictor import Predictor

__all__ = ["Place", "file_of", "serve"]

CONNECTIONS = 4096
"""Open at once; files are allowed for as many, as far as the machine lets us."""

IDLE_SECONDS = 5
"""After which a connection without a request is closed."""


_NO_ADDRESS = (errno.EADDRNOTAVAIL, socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL)


@dataclass(frozen=True)
class Place:
    """Where a server listens.

    Attributes:
        cert, key: PEM files of a certificate; None: no TLS.
        open: whether others may read along, where there is no TLS.
    """

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None
    open: bool = False

    def refuse_unsafe(self) -> None:
        """Raise SecurityRefusal where what is sent could be read on its way."""
        if (self.cert is None) != (self.key is None):
            raise InputError("TLS needs both", where="--tls-cert", allowed="--tls-cert --tls-key")
        for path in (self.cert, self.key):
            if path is not None and not path.is_file():
                raise InputError("there is no such file", where=path)
        if self.cert is not None:
            self._refuse_strange()
        if self.cert is None and not is_loopback(self.host) and not self.open:
            raise SecurityRefusal(
                "others on the way could read and change what is sent",
                where="--host",
                got=self.host,
                allowed="the loopback, or TLS",
                do="Give --tls-cert and --tls-key, or put a proxy with TLS in front of "
                "--host 127.0.0.1, or say --insecure-i-understand",
            )

    def _refuse_strange(self) -> None:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(str(self.cert), self.key, password="")
        except (ssl.SSLError, OSError) as error:
            raise InputError(
                "this is no certificate with its key, or they cannot be read",
                where=self.cert,
                got=error.strerror,
                allowed="two PEM files that belong together, the key without a password",
            ) from error

    @property
    def address(self) -> str:
        """As a browser takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.cert is None else 'https'}://{host}:{self.port}"


def file_of(path: Path, observer: Observer, interrupts: Interrupts) -> Path:
    """The ONNX file to serve: itself, or that of a run, exported now where it is not there yet.

    Raises:
        InputError: neither; see ``export_run``.
    """
    if not path.exists():
        raise InputError(
            "there is no such run, and no such file",
            where=path,
            allowed="a run's folder, its name under runs/, 'last', or an exported .onnx file",
        )
    if path.is_file():
        if path.suffix != ".onnx":
            raise InputError("only ONNX files are served", where=path, do="Export with --to onnx")
        return path
    files = sorted(path.glob("*.onnx"))
    if files and not (path / SCENARIO).is_file():
        raise InputError(
            "not a run but a folder with exported files",
            where=path,
            do=f"Type 'fedtl serve {files[0]}'",
        )
    from fedtl.serve.predictor import open_predictor

    summary = RunFolder(path).finished()
    if summary is not None:
        kept = path / FOLDER / f"{summary.get('name')}.onnx"
        if kept.is_file():
            told = open_predictor(kept).card.get("provenance") or {}
            if told.get("head_sha256") == summary.get("head_sha256"):
                return kept
    facts = export_run(path, "onnx", observer, interrupts)
    return Path(facts["files"][0])


def serve(predictor: Predictor, place: Place, ready: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM.

    Args:
        ready: called with the address once the port is listened on.

    Raises:
        SecurityRefusal: a host that others reach, without TLS.
        EnvironmentFault: the port is taken, or a package of the extra ``serve`` is missing.
    """
    place.refuse_unsafe()
    try:
        import uvicorn

        from fedtl.serve.app import Limits, make_app
    except ImportError as error:
        raise missing(error) from error
    threads = machine.allowed_cores()
    hosts = ("localhost", "127.0.0.1", "::1", place.host) if is_loopback(place.host) else ()
    app = make_app(predictor, Limits(threads=threads, hosts=hosts))
    _allow_files()
    listening = _listen(place)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks who asks
        ws="none",
        lifespan="on",
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=10,
        limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
        ssl_certfile=None if place.cert is None else str(place.cert),
        ssl_keyfile=None if place.key is None else str(place.key),
    )
    with listening:
        ready(place.address)
        uvicorn.Server(config).run(sockets=[listening])


def missing(error: ImportError) -> EnvironmentFault:
    """The fault that a package of the extra is not installed."""
    return EnvironmentFault(
        "a package that serving needs is not installed", got=error.name, do="uv sync --extra serve"
    )


def _listen(place: Place) -> socket.socket:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    # The protocol is named: asyncio sends without delay (TCP_NODELAY) only where it is. An answer
    # goes out as head and body, and Nagle's algorithm would hold the body back for 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((place.host, place.port))
        found.listen(CONNECTIONS)
    except (OSError, OverflowError) as error:
        found.close()
        if isinstance(error, OSError) and error.errno in _NO_ADDRESS:
            raise EnvironmentFault(
                f"{place.host} cannot be listened on: {error.strerror}",
                where="--host",
                do="Give an address of this machine",
            ) from error
        owner = port_owner(place.port)
        raise EnvironmentFault(
            f"port {place.port} cannot be listened on: {getattr(error, 'strerror', error)}",
            got=f"process {owner}" if owner else None,
            do="End that process, or choose another --port",
        ) from error
    return found


def _allow_files() -> None:
    """As many open files as connections, as far as the machine lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted: Any = CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
