"""Flower's simulation as an engine: its nodes live in Ray's workers, its server in a thread here.

Flower starts one actor per CPU and gives each message to whichever is free.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtl.clients.personal_store import PersonalStore
from fedtl.engines import ray_cluster
from fedtl.engines.flower_client import app as client_app
from fedtl.engines.flower_engine import FlowerEngine, Seats
from fedtl.engines.flower_server import FlowerExchange
from fedtl.engines.hosting import save_population, scratch_folder
from fedtl.engines.ray_workers import room
from fedtl.engines.wire import whole
from fedtl.errors import EnvironmentFault
from fedtl.types import Population

JOIN_SECONDS = 120.0
"""Within this time the runtime must be up and every simulated node have answered."""

STOP_SECONDS = 15.0

LOOK_SECONDS = 0.2
"""Between two looks whether Ray itself is alive."""

GIVEN: ContextVar[Grid | None] = ContextVar("GIVEN", default=None)
"""The grid of a ServerApp that Flower's own tools run."""


@contextmanager
def given(grid: Grid) -> Iterator[None]:
    """Within this context ``flower_engine`` uses a grid that Flower's own tools have made."""
    token = GIVEN.set(grid)
    try:
        yield
    finally:
        GIVEN.reset(token)


def flower_engine(
    population: Population,
    *,
    num_nodes: int | None = None,
    address: str | None = None,
    num_cpus: int | None = None,
    num_gpus: float = 0.0,
    device: str = "cpu",
    block_size: int | None = None,
    deadline_seconds: float | None = None,
    store: PersonalStore | None = None,
    app: ClientApp = client_app,
) -> FlowerEngine:
    """An engine whose clients are hosted by simulated Flower nodes; ``start`` starts them.

    Args:
        population: who holds what; written to a temporary folder for the workers.
        num_nodes: simulated nodes; default one per worker.
        address: a running Ray cluster to join, whose machines share this one's temporary folder;
            None starts a Ray of our own.
        num_cpus, num_gpus: workers, one CPU each, and GPUs of each worker (may be a fraction).
        device, block_size: how the kernel runs in the workers.
        deadline_seconds: see FlowerEngine.
        store: where clients keep what is theirs; every worker must reach its folder.
        app: what the nodes run; tests change it.
    """
    grid = GIVEN.get()
    most = population.num_clients
    simulation = (
        Simulation(num_nodes and min(num_nodes, most), address, num_cpus, num_gpus, device, app)
        if grid is None
        else Elsewhere(grid)
    )
    kept = str(store.folder.absolute()) if store is not None else ""
    setting = {"device": device, "block_size": block_size or 0, "store": kept}
    people = SimulatedNodes(population, simulation, setting)
    return FlowerEngine(
        people.exchange,
        population.roster(),
        people.seat,
        {},
        deadline_seconds,
        recover=people.recover if grid is None else None,
        opening=people.open,
        letting_go=people.close,
    )


class SimulatedNodes:
    """Puts a population where simulated nodes find it and learns which of them hosts whom."""

    def __init__(
        self, population: Population, simulation: Simulation | Elsewhere, setting: dict[str, Any]
    ) -> None:
        self._population, self._simulation, self._setting = population, simulation, setting
        self._stack = ExitStack()
        self._folder = Path()
        self.exchange = FlowerExchange(trouble=simulation.trouble)

    def open(self) -> None:
        """Write the population down and start the runtime."""
        with ExitStack() as stack:
            self._folder = stack.enter_context(scratch_folder())
            stack.callback(self._simulation.stop)
            save_population(self._population, self._folder)
            self._connect()
            self._stack = stack.pop_all()

    def recover(self) -> None:
        """Start the runtime anew: Flower does not replace a worker that died."""
        self._simulation.stop()
        self._connect()

    def close(self) -> None:
        """Stop the runtime and take the population away again."""
        self._stack.close()

    def seat(self, new: Collection[int]) -> Seats:
        """Ask nodes to join until all are there; Flower's server begins while they register."""
        places: dict[int, int] = {}
        num_nodes, until = 1, time.monotonic() + JOIN_SECONDS
        while time.monotonic() < until:
            waiting = set(self.exchange.nodes()) - set(places)
            left = until - time.monotonic()
            for node, answer in self.exchange.ask("join", {n: ({}, {}) for n in waiting}, left):
                if answer.error is not None:
                    raise EnvironmentFault(f"a simulated node cannot join: {answer.error}")
                places[node] = whole(answer.facts, "partition")
                num_nodes = whole(answer.facts, "num_nodes")
            if len(places) == num_nodes:
                total = self._population.num_clients
                return {node: np.arange(first, total, num_nodes) for node, first in places.items()}
            time.sleep(0.05)
        raise EnvironmentFault(
            f"only {len(places)} of {num_nodes} simulated nodes joined in {JOIN_SECONDS:g} s",
            do="Type the same again when the machine is less busy"
            + (", or use a smaller engine.num_nodes" if num_nodes > 1 else ""),
        )

    def _connect(self) -> None:
        self.exchange.connect(
            self._simulation.start(), {**self._setting, "folder": str(self._folder)}
        )
        until = time.monotonic() + JOIN_SECONDS
        while not self.exchange.nodes():  # Flower's server begins before its nodes register
            trouble = self._simulation.trouble()
            if trouble or time.monotonic() > until:
                raise EnvironmentFault(f"no simulated node came: {trouble or 'too slow'}")
            time.sleep(0.01)


