"""N-way K-shot episodes on a frozen trunk's features, many at a time.

An episode draws N classes, K examples of each to learn from (the support) and Q others to be judged
on (the queries). Heads see inner products only, so all their work is on [N K, N K] and [N Q, N K]:

- ``prototype``: the nearest mean of a class's support (Snell et al. 2017, arXiv:1703.05175), on
  rows of length 1 (Wang et al. 2019, arXiv:1911.04623).
- ``ridge``: least squares to the classes' indicators with a penalty, solved in its dual form
  (Bertinetto et al. 2019, arXiv:1805.08136), here with a fixed penalty and the mean taken off.
- ``logistic``: cross-entropy with the same penalty, by a fixed number of gradient steps. Steps from
  zero stay in the span of the support, so the weights are W = A^T X and only A is moved.

Every head is fitted on the support alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.types import Float64, Int32, Int64

RIDGE = 0.1
"""Penalty of ridge and logistic heads, on rows of length 1."""

STEPS = 200
"""Of the logistic head, each of 1 / L, where L is at least the largest curvature of its loss."""

CHUNK_ENTRIES = 2_000_000
"""Features held at once, as float64."""

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Pool:
    """Where episodes are drawn from.

    Attributes:
        name: for the reader.
        support, query: rows to learn from and rows to be judged on, int64, ascending. Where they
            are the same rows, an episode's queries are others than its support.
    """

    name: str
    support: Int64
    query: Int64

    @property
    def same(self) -> bool:
        """Whether both are drawn from one heap."""
        return self.support is self.query


def eligible(pool: Pool, labels: Int32, shots: int, queries: int) -> list[tuple[Int64, Int64]]:
    """Support rows and query rows of every class that has enough of both."""
    found = []
    for label in np.unique(labels[pool.support]).tolist():
        own = pool.support[labels[pool.support] == label]
        other = own if pool.same else pool.query[labels[pool.query] == label]
        enough = len(own) >= shots + queries if pool.same else len(own) >= shots
        if enough and len(other) >= queries:
            found.append((own, other))
    return found


def draw(
    classes: list[tuple[Int64, Int64]],
    same: bool,
    ways: int,
    shots: int,
    queries: int,
    stream: np.random.Generator,
) -> tuple[Int64, Int64]:
    """One episode: support rows [ways, shots] and query rows [ways, queries]."""
    chosen = stream.choice(len(classes), ways, replace=False)
    support, query = [], []
    for own, other in (classes[i] for i in chosen.tolist()):
        if same:
            drawn = stream.choice(own, shots + queries, replace=False, shuffle=True)
            support.append(drawn[:shots])
            query.append(drawn[shots:])
        else:
            support.append(stream.choice(own, shots, replace=False))
            query.append(stream.choice(other, queries, replace=False))
    return np.stack(support), np.stack(query)


Scores = Callable[[Float64, Float64, int], Float64]
"""From inner products of the support [E, n, n], of queries with it [E, q, n], and the number of
ways, to scores [E, q, N]; the support is sorted by class, K rows of each."""


def prototype_scores(gram: Float64, cross: Float64, ways: int) -> Float64:
    """Minus half the squared distance to each class's mean, without what is the same for all."""
    mean = _indicators(gram.shape[1], ways) / (gram.shape[1] // ways)
    lengths = np.einsum("nc,enm,mc->ec", mean, gram, mean)
    return np.asarray(cross @ mean - 0.5 * lengths[:, None, :])


def ridge_scores(gram: Float64, cross: Float64, ways: int) -> Float64:
    """Ridge regression to indicators, with a bias by centring."""
    gram, cross = _centred(gram, cross)
    target = _indicators(gram.shape[1], ways) - 1 / ways
    weights = np.linalg.solve(gram + RIDGE * np.eye(gram.shape[1]), target[None])
    return np.asarray(cross @ weights)


def logistic_scores(gram: Float64, cross: Float64, ways: int) -> Float64:
    """Softmax regression on centred features, by gradient steps from zero."""
    gram, cross = _centred(gram, cross)
    target = _indicators(gram.shape[1], ways)
    rate = 1 / (0.5 * np.linalg.eigvalsh(gram)[:, -1, None, None] + RIDGE)
    weights = np.zeros((len(gram), gram.shape[1], ways))
    for _ in range(STEPS):
        scores = gram @ weights
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        scores /= scores.sum(axis=2, keepdims=True)
        weights -= rate * (scores - target + RIDGE * weights)
    return np.asarray(cross @ weights)


METHODS: dict[str, Scores] = {
    "prototype": prototype_scores,
    "ridge": ridge_scores,
    "logistic": logistic_scores,
}


def accuracies(
    features: npt.NDArray[np.floating],
    support: Int64,
    query: Int64,
) -> dict[str, Float64]:
    """Each method's share of right queries in each episode, float64 [E].

    Args:
        features: [N, D].
        support: rows, int64 [E, ways, shots].
        query: rows, int64 [E, ways, queries].
    """
    episodes, ways = support.shape[:2]
    each = (support[0].size + query[0].size) * features.shape[1]
    grams, crosses = [], []
    for part in _parts(episodes, max(1, CHUNK_ENTRIES // each)):
        learnt = _unit(features[support[part].reshape(part.stop - part.start, -1)])
        asked = _unit(features[query[part].reshape(part.stop - part.start, -1)])
        transposed = learnt.transpose(0, 2, 1)
        grams.append(learnt @ transposed)
        crosses.append(asked @ transposed)
    gram, cross = np.concatenate(grams), np.concatenate(crosses)
    truth = np.repeat(np.arange(ways), query.shape[2])
    return {
        name: (scores(gram, cross, ways).argmax(axis=2) == truth).mean(axis=1)
        for name, scores in METHODS.items()
    }


def interval(values: Float64) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: 1.96 s / sqrt(E).

    It takes episodes as independent draws from the examples at hand, and says nothing of examples
    or classes that are not among them.
    """
    return float(values.mean()), NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values))


def draw_many(
    pool: Pool, labels: Int32, ways: int, shots: int, queries: int, count: int, seed: int
) -> tuple[Int64, Int64] | None:
    """Support [count, ways, shots] and queries [count, ways, queries]; None with too few classes.

    An episode follows from the seed, the pool's name, the shots and its own number.
    """
    classes = eligible(pool, labels, shots, queries)
    if len(classes) < ways:
        return None
    key = int(seeding.named_keys(seed, "episodes", [pool.name])[0])
    drawn = [
        draw(
            classes,
            pool.same,
            ways,
            shots,
            queries,
            seeding.generator(key, "episode", ways, shots, queries, number),
        )
        for number in range(count)
    ]
    return np.stack([own for own, _ in drawn]), np.stack([asked for _, asked in drawn])


def _unit(rows: npt.NDArray[np.floating]) -> Float64:
    """Rows of length 1; a row of zeros stays."""
    values = rows.astype(np.float64)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1.0))


def _indicators(rows: int, ways: int) -> Float64:
    return np.repeat(np.eye(ways), rows // ways, axis=0)


def _centred(gram: Float64, cross: Float64) -> tuple[Float64, Float64]:
    """Inner products once the support's mean is taken off every row."""
    column = gram.mean(axis=1, keepdims=True)
    whole = gram.mean(axis=(1, 2), keepdims=True)
    moved = cross - cross.mean(axis=2, keepdims=True) - column + whole
    return gram - column - column.transpose(0, 2, 1) + whole, moved


def _parts(count: int, size: int) -> Iterator[slice]:
    for low in range(0, count, size):
        yield slice(low, min(count, low + size))
