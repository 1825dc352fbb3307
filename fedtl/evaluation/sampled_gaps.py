"""What of the gap is measured on rows: sampled evenly from clients, by seeded draws."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.evaluation.domain_tests import LEAST_ROWS, PERMUTATIONS, compare
from fedtl.evaluation.source_classes import SourceClassifier
from fedtl.evaluation.transferability import nce_leep
from fedtl.types import Float32, Float64, Int32, Int64, Population

MOST_ROWS = 500
FEWEST_ROWS = 50
ALL_ROWS = 10_000
"""Rows sampled of a client: as many of ``ALL_ROWS`` as fall to each, within these bounds."""

SOURCE_ROWS = 20_000
"""Rows, of all clients together, that go through the backbone's own classifier."""

KINDS = ("a_distance", "mmd2", "mmd_p")


@dataclass(frozen=True)
class Sampled:
    """Distances by name, [K, K] and [K], with what was sampled and what to say of it."""

    pairs: dict[str, Float64]
    rest: dict[str, Float64]
    facts: dict[str, Any]
    notes: list[str]


def sample_gaps(
    population: Population,
    seed: int,
    pairs: bool,
    pool: ThreadPoolExecutor,
    check: Callable[[], None],
) -> Sampled:
    """A-distance and MMD of every two clients and of each to the rest, on training rows.

    Both sides have as many rows, those of the smaller one. The rest's rows are drawn evenly from
    all other clients' rows.
    """
    num = population.num_clients
    most = int(np.clip(ALL_ROWS // num, FEWEST_ROWS, MOST_ROWS))
    chosen = [_some(population.train.of(k), most, seed, k) for k in range(num)]
    rest = {name: np.full(num, np.nan) for name in KINDS}

    def to_rest(k: int) -> tuple[float, float, float]:
        others = _rest_rows(population, k, len(chosen[k]), seed)
        m = min(len(others), len(chosen[k]))
        rows = _features(population, np.concatenate([chosen[k][:m], others[:m]]))
        rows -= rows.mean(axis=0) if len(rows) else 0
        return compare(rows @ rows.T, seed)

    for k, values in enumerate(pool.map(to_rest, range(num))):
        check()
        for name, value in zip(KINDS, values, strict=True):
            rest[name][k] = value
    between = _between(population, chosen, seed, pool, check) if pairs else {}
    few = sum(len(rows) < LEAST_ROWS for rows in chosen)
    facts = {
        "fewest_rows": min(map(len, chosen)),
        "most_rows": max(map(len, chosen)),
        "permutations": PERMUTATIONS,
        "seed": seed,
    }
    what = "1 client has" if few == 1 else f"{few} clients have"
    notes = [
        f"{what} fewer than {LEAST_ROWS} training examples: A-distance and MMD are undefined there."
    ]
    return Sampled(between, rest, facts, notes if few else [])


def _between(
    population: Population,
    chosen: list[Int64],
    seed: int,
    pool: ThreadPoolExecutor,
    check: Callable[[], None],
) -> dict[str, Float64]:
    num = len(chosen)
    rows = [_features(population, own) for own in chosen]
    centre = np.concatenate(rows).mean(axis=0)  # keeps digits in the distances
    for own in rows:
        own -= centre
    inner = [own @ own.T for own in rows]
    found = {name: np.full((num, num), np.nan) for name in KINDS}

    def before(i: int) -> list[tuple[float, float, float]]:
        """Client i with each one before it."""
        values = []
        for j in range(i):
            m = min(len(rows[i]), len(rows[j]))
            cross = rows[i][:m] @ rows[j][:m].T
            block = np.block([[inner[i][:m, :m], cross], [cross.T, inner[j][:m, :m]]])
            values.append(compare(block, seed))
        return values

    for i, values in enumerate(pool.map(before, range(num))):
        check()
        for j, triple in enumerate(values):
            for name, value in zip(KINDS, triple, strict=True):
                found[name][i, j] = found[name][j, i] = value
    for name, value in (("a_distance", 0.0), ("mmd2", 0.0), ("mmd_p", 1.0)):
        np.fill_diagonal(found[name], value)  # a client against itself, by definition
    return found


def source_scores(
    population: Population,
    classifier: SourceClassifier,
    seed: int,
    pool: ThreadPoolExecutor,
    check: Callable[[], None],
) -> tuple[tuple[float, float], list[tuple[float, float]], int]:
    """NCE and LEEP of all clients and of each, and how many rows they were made from.

    Up to ``SOURCE_ROWS`` rows, of each client its share by examples.
    """
    num, classes = population.num_clients, len(population.classes)
    total = int(population.train.counts.sum())
    part = min(1.0, SOURCE_ROWS / total)

    def own(k: int) -> tuple[Int32, Float32]:
        rows = population.train.of(k)
        rows = np.sort(_some(rows, int(np.ceil(part * len(rows))), seed, k))
        return population.labels[rows], classifier.probabilities(population.features[rows])

    labels, probabilities, each = [], [], []
    for known, seen in pool.map(own, range(num)):
        check()
        labels.append(known)
        probabilities.append(seen)
        each.append(nce_leep(known, seen, classes))
    every = np.concatenate(labels)
    return nce_leep(every, np.concatenate(probabilities), classes), each, len(every)


def _some(rows: Int64, most: int, seed: int, client: int) -> Int64:
    """Up to ``most`` of a client's rows, in random order: the first are a sample too."""
    order = seeding.generator(seed, "gap rows", client).permutation(len(rows))
    return rows[order[:most]]


def _rest_rows(population: Population, client: int, most: int, seed: int) -> Int64:
    """Up to ``most`` of all other clients' training rows, in random order."""
    train = population.train
    own, total = len(train.of(client)), int(train.offsets[-1])
    stream = seeding.generator(seed, "gap rest", client)
    places = stream.choice(total - own, min(most, total - own), replace=False)
    places[places >= train.offsets[client]] += own
    return train.index[places]


def _features(population: Population, rows: Int64) -> Float64:
    return np.asarray(population.features[rows], dtype=np.float64)