class Elsewhere:
    """A simulation that Flower's own tools started and will stop."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def start(self) -> Grid:
        """It runs."""
        return self._grid

    def trouble(self) -> str | None:
        """Nothing that could be known from here."""
        return None

    def stop(self) -> None:
        """Not ours to stop."""


class Simulation:
    """Flower's simulation runtime in a thread of this process, from ``start`` to ``stop``.

    Args:
        num_nodes: simulated nodes; None for one per worker.
        address, num_cpus, num_gpus, device: as RayEngine has them.
        app: what the nodes run.
    """

    def __init__(
        self,
        num_nodes: int | None,
        address: str | None,
        num_cpus: int | None,
        num_gpus: float,
        device: str,
        app: ClientApp,
    ) -> None:
        self._num_nodes, self._app = num_nodes, app
        self._address, self._num_cpus = address, num_cpus
        self._num_gpus, self._device = num_gpus, device
        self._over = threading.Event()
        self._cluster: ray_cluster.Cluster | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Whoever forgets to close must not wait for ever: Python joins Flower's threads at exit.
        threading._register_atexit(self._over.set)  # type: ignore[attr-defined]

    def start(self) -> Grid:
        """Start Ray, or join it, and the runtime on it. Raises EnvironmentFault."""
        # Flower starts no Ray of its own where one is running: its way is slow, and with the
        # address of an earlier cluster lying about it waits for that one.
        gpus = None if self._device == "cuda" or self._num_gpus else 0
        self._cluster = ray_cluster.join(self._address, num_cpus=self._num_cpus, num_gpus=gpus)
        workers, share = room(self._cluster, self._num_cpus, self._num_gpus, self._device)
        grids: Queue[Grid] = Queue()
        self._over.clear()
        self._error = None
        arguments = (grids, workers, share)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()
        until = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < until and self.trouble() is None:
            with suppress(Empty):
                return grids.get(timeout=0.1)
        raise EnvironmentFault(f"Flower's simulation did not start: {self.trouble() or 'too slow'}")

    def trouble(self) -> str | None:
        """Why no node can answer any more, or None."""
        if self._cluster is None or self._thread is None or not self._thread.is_alive():
            return f"Flower's simulation ended: {self._error or 'it was stopped'}"
        return self._cluster.trouble()

    def stop(self) -> None:
        """End the runtime, and the Ray connection with it; bounded, whatever the workers do."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        if self._cluster is not None:
            self._cluster.leave()
        self._cluster = self._thread = None

    def _run(self, grids: Queue[Grid], workers: int, share: float) -> None:
        from flwr.simulation import run_simulation

        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            grids.put(grid)
            self._over.wait()

        nodes = self._num_nodes or workers
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": share}
        try:
            with _as_a_guest(nodes, workers, lambda: self._over.is_set() or bool(self.trouble())):
                run_simulation(
                    server_app, self._app, nodes, backend_config={"client_resources": resources}
                )
        except BaseException as error:  # whatever it is, the main thread tells it
            self._error = error


@contextmanager
def _as_a_guest(nodes: int, workers: int, over: Callable[[], bool]) -> Iterator[None]:
    """Within this context Flower's simulation leaves Ray to us, is quick to see messages and quiet.

    It would start workers on all CPUs of a cluster, also where others use them; disconnect this
    process from Ray when it ends, whoever connected it; and wait without end for a worker whose Ray
    is gone. And it looks for new messages every 0.1 s by waiting on the event that would stop it,
    which it takes from its module's ``threading``; one that waits 10 ms makes a round so much
    shorter. A look takes some time per node: with many it is less often.
    """
    from flwr.server.superlink.fleet.vce.backend import raybackend

    simulation: Any = sys.modules["flwr.simulation.run_simulation"]
    host, ray = raybackend.RayBackend, vars(raybackend)["ray"]
    seconds = max(0.01, 1e-4 * nodes)

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            return super().wait(seconds if timeout is None else min(timeout, seconds))

    class Guest(host):  # type: ignore[misc, valid-type]
        def build(self, *arguments: Any) -> None:
            super().build(*arguments)
            del self.pool.pool[workers:]
            self.pool.num_actors = len(self.pool.pool)
            fetch = self.pool.fetch_result_and_return_actor_to_pool

            def fetch_or_leave(future: Any) -> Any:
                while not ray.wait([future], timeout=LOOK_SECONDS)[0]:
                    if over():
                        raise ConnectionError("the simulation is over")
                return fetch(future)

            self.pool.fetch_result_and_return_actor_to_pool = fetch_or_leave

        def terminate(self) -> None:
            """Workers end with the connection."""

    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.CRITICAL)
    simulation.threading = SimpleNamespace(Event=Impatient, Thread=threading.Thread)
    raybackend.RayBackend = Guest  # type: ignore[misc]
    try:
        yield
    finally:
        log.setLevel(level)
        simulation.threading, raybackend.RayBackend = threading, host  # type: ignore[misc]
