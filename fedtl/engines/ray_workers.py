"""Clients in blocks on Ray workers: all cores, all GPUs, all machines of a cluster.

Each worker is an actor that holds the population (memory-mapped from the feature store on this
machine, in the object store on a cluster) and trains whole blocks of clients with the kernel every
engine uses. A block goes to whichever worker is free; which one that was changes no bit.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtl.clients.personal_store import PersonalStore
from fedtl.engines import ray_cluster
from fedtl.engines.hosting import save_population, scratch_folder
from fedtl.engines.ray_actor import Worker, in_memory, refuse_others
from fedtl.errors import EnvironmentFault, FedtlError
from fedtl.plans import RoundPlan, no_updates
from fedtl.types import (
    ClientFailure,
    ClientMetrics,
    ClientUpdates,
    Head,
    Int64,
    Population,
    join_metrics,
)

BLOCKS_PER_WORKER, BLOCK_ROWS = 4, 25_000
"""Several blocks even out clients of unequal size, but each costs some milliseconds on its way: one
of fewer rows is not worth it."""

LARGEST_BLOCK, LARGEST_REPLY = 256, 2**25
"""Clients whose heads travel back in one message, and bytes of these heads."""

LOOK_SECONDS = 0.2
"""Between two looks whether Ray itself is alive."""

START_SECONDS = 300.0
"""In which a worker must have been found room for and have loaded everything."""

Block = Int64
"""What one worker takes at a time: clients, or places in a plan."""


class _Died(Exception):
    """A worker's process ended, or cannot be reached."""


Actor = Any
"""Ray's handle of a Worker."""


