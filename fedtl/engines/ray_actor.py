"""What runs in the process of a Ray worker, and what it takes to get it there."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from fedtl import machine
from fedtl.clients.personal_store import PersonalStore
from fedtl.engines.hosting import open_population
from fedtl.engines.local import LocalEngine
from fedtl.errors import EnvironmentFault
from fedtl.failpoints import failpoint
from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, ClientUpdates, Head, Int64, Population, Rows

SAME_BITS = ("fedtl", "python", "numpy", "numba", "torch")
"""What must have one version on all machines of a cluster, or results could differ."""


class Worker:
    """What runs in an actor's process, on one core or one share of a GPU.

    Args:
        source: the population, or the folder where ``save_population`` wrote it.
        device: "cpu" or "cuda".
        store: where clients keep what is theirs.
    """

    def __init__(
        self, source: Population | Path, device: str, store: PersonalStore | None = None
    ) -> None:
        self._source, self._device, self._store = source, device, store

    @cached_property
    def _engine(self) -> LocalEngine:
        source = self._source
        population = open_population(source) if isinstance(source, Path) else source
        return LocalEngine(population, 1, self._device, store=self._store)

    def load(self, head: Head) -> dict[str, str]:
        """Open the data and compile the kernel; the versions in use."""
        self._engine.start(head)
        return machine.versions()

    def train(self, plan: RoundPlan, head: Head) -> ClientUpdates:
        """The plan's clients, trained one after the other."""
        failpoint("client_before_train", plan.round)
        (updates,) = self._engine.run_clients(plan, head)
        failpoint("client_after_train", plan.round)
        return updates

    def evaluate(self, clients: Int64, head: Head) -> ClientMetrics:
        """The head on the clients' own test examples."""
        return self._engine.evaluate(head, clients)


def in_memory(population: Population) -> Population:
    """The population with plain arrays: Ray stores these once per machine, without pickling."""
    plain = {
        name: np.ascontiguousarray(getattr(population, name)) for name in ("features", "labels")
    }
    rows = {
        name: Rows(np.asarray(rows.index), np.asarray(rows.offsets))
        for name, rows in (("train", population.train), ("test", population.test))
    }
    return Population(**{**vars(population), **plain, **rows})


def refuse_others(found: dict[str, str]) -> None:
    """Refuse a worker on another machine that has other software."""
    here = machine.versions()
    other = [
        f"{name} {found.get(name)} (here {here.get(name)})"
        for name in SAME_BITS
        if found.get(name) != here.get(name)
    ]
    if other:
        raise EnvironmentFault(
            "a machine of the Ray cluster has other versions",
            got=", ".join(other),
            do="Install the same fedtl, with its dependencies, on every machine",
        )
