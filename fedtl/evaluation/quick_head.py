"""The quick head: what frozen features are worth, told by one linear solve.

A pooled ridge head (Fed3R's form, ``ridge.fit_ridge``) over a seeded sample, judged on the clients'
own test rows: the measure of every change that is proposed before training.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Examples
from fedtl.evaluation.ridge import fit_ridge
from fedtl.evaluation.significance import Pairs, mcnemar
from fedtl.types import Head, Int64, Population, Rows

SHARE = 0.1
"""Ridge over the mean of the Gram matrix's diagonal. With as many rows as features a small constant
ridge interpolates and fails (PACS at 227 px, 896 rows: 0.37 right, and 0.78 with this one); from 60
rows to 8,000 this one is within 0.04 of the best there is."""

BLOCK_ROWS = 4096

Right = npt.NDArray[np.bool_]
"""Whether the head is right, by test row, in the order of ``test.index``."""


@dataclass(frozen=True)
class Sample:
    """Some training and test rows of every client.

    Attributes:
        kept: rows of the examples, int64 [m], ascending.
        train, test: each client's, as places in ``kept``.
    """

    kept: Int64
    train: Rows
    test: Rows

    def population(
        self, features: npt.NDArray[np.floating], examples: Examples, split: ClientSplit
    ) -> Population:
        """The sample with its features [m, D]."""
        labels = examples.labels[self.kept]
        return Population(
            features, labels, examples.classes, self.train, self.test, split.names, split.domains
        )

    def only(self, places: Int64) -> Sample:
        """The sample without the rows that are not at ``places`` (int64, ascending) of ``kept``."""
        return Sample(self.kept[places], *(_only(r, places) for r in (self.train, self.test)))


@dataclass(frozen=True)
class Gain:
    """What a change does to the quick head's answers to the same test rows.

    Attributes:
        before, after: accuracy in [0, 1].
        won, lost: rows that became right, or wrong.
        p_value: exact McNemar (two-sided) of won against lost.
    """

    before: float
    after: float
    won: int
    lost: int
    p_value: float

    @property
    def gain(self) -> float:
        """In accuracy; negative for a loss."""
        return self.after - self.before


def draw_sample(split: ClientSplit, train: int, test: int, seed: int, purpose: str) -> Sample:
    """At most ``train`` and ``test`` rows of all clients, drawn evenly from each."""
    parts = [
        sample_rows(rows, limit, seed, f"{purpose} {name}")
        for name, rows, limit in (("train", split.train, train), ("test", split.test, test))
    ]
    kept = np.unique(np.concatenate([part.index for part in parts]))
    placed = [Rows(np.searchsorted(kept, part.index), part.offsets) for part in parts]
    return Sample(kept, *placed)


def sample_rows(rows: Rows, limit: int, seed: int, purpose: str, each: int | None = None) -> Rows:
    """At most ``limit`` rows in all and ``each`` of a client: the same number of every client that
    has as many; where there are more clients than that, one row of ``limit`` of them."""
    counts = rows.counts if each is None else np.minimum(rows.counts, each)
    levels = range(int(counts.max(initial=0)) + 1)
    level = bisect_right(levels, limit, key=lambda n: int(np.minimum(counts, n).sum())) - 1
    quota = np.minimum(counts, level)
    if limit and not quota.any() and counts.any():
        chosen = seeding.generator(seed, purpose).permutation(np.flatnonzero(counts))[:limit]
        quota[chosen] = 1
    picked: list[Int64] = [np.empty(0, np.int64)]
    for client in np.flatnonzero(quota).tolist():
        own = rows.of(client)
        order = seeding.generator(seed, purpose, client).permutation(len(own))
        picked.append(np.sort(own[order[: quota[client]]]))
    offsets = np.concatenate([[0], np.cumsum(quota)]).astype(np.int64)
    return Rows(np.concatenate(picked), offsets)


def quick_head(population: Population, threads: int = 1) -> Head:
    """The pooled ridge head of all training rows, with SHARE as its ridge."""
    head = {
        "weight": np.zeros((len(population.classes), population.features.shape[1]), np.float32),
        "bias": np.zeros(len(population.classes), np.float32),
    }
    return fit_ridge(population, head, SHARE * _diagonal(population), threads)


def quick_answers(population: Population, threads: int = 1) -> Right:
    """Whether the quick head is right, bool by test row of all clients in turn; none without
    training rows."""
    if not len(population.train.index) or not len(population.test.index):
        return np.empty(0, np.bool_)
    head = quick_head(population, threads)
    right: list[Right] = []
    for rows in _blocks(population.test.index):
        scores = population.features[rows].astype(np.float32) @ head["weight"].T + head["bias"]
        right.append(scores.argmax(axis=1) == population.labels[rows])
    return np.concatenate(right)


def accuracy(right: Right) -> float | None:
    """Share of right answers; None without any."""
    return float(right.mean()) if len(right) else None


def gain_of(before: Right, after: Right) -> Gain | None:
    """What became of the answers to the same rows; None where there are none."""
    if not len(before):
        return None
    won, lost = int((~before & after).sum()), int((before & ~after).sum())
    pairs = Pairs(*(np.array([count], np.int64) for count in (won, lost, len(before))))
    p_value = float(mcnemar(pairs)[0])
    return Gain(float(before.mean()), float(after.mean()), won, lost, p_value)


def _only(rows: Rows, places: Int64) -> Rows:
    stays = np.isin(rows.index, places)
    ends = np.concatenate([[0], np.cumsum(stays)])[rows.offsets].astype(np.int64)
    return Rows(np.searchsorted(places, rows.index[stays]), ends)


def _diagonal(population: Population) -> float:
    """Mean over the features of their summed squares, over all training rows."""
    squares = 0.0
    for rows in _blocks(population.train.index):
        squares += float(np.square(population.features[rows].astype(np.float64)).sum())
    return float(squares / population.features.shape[1])


def _blocks(index: Int64) -> Sequence[Int64]:
    return [index[first : first + BLOCK_ROWS] for first in range(0, len(index), BLOCK_ROWS)]
