"""Clients in blocks on Ray workers: all cores, all GPUs, all machines of a cluster.

Each worker is an actor that holds the population (memory-mapped from the feature store on this
machine, in the object store on a cluster) and trains whole blocks of clients with the kernel every
engine uses. A block goes to whichever worker is free; which one that was changes no bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.training import train_clients
from fedtl.engines import ray_cluster
from fedtl.engines.hosting import open_population, save_population, scratch_folder
from fedtl.errors import EnvironmentFault, FedtlError
from fedtl.failpoints import failpoint
from fedtl.types import (
    ClientFailure,
    ClientMetrics,
    ClientUpdates,
    Head,
    Int64,
    LocalTraining,
    Population,
    RoundPlan,
    join_metrics,
)

BLOCKS_PER_WORKER = 4
"""Evens out clients of unequal size."""

LARGEST_BLOCK = 256
"""Clients: their heads travel back in one message."""

LOOK_SECONDS = 0.2
"""Between two looks whether Ray itself is alive."""

START_SECONDS = 120.0
"""In which workers must have loaded everything."""

Block = Int64
"""Clients that one worker takes at a time."""


class Worker:
    """What runs in an actor's process.

    Args:
        source: the population, or the folder where ``save_population`` wrote it.
    """

    def __init__(self, source: Population | Path, device: str, block_size: int | None) -> None:
        self._population = open_population(source) if isinstance(source, Path) else source
        self._device, self._block_size = device, block_size

    def train(self, plan: RoundPlan, head: Head) -> ClientUpdates:
        """The plan's clients, trained one after the other on this worker's one core or GPU."""
        failpoint("client_before_train", plan.round)
        updates = train_clients(
            self._population, head, plan, device=self._device, block_size=self._block_size
        )
        failpoint("client_after_train", plan.round)
        return updates

    def evaluate(self, clients: Int64, head: Head) -> ClientMetrics:
        """The head on the clients' own test examples."""
        return evaluate_clients(self._population, head, clients, device=self._device)


Actor = Any
"""Ray's handle of a Worker."""


