"""Each client's summed statistics, one after the other: what real clients send for Fed3R."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.statistics import statistics, unpack_symmetric
from fedtl.evaluation.distances import Moments
from fedtl.plans import RoundPlan, Statistics
from fedtl.types import LocalTraining, Population

Sums = Mapping[str, npt.NDArray[Any]]
"""One client's ``counts`` [C], class ``sums`` [C, W] and packed ``gram``; W is D, or D + 1 where
rows end with a 1 for the bias."""

WAVE = 16
"""Clients whose statistics are made at a time."""

KEPT_BYTES = 2 << 30
"""Statistics are kept up to this size in all; beyond it they are made again where needed."""


class ClientSums:
    """A population's statistics, to be walked through more than once, in the order of the clients.

    Args:
        population: its training rows are summed.
        threads: CPU threads; the sums do not depend on it.
        check: called between waves; what it raises stops the work.
    """

    def __init__(self, population: Population, threads: int, check: Callable[[], None]) -> None:
        num, width = population.num_clients, population.features.shape[1] + 1
        classes = len(population.classes)
        self._population, self._threads, self._check = population, threads, check
        self._kept: list[Sums] | None = None
        self.fits = num * 8 * (width * (width + 1) // 2 + classes * (width + 1)) <= KEPT_BYTES

    def __len__(self) -> int:
        return self._population.num_clients

    def __iter__(self) -> Iterator[Sums]:
        if self._kept is not None:
            return iter(self._kept)
        if not self.fits:
            return self._made()
        self._kept = list(self._made())
        return iter(self._kept)

    def _made(self) -> Iterator[Sums]:
        people = self._population
        shape = len(people.classes), people.features.shape[1]
        head = {"weight": np.zeros(shape, np.float32), "bias": np.zeros(shape[0], np.float32)}
        ids = np.arange(len(self))
        plan = RoundPlan(1, ids, np.zeros(len(ids), np.uint64), LocalTraining(0, 1, 0.0))
        plan = replace(plan, task="statistics", statistics=Statistics())
        for first in range(0, len(ids), WAVE):
            self._check()
            wave = plan.part(ids[first : first + WAVE])
            found = statistics(people, head, wave, threads=self._threads).tensors
            for i in range(len(wave.clients)):
                yield {name: tensor[i] for name, tensor in found.items()}


def moments_of(sums: Sums, *, bias: bool = True) -> Moments:
    """A client's statistics as moments of its features; a ``bias`` entry of its rows is dropped."""
    second = unpack_symmetric(sums["gram"])
    width = len(second) - bias
    return Moments(sums["counts"], sums["sums"][:, :width], second[:width, :width])


def in_waves(sums: Iterable[Sums], size: int) -> Iterator[list[Sums]]:
    """A few clients at a time."""
    clients = iter(sums)
    while wave := list(islice(clients, size)):
        yield wave