@dataclass
class RayEngine:
    """All clients of a population on Ray workers.

    Attributes:
        population: who holds what.
        address: of a running cluster, which is left running; None for a Ray of our own.
        num_cpus: workers wanted, of one core each; None for as many as Ray has cores.
        num_gpus: GPUs of each worker, may be a fraction; 0 shares out all GPUs if device is "cuda".
        device: "cpu" or "cuda".
        block_size: clients in a block; None divides evenly.
        deadline_seconds: a round closes then without the blocks that are missing; None for never.
        store: where clients keep what is theirs; every worker must reach its folder.
        held_bytes: see Engine.
    """

    population: Population
    address: str | None = None
    num_cpus: int | None = None
    num_gpus: float = 0.0
    device: str = "cpu"
    block_size: int | None = None
    deadline_seconds: float | None = None
    store: PersonalStore | None = None
    held_bytes: int = 2**28
    _stack: ExitStack = field(default_factory=ExitStack)
    _cluster: ray_cluster.Cluster | None = None
    _make: Callable[[], tuple[Actor, Any]] | None = None
    _size: int = 0  # workers there should be
    _idle: list[Actor] = field(default_factory=list)
    # what is under way: worker, block (None while it loads), which attempt at it
    _busy: dict[Any, tuple[Actor, Block | None, int]] = field(default_factory=dict)
    _added: float = 0.0  # when the last worker was asked for

    def start(self, head: Head) -> None:
        """Start Ray or join it, start the workers and let each load what it needs."""
        gpus = None if self.device == "cuda" or self.num_gpus else 0
        cluster = ray_cluster.join(self.address, num_cpus=self.num_cpus, num_gpus=gpus)
        self._stack.callback(cluster.leave)
        self._cluster = cluster
        self._size, share = room(cluster, self.num_cpus, self.num_gpus, self.device)
        self._make = self._maker(cluster, share, head)
        self._stack.callback(self._end_workers)
        for _ in range(self._size):
            self._add()
        self._share_out([], lambda actor, block: None, START_SECONDS, everybody=True)
        if not self._idle:
            raise EnvironmentFault(f"no Ray worker was ready within {START_SECONDS:g} s")

    def run_clients(self, plan: RoundPlan, head: Head) -> Sequence[ClientUpdates]:
        """One reply per block, in the order in which they were done."""
        sent = self._sent(head)

        def train(actor: Actor, block: Block) -> Any:
            return actor.train.remote(plan.part(block), sent)

        rows = int(self.population.train.counts[plan.clients].sum())
        blocks = self._blocks(np.arange(len(plan.clients)), rows, plan.up_bytes(head))
        replies, missing = self._share_out(blocks, train, self.deadline_seconds)
        if missing:
            reason = f"no answer within {self.deadline_seconds:g} s"
            late = plan.clients[np.concatenate(missing)].tolist()
            failures = tuple(ClientFailure(client, reason) for client in late)
            replies.append(no_updates(plan, head, failures))
        return replies

    def evaluate(self, head: Head, clients: Int64) -> ClientMetrics:
        """Each client's own test examples, sorted by client id."""
        sent = self._sent(head)
        parts, _ = self._share_out(
            self._blocks(clients, int(self.population.test.counts[clients].sum()), 1),
            lambda actor, block: actor.evaluate.remote(block, sent),
            self.deadline_seconds,
        )
        if not parts:
            nothing = np.empty((0, len(head["bias"])), np.int64)
            return ClientMetrics(np.empty(0, np.int64), np.empty(0), nothing, nothing)
        joined = join_metrics(parts)
        order = np.argsort(joined.clients)
        return ClientMetrics(*(column[order] for column in vars(joined).values()))

    def close(self) -> None:
        """End the workers and a Ray of our own; a cluster that was joined stays."""
        self._stack.close()
        self._cluster = self._make = None

    def _maker(
        self, cluster: ray_cluster.Cluster, share: float, head: Head
    ) -> Callable[[], tuple[Actor, Any]]:
        """Makes a worker: its handle, and Ray's reference to what ``load`` will return."""
        import ray

        if cluster.ours:
            source: Any = self._stack.enter_context(scratch_folder())
            save_population(self.population, source)
        else:
            source = ray.put(in_memory(self.population))
        kind: Any = ray.remote(Worker)
        kind = kind.options(num_cpus=1, num_gpus=share, max_restarts=0)

        def make() -> tuple[Actor, Any]:
            actor = kind.remote(source, self.device, self.store)
            return actor, actor.load.remote(dict(head))

        return make

    def _add(self) -> None:
        assert self._make is not None
        actor, loaded = self._make()
        self._busy[loaded] = actor, None, 1
        self._added = time.monotonic()

    def _sent(self, head: Head) -> Any:
        """The head as workers are given it: in the message, or once in a cluster's object store."""
        cluster = self._alive()
        if cluster.ours:
            return dict(head)
        import ray

        return ray.put(dict(head))

    def _blocks(self, items: Int64, rows: int, num_bytes: int) -> list[Block]:
        """The items in even blocks.

        Args:
            rows: of all of them together.
            num_bytes: of the answer to one; a block's are not too much together.
        """
        workers = max(1, self._size)
        wanted = min(max(workers, math.ceil(rows / BLOCK_ROWS)), BLOCKS_PER_WORKER * workers)
        share = math.ceil(len(items) / wanted)
        most = max(1, min(LARGEST_BLOCK, LARGEST_REPLY // num_bytes))
        size = self.block_size or max(1, min(share, most))
        return [items[first : first + size] for first in range(0, len(items), size)]

    def _share_out(
        self,
        blocks: Sequence[Block],
        submit: Callable[[Actor, Block], Any],
        seconds: float | None,
        everybody: bool = False,
    ) -> tuple[list[Any], list[Block]]:
        """Every block's result, and the blocks that had none in time.

        A worker that dies is replaced and its block done again, once.

        Args:
            submit: gives a block to a worker, returns Ray's reference to what will be its result.
            seconds: how long to wait, None for as long as it takes.
            everybody: also wait until all workers are loaded.
        """
        waiting, left, deaths = deque((block, 1) for block in blocks), len(blocks), 0
        until = math.inf if seconds is None else time.monotonic() + seconds
        results: list[Any] = []
        while left or (everybody and self._busy):
            self._alive()
            while waiting and self._idle:
                block, attempt = waiting.popleft()
                actor = self._idle.pop()
                self._busy[submit(actor, block)] = actor, block, attempt
            done = _wait(list(self._busy))
            self._alive()
            for ref in done:
                actor, given, attempt = self._busy.pop(ref)
                try:
                    result = _result(ref)
                except _Died as error:
                    deaths += 1
                    if attempt == 2 or deaths >= max(2, self._size):
                        raise self._fault(f"{deaths} of Ray's workers died", error) from error
                    self._add()
                    if given is not None:
                        waiting.appendleft((given, 2))
                    continue
                except FedtlError:
                    self._idle.append(actor)
                    self._drop()
                    raise
                self._idle.append(actor)
                if given is None:
                    refuse_others(result)
                else:
                    results.append(result)
                    left -= 1
            if time.monotonic() > until:
                return results, [*self._drop(), *(block for block, _ in waiting)]
            if waiting and not self._running() and time.monotonic() > self._added + START_SECONDS:
                raise self._fault(f"no Ray worker was ready within {START_SECONDS:g} s")
        return results, []

    def _running(self) -> bool:
        """Whether anybody has something to do, or could."""
        return bool(self._idle) or any(block is not None for _, block, _ in self._busy.values())

    def _drop(self) -> list[Block]:
        """Replace the workers that are at a block, else they would answer later; their blocks."""
        import ray

        under_way = [(ref, *what) for ref, what in self._busy.items() if what[1] is not None]
        for ref, actor, _, _ in under_way:
            del self._busy[ref]
            ray.kill(actor)
            self._add()
        return [block for _, _, block, _ in under_way if block is not None]

    def _alive(self) -> ray_cluster.Cluster:
        """The cluster; raises EnvironmentFault where it is none any more."""
        assert self._cluster is not None, "start comes first"
        if trouble := self._cluster.trouble():
            raise self._fault(trouble)
        return self._cluster

    def _fault(self, what: str, error: BaseException | None = None) -> EnvironmentFault:
        if error is None:
            return EnvironmentFault(
                f"{what}; the last commit is kept", do="'fedtl resume' goes on from there"
            )
        return EnvironmentFault(
            f"{what}; the last commit is kept",
            got=str(error),
            do="See that memory suffices (fewer engine.num_cpus need less); "
            "'fedtl resume' goes on from there",
        )

    def _end_workers(self) -> None:
        import ray

        assert self._cluster is not None
        if not self._cluster.trouble():
            for actor in (*self._idle, *(actor for actor, _, _ in self._busy.values())):
                ray.kill(actor)
        self._idle.clear()
        self._busy.clear()


def room(
    cluster: ray_cluster.Cluster, num_cpus: int | None, num_gpus: float, device: str
) -> tuple[int, float]:
    """How many workers there can be, and the GPUs of each (a worker's share is of one GPU).

    Raises EnvironmentFault where there is room for none.
    """
    size, share = min(num_cpus or cluster.num_cpus, cluster.num_cpus), num_gpus
    if share == 0 and device == "cuda" and cluster.num_gpus >= 1:
        share = min(1.0, 1 / math.ceil(size / int(cluster.num_gpus)))
        share = math.floor(share * 1e4) / 1e4  # Ray's unit
    if share > 0:
        size = min(size, int(cluster.num_gpus * max(1, int(1 / share)) / max(1.0, share)))
    if size < 1 or (share == 0 and device == "cuda"):
        raise EnvironmentFault(
            "Ray has no room for a worker",
            got=f"{cluster.num_cpus} free CPUs, {cluster.num_gpus:g} free GPUs",
            allowed=f"1 CPU and {'a GPU' if share == 0 else f'{share:g} GPUs'}"
            if device == "cuda" or share
            else "1 CPU",
            do="Wait for others to finish, or ask for less in [engine]",
        )
    return size, share


def _wait(refs: list[Any]) -> list[Any]:
    """At most one of the references whose result is there; for LOOK_SECONDS at most."""
    import ray

    try:
        return ray.wait(refs, timeout=LOOK_SECONDS)[0]
    except SystemError as error:
        # A second Ctrl-C raises in the signal handler, and Ray's compiled code trips over that.
        raise error.__cause__ or error from None


def _result(ref: Any) -> Any:
    """What a worker returned. Raises what it raised, or _Died."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, FedtlError):
            raise cause from None
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            raise EnvironmentFault(
                "a Ray worker ran out of memory",
                got=str(cause).split("\n")[0],
                do="Lower engine.num_cpus or engine.block_size; 'fedtl resume' goes on",
            ) from None
        raise
    except (ray.exceptions.RayError, OSError) as error:
        raise _Died(type(error).__name__) from error