@dataclass
class RayEngine:
    """All clients of a population on Ray workers of one core, or one share of a GPU, each.

    Attributes:
        population: who holds what.
        address: of a running cluster, which is left running; None for a Ray of our own.
        num_cpus: workers wanted; None for as many as Ray has cores.
        num_gpus: GPUs of each worker, may be a fraction.
        device: "cpu" or "cuda".
        block_size: clients in a block; None divides evenly.
        deadline_seconds: a round closes then without the blocks that are missing; None for never.
    """

    population: Population
    address: str | None = None
    num_cpus: int | None = None
    num_gpus: float = 0.0
    device: str = "cpu"
    block_size: int | None = None
    deadline_seconds: float | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _cluster: ray_cluster.Cluster | None = None
    _new_actor: Callable[[], Actor] | None = None
    _idle: list[Actor] = field(default_factory=list)

    def start(self, head: Head) -> None:
        """Start Ray or join it, start the workers and let each load what it needs."""
        with ExitStack() as stack:
            gpus = int(np.ceil(self.num_gpus * (self.num_cpus or 1)))
            cluster = ray_cluster.join(self.address, num_cpus=self.num_cpus, num_gpus=gpus)
            stack.callback(cluster.leave)
            self._cluster = cluster
            self._new_actor = self._maker(self._source(cluster, stack))
            self._idle = [self._new_actor() for _ in range(self._num_workers(cluster))]
            stack.callback(self._idle.clear)
            self._stack = stack.pop_all()
        # every worker gets one: whoever is free takes the next
        smallest = np.array([np.argmin(self.population.train.counts)], np.int64)
        blocks = [smallest] * len(self._idle)
        training = LocalTraining(epochs=1, batch_size=1, learning_rate=0.1)
        plan = RoundPlan(0, smallest, np.zeros(1, np.uint64), training)
        _, missing = self._map(
            0, blocks, lambda actor, _: actor.train.remote(plan, head), START_SECONDS
        )
        if missing:
            raise EnvironmentFault(f"Ray's workers did not start in {START_SECONDS:g} s")
        self.evaluate(head, smallest)

    def run_clients(self, plan: RoundPlan, head: Head) -> Sequence[ClientUpdates]:
        """One reply per block, in the order in which they were done."""
        places = self._blocks(np.arange(len(plan.clients)))

        def train(actor: Actor, block: Block) -> Any:
            part = RoundPlan(plan.round, plan.clients[block], plan.batch_keys[block], plan.training)
            return actor.train.remote(part, head)

        replies, missing = self._map(plan.round, places, train, self.deadline_seconds)
        if missing:
            reason = f"no answer within {self.deadline_seconds:g} s"
            late = [plan.clients[i] for block in missing for i in block.tolist()]
            failures = tuple(ClientFailure(int(client), reason) for client in late)
            empty = {name: np.empty((0, *t.shape), np.float32) for name, t in head.items()}
            none = np.empty(0, np.int64)
            replies.append(ClientUpdates(plan.round, none, empty, none, np.empty(0), failures))
        return replies

    def evaluate(self, head: Head, clients: Int64) -> ClientMetrics:
        """Each client's own test examples, sorted by client id."""

        def judge(actor: Actor, block: Block) -> Any:
            return actor.evaluate.remote(block, head)

        parts, _ = self._map(0, self._blocks(clients), judge, None)
        joined = join_metrics(parts)
        order = np.argsort(joined.clients)
        return ClientMetrics(*(column[order] for column in vars(joined).values()))

    def close(self) -> None:
        """End the workers and a Ray of our own; a cluster that was joined stays."""
        self._stack.close()
        self._cluster = None

    def _source(self, cluster: ray_cluster.Cluster, stack: ExitStack) -> Any:
        """How workers get the population: over the disk of this machine, or the object store."""
        if cluster.ours:
            folder = stack.enter_context(scratch_folder())
            save_population(self.population, folder)
            return folder
        import ray

        return ray.put(_in_memory(self.population))

    def _maker(self, source: Any) -> Callable[[], Actor]:
        import ray

        options = {"num_cpus": 1, "num_gpus": self.num_gpus, "max_restarts": 0}
        kind: Any = ray.remote(Worker).options(**options)

        def make() -> Actor:
            return kind.remote(source, self.device, self.block_size)

        return make

    def _num_workers(self, cluster: ray_cluster.Cluster) -> int:
        """As many as are wanted and as Ray has room for."""
        found = min(self.num_cpus or cluster.num_cpus, cluster.num_cpus)
        if self.num_gpus > 0:
            found = min(found, int(cluster.num_gpus / self.num_gpus + 1e-9))
        if found < 1:
            raise EnvironmentFault(
                "Ray has no room for a worker",
                got=f"{cluster.num_cpus} free CPUs, {cluster.num_gpus:g} free GPUs",
                allowed=f"1 CPU and {self.num_gpus:g} GPUs",
                do="Wait for others to finish, or lower engine.num_gpus",
            )
        return found

    def _blocks(self, items: Int64) -> list[Block]:
        share = -(-len(items) // (BLOCKS_PER_WORKER * max(1, len(self._idle))))
        size = self.block_size or min(LARGEST_BLOCK, max(1, share))
        return [items[first : first + size] for first in range(0, len(items), size)]

    def _map(
        self,
        round: int,
        blocks: Sequence[Block],
        submit: Callable[[Actor, Block], Any],
        seconds: float | None,
    ) -> tuple[list[Any], list[Block]]:
        """Every block's result, and the blocks that had none at the deadline.

        A worker that dies is replaced and its block done again, once.
        """
        import ray

        waiting, busy = deque((block, 1) for block in blocks), dict[Any, tuple[Actor, Block, int]]()
        workers, deaths = len(self._idle), 0
        until = None if seconds is None else time.monotonic() + seconds
        results: list[Any] = []
        while waiting or busy:
            while waiting and self._idle:
                block, attempt = waiting.popleft()
                actor = self._idle.pop()
                busy[submit(actor, block)] = actor, block, attempt
            done, _ = ray.wait(list(busy), timeout=LOOK_SECONDS)
            self._refuse_trouble(round)
            for ref in done:
                actor, block, attempt = busy.pop(ref)
                try:
                    results.append(ray.get(ref))
                    self._idle.append(actor)
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    raise _told(error) from None
                except (ray.exceptions.RayError, OSError) as error:
                    deaths += 1
                    if attempt == 2 or deaths > max(1, workers - 1):
                        raise _died(round, f"{deaths} workers died", error) from error
                    self._replace()
                    waiting.appendleft((block, 2))
            if until is not None and time.monotonic() > until:
                for actor, _, _ in busy.values():  # they would answer into a later round
                    ray.kill(actor)
                    self._replace()
                missing = [block for _, block, _ in busy.values()]
                return results, [*missing, *(block for block, _ in waiting)]
        return results, []

    def _replace(self) -> None:
        assert self._new_actor is not None
        self._idle.append(self._new_actor())

    def _refuse_trouble(self, round: int) -> None:
        assert self._cluster is not None
        if trouble := self._cluster.trouble():
            raise _died(round, trouble, None)


def _in_memory(population: Population) -> Population:
    """The population with plain arrays, which Ray stores without a copy per worker."""
    arrays = {"features": np.asarray(population.features), "labels": population.labels}
    return Population(**{**vars(population), **arrays})


def _told(error: Any) -> BaseException:
    """What happened inside a worker, as what it is."""
    cause = error.cause
    return cause if isinstance(cause, FedtlError) else RuntimeError(f"in a worker: {cause!r}")


def _died(round: int, what: str, error: BaseException | None) -> EnvironmentFault:
    return EnvironmentFault(
        f"{what} in round {round}; the last commit is kept" if round else what,
        got=type(error).__name__ if error else None,
        do="See that memory suffices (fewer engine.num_cpus need less); 'fedtl resume' goes on",
    )
