"""Ray in this process: started for us alone on this machine, or a running cluster joined.

A Ray of our own listens on the loopback only, lives in a temporary folder, is quiet, and ends with
this process, however that ends. A cluster that is joined is left running.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
HEALTH_SECONDS = 15.0  # in which a cluster's head must have said that it is one
END_SECONDS = 5.0  # in which processes that were killed are gone
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


def join(
    address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = 0
) -> Cluster:
    """Start a Ray of our own, or join the cluster at ``address``.

    Where this process is connected to Ray already, that connection is used and left as it is.

    Args:
        address: ``host:port`` of a running cluster's head; None or "local" for one of our own.
        num_cpus: CPUs of our own; default what the machine allows.
        num_gpus: GPUs of our own; None for all that Ray finds.

    Raises:
        InputError: an address that is none.
        EnvironmentFault: Ray does not start, or no cluster answers at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return Cluster(False, ExitStack())
    ours = address is None or address == "local"
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    with ExitStack() as stack:
        if address is None or address == "local":
            arguments |= {
                "address": "local",
                "num_cpus": num_cpus or machine.allowed_cores(),
                "num_gpus": num_gpus,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": str(stack.enter_context(scratch_folder(_folder_name()))),
                "_system_config": SETTINGS,
            }
        else:
            _refuse_dead(address)
            arguments["address"] = address
        stack.enter_context(_without_listener())
        start = stack.enter_context(_groups())
        stack.callback(ray.shutdown)
        try:
            with _well_behaved(start):
                ray.init(**arguments)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raise EnvironmentFault(
                "Ray does not start" if ours else "the Ray cluster cannot be joined",
                where=None if ours else address,
                got=str(error).strip().split("\n")[0],
                do="Set engine.kind = 'local'" if ours else JOINING,
            ) from error
        return Cluster(ours, stack.pop_all())


JOINING = (
    "'ray status' shows whether it runs; this machine must be one of its nodes "
    "('ray start --address=HOST:PORT') and have the same Python and Ray"
)


@functools.cache
def _folder_name() -> str:
    """The same for each Ray of this process: a later one makes folders where the first one had."""
    return f"ray-{secrets.token_hex(4)}"


def in_worker() -> bool:
    """Whether this process is a Ray worker: part of a simulation, on nobody's real machine."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return bool(ray._private.worker.global_worker.mode == ray.WORKER_MODE)


def _refuse_dead(address: str) -> None:
    """Raise where no cluster answers: Ray itself would try for minutes, deaf to signals."""
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or "/" in address:
        raise InputError(
            "not the address of a Ray cluster",
            where="engine.address",
            got=repr(address),
            allowed="host:port of its head, e.g. 10.0.0.1:6379",
        )
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
        # Something answers. Whether that is Ray only Ray's client can tell, which is too patient.
        ask = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", ask, address],
            check=True, capture_output=True, timeout=HEALTH_SECONDS,
        )  # fmt: skip
    except OSError as error:
        why = error.strerror or str(error)
    except subprocess.SubprocessError:
        why = "what listens there is no Ray"
    else:
        return
    raise EnvironmentFault(
        "no Ray cluster answers",
        where="engine.address",
        got=f"{address}: {why}",
        do="'ray status' on its head shows whether it runs; or leave engine.address out",
    )


def _doors() -> dict[str, tuple[str, int]]:
    """Host and port of the parts of Ray that nothing works without."""
    import ray

    node: Any = ray._private.worker.global_worker.node
    host, _, port = str(node.gcs_address).rpartition(":")
    raylet = str(node.node_ip_address), int(node.node_manager_port)
    return {"head": (host, int(port)), "raylet": raylet}


def _opens(door: tuple[str, int]) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(door, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


GUARD = 'while read group; do all="$all -$group"; done; kill -s KILL -- $all 2>/dev/null'
"""Waits until nobody can tell it another group, and kills those it was told. ``sh`` runs it."""


@contextmanager
def _groups() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes, each in a group of its own, and ends these groups with the context.

    They also end if this process is killed. Ray alone would end the processes it starts here, but
    not in every case theirs: an agent that finds no head any more looks for it for minutes.
    """
    began: list[subprocess.Popen[bytes]] = []
    null = subprocess.DEVNULL
    guard = subprocess.Popen(
        ["sh", "-c", GUARD], stdin=subprocess.PIPE, stdout=null, stderr=null, process_group=0
    )

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(*arguments, process_group=0, **options)
        began.append(process)
        assert guard.stdin is not None
        guard.stdin.write(b"%d\n" % process.pid)
        guard.stdin.flush()
        return process

    try:
        yield start
    finally:
        guard.communicate()
        for process in began:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _well_behaved(start: Callable[..., subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within this context Ray starts in ways for which it has no settings.

    It would exchange 127.0.0.1 for an address that others reach; set a handler of its own for
    SIGTERM, which ends this process at once; and leave its processes in this process's group, where
    a signal to the group (from a terminal, or ``timeout``) ends them before the round is committed.
    """
    from ray._private import services, utils

    with (
        _replaced(services, "resolve_ip_for_localhost", lambda host: host),
        _replaced(utils, "set_sigterm_handler", lambda handler: None),
        _replaced(services, "ConsolePopen", start),
        _sigterm_kept(),
    ):
        yield


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Puts this process's handler for SIGTERM back in its place after the context.

    Ray's core puts one below Python's that prints a stack and, before it calls Python's, sets an
    alarm: a process that has not ended three seconds later is aborted, in the midst of its step.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_listener() -> Iterator[None]:
    """Within this context Ray does not print what happens to workers; it would, on stdout."""
    from ray._private import worker

    with _replaced(worker, "print_to_stdstream", lambda *ignored, **too: None):
        yield
