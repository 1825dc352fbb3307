"""Clients in this process: no server, no start-up, all cores through the kernel's threads."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.tasks import do_task
from fedtl.plans import RoundPlan
from fedtl.types import (
    ClientMetrics,
    ClientUpdates,
    Head,
    Int64,
    LocalTraining,
    Population,
    join_metrics,
)

RESIDENT_BYTES = 2**29
"""Feature matrices up to this size may stay mapped as a whole; releasing would only cost time."""

JUDGED_AT_A_TIME = 2000
"""Clients whose test rows may be mapped at the same time."""


@dataclass(frozen=True)
class LocalEngine:
    """All clients of a population, trained block by block in this process.

    Attributes:
        population: who holds what.
        threads: how many clients train at the same time.
        device: "cpu" or "cuda".
        block_size: clients handed to a thread at a time; None lets the kernel choose.
        store: what the clients keep from round to round, where a scenario needs it.
    """

    population: Population
    threads: int
    device: str = "cpu"
    block_size: int | None = None
    store: PersonalStore | None = None

    def start(self, head: Head) -> None:
        """Compile the kernel, or load it from disk, on the smallest client.

        A network behind the cut goes to torch, which compiles nothing: a pass of it is no trifle.
        """
        if self.population.tail is not None:
            return
        smallest = np.array([np.argmin(self.population.train.counts)], np.int64)
        training = LocalTraining(epochs=1, batch_size=1, learning_rate=0.1)
        self.run_clients(RoundPlan(0, smallest, np.zeros(1, np.uint64), training), head)
        self.evaluate(head, smallest)

    def run_clients(self, plan: RoundPlan, head: Head) -> Sequence[ClientUpdates]:
        """One reply that holds the whole cohort."""
        updates = do_task(
            self.population,
            head,
            plan,
            threads=self.threads,
            device=self.device,
            block_size=self.block_size,
            store=self.store,
        )
        self._release()
        return [updates]

    def evaluate(self, head: Head, clients: Int64) -> ClientMetrics:
        """Each client's own test examples."""
        parts = []
        for first in range(0, len(clients), JUDGED_AT_A_TIME):
            some = clients[first : first + JUDGED_AT_A_TIME]
            parts.append(
                evaluate_clients(
                    self.population, head, some, threads=self.threads, device=self.device
                )
            )
            self._release()
        return join_metrics(parts)

    def close(self) -> None:
        """Nothing to let go of."""

    def _release(self) -> None:
        """Give a large memory map's pages back: memory follows the cohort, not the population.

        The pages stay in the system's cache, so the next round that needs them reads no disk.
        """
        features = self.population.features
        mapping = getattr(features, "_mmap", None)
        if isinstance(mapping, mmap.mmap) and features.nbytes > RESIDENT_BYTES:
            mapping.madvise(mmap.MADV_DONTNEED)
