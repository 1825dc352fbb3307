"""Ray in this process: started for us alone on this machine, or a running cluster joined.

A Ray of our own listens on the loopback only, lives in a temporary folder, is quiet, and ends with
this process, however that ends. A cluster that is joined is left running.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

from fedtl import machine
from fedtl.engines.hosting import scratch_folder
from fedtl.errors import EnvironmentFault, InputError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what it will do anyway; it warns otherwise
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers run in this environment, as it is
}
"""Must be set before Ray is imported."""

INLINED_BYTES = 2**27
"""On a Ray of our own, tensors travel inside the messages up to this size. Where the object store
is used, Ray ends this whole process with exit code 1 as soon as the raylet is gone."""

SETTINGS = {
    "max_direct_call_object_size": INLINED_BYTES,
    "task_rpc_inlined_bytes_limit": INLINED_BYTES,
}

CONNECT_SECONDS = 5.0
INIT_SECONDS = 60.0
CHECK_SECONDS = 0.05  # at most this often is Ray asked whether it lives


class Cluster:
    """The Ray that this process is connected to, from ``join`` to ``leave``.

    Attributes:
        ours: whether it was started here, for this process alone.
        num_cpus, num_gpus: what it has free for workers.
    """

    def __init__(self, ours: bool, stack: ExitStack) -> None:
        import ray

        self.ours = ours
        self._stack = stack
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        self.num_cpus, self.num_gpus = int(free.get("CPU", 0)), float(free.get("GPU", 0))
        self._doors = _doors()
        self._checked = 0.0
        self._trouble: str | None = None

    def trouble(self) -> str | None:
        """Why nothing can run here any more, or None; quick, may be called often."""
        if self._trouble is None and time.monotonic() - self._checked > CHECK_SECONDS:
            closed = [name for name, door in self._doors.items() if not _opens(door)]
            self._trouble = f"Ray's {' and '.join(closed)} died" if closed else None
            self._checked = time.monotonic()
        return self._trouble

    def leave(self) -> None:
        """Stop what was started here, disconnect from what was joined."""
        self._stack.close()


def join(address: str | None = None, *, num_cpus: int | None = None, num_gpus: int = 0) -> Cluster:
    """Start a Ray of our own, or join the cluster at ``address``.

    Where this process is connected to Ray already, that connection is used and left as it is.

    Args:
        address: ``host:port`` of a running cluster's head; None or "local" for one of our own.
        num_cpus: CPUs of our own; default what the machine allows.
        num_gpus: GPUs of our own.

    Raises:
        InputError: an address that is none.
        EnvironmentFault: Ray does not start, or no cluster answers at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    with ExitStack() as stack:
        ours = address in (None, "local")
        if ray.is_initialized():
            return Cluster(False, stack.pop_all())
        arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if ours:
            scratch = stack.enter_context(scratch_folder())
            arguments |= {
                "address": "local",
                "num_cpus": num_cpus or machine.allowed_cores(),
                "num_gpus": num_gpus,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": str(scratch),
                "_system_config": SETTINGS,
            }
        else:
            _refuse_dead(str(address))
            arguments["address"] = address
        stack.callback(ray.shutdown)
        stack.enter_context(_silent())
        try:
            with _own_signals():
                ray.init(**arguments)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise EnvironmentFault(
                "Ray does not start" if ours else "the Ray cluster cannot be joined",
                where=None if ours else address,
                got=str(error).strip().split("\n")[0],
                do="Set engine.kind = 'local'"
                if ours
                else "'ray status' shows whether it runs; "
                "this machine must be one of its nodes and have the same Python and Ray",
            ) from error
        return Cluster(ours, stack.pop_all())


def in_worker() -> bool:
    """Whether this process is a Ray worker: part of a simulation, on nobody's real machine."""
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)


def _refuse_dead(address: str) -> None:
    """Raise where nobody answers: Ray itself would try for minutes, deaf to signals."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(
            "not the address of a Ray cluster",
            where="engine.address",
            got=repr(address),
            allowed="host:port of its head, e.g. 10.0.0.1:6379",
        )
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            "no Ray cluster answers",
            where="engine.address",
            got=f"{address}: {error.strerror or error}",
            do="'ray status' on its head shows whether it runs; or leave engine.address out",
        ) from error


Door = tuple[str, int] | str
"""Where a part of Ray listens: host and port, or the path of a Unix socket."""


def _doors() -> dict[str, Door]:
    """Where the parts of Ray listen that nothing works without."""
    import ray

    node: Any = ray._private.worker.global_worker.node
    host, _, port = str(node.gcs_address).rpartition(":")
    return {"head": (host, int(port)), "raylet": str(node.raylet_socket_name)}


def _opens(door: Door) -> bool:
    """Whether somebody listens there."""
    try:
        if isinstance(door, str):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(CONNECT_SECONDS)
                probe.connect(door)
        else:
            socket.create_connection(door, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _silent() -> Iterator[None]:
    """Ray's loggers say nothing below CRITICAL: what matters is told in our words."""
    import logging

    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Puts signal handlers back: Ray sets one of its own for SIGTERM, and then ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
