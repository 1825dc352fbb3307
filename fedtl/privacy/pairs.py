"""Coins that every run has: which of two examples of a client and class was trained on.

A client's rows of one class are put in random order and dealt to training and test by their place
(``data.clients``). So, given which two rows a pair has and everything outside the pairs, each of
the two is the trained one with probability one half, whatever the other pairs are: swapping the two
in that order is as probable, and a random matching of a test row with a training row of its client
and class is as probable after the swap. This holds for the coins of one_run.p_value with
``pairs``; it does not hold where the data came with their own split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.types import Int64, Population, Rows


@dataclass(frozen=True)
class Pairs:
    """Two rows each, of one client and class, in an order that tells nothing.

    Attributes:
        first, second: rows of the feature matrix, int64 [m].
        inside: whether the first is the one that was trained on, bool [m].
    """

    first: Int64
    second: Int64
    inside: npt.NDArray[np.bool_]


def pair_up(population: Population, seed: int, most: int) -> Pairs:
    """Pairs of a training and a test row, at most so many, drawn from a seeded stream.

    Args:
        population: its split must have been drawn by ``data.clients.split_clients``.
    """
    stream = seeding.generator(seed, "pairs")
    trained, held_out = [], []
    for client in range(population.num_clients):
        train, test = population.train.of(client), population.test.of(client)
        train_labels, test_labels = population.labels[train], population.labels[test]
        for label in np.intersect1d(train_labels, test_labels).tolist():
            ours = stream.permutation(train[train_labels == label])
            others = stream.permutation(test[test_labels == label])
            count = min(len(ours), len(others))
            trained.append(ours[:count])
            held_out.append(others[:count])
    nothing = np.empty(0, np.int64)
    ours = np.concatenate([nothing, *trained])
    others = np.concatenate([nothing, *held_out])
    chosen = stream.permutation(len(ours))[:most]
    inside = stream.integers(0, 2, len(chosen)).astype(bool)
    ours, others = ours[chosen], others[chosen]
    return Pairs(np.where(inside, ours, others), np.where(inside, others, ours), inside)


def deal_pairs(population: Population, pairs: Pairs, inside: npt.NDArray[np.bool_]) -> Population:
    """The population had the coins fallen as ``inside``: some pairs' two rows change sides."""
    swapped = inside != pairs.inside
    into = np.arange(len(population.labels))
    into[pairs.first[swapped]] = pairs.second[swapped]
    into[pairs.second[swapped]] = pairs.first[swapped]
    return replace(
        population,
        train=_renamed(population.train, into),
        test=_renamed(population.test, into),
    )


def _renamed(rows: Rows, into: Int64) -> Rows:
    """Other rows in the same clients, ascending within each."""
    owner = np.repeat(np.arange(len(rows.counts)), rows.counts)
    index = into[rows.index]
    return Rows(index[np.lexsort((index, owner))], rows.offsets)
