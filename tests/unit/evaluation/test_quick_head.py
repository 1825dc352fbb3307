"""The quick head against a plain solve, and who is in its sample."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fedtl.clients.evaluation import evaluate_clients
from fedtl.evaluation.quick_head import (
    SHARE,
    accuracy,
    draw_sample,
    gain_of,
    quick_answers,
    sample_rows,
)
from fedtl.evaluation.ridge import fit_ridge
from fedtl.types import Population, Rows


def rows_of(*counts: int) -> Rows:
    ends = np.cumsum([0, *counts]).astype(np.int64)
    return Rows(np.arange(100, 100 + ends[-1], dtype=np.int64), ends)


def test_answers_are_those_of_a_central_solve(population: Population) -> None:
    x = population.features[population.train.index].astype(np.float64)
    z = np.hstack([x, np.ones((len(x), 1))])
    gram = z.T @ z
    ridge = SHARE * np.square(x).sum() / x.shape[1]
    onehot = np.eye(3)[population.labels[population.train.index]]
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), z.T @ onehot)
    tests = population.test.index
    scores = np.hstack([population.features[tests], np.ones((len(tests), 1))]) @ weights
    expected = scores.argmax(axis=1) == population.labels[tests]
    found = quick_answers(population, threads=2)
    assert (found == expected).all()
    assert accuracy(found) == pytest.approx(expected.mean())
    assert 0.5 < expected.mean() < 1, "easy, but not trivial"


def test_as_many_rows_as_features_are_no_trap() -> None:
    """A small constant ridge interpolates here: the quick head does not (double descent)."""
    rng = np.random.default_rng(4)
    width = n = 200
    y = rng.integers(0, 2, 3 * n).astype(np.int32)
    x = rng.normal(size=(3 * n, width)).astype(np.float32)
    x[:, 0] += 3 * (y - 0.5)
    train, test = (
        Rows(np.arange(n), np.array([0, n])),
        Rows(np.arange(n, 3 * n), np.array([0, 2 * n])),
    )
    people = Population(x, y, ("a", "b"), train, test, ("all",), ("",))
    head = {"weight": np.zeros((2, width), np.float32), "bias": np.zeros(2, np.float32)}
    small = evaluate_clients(people, fit_ridge(people, head, 0.01), np.array([0]))
    found = accuracy(quick_answers(people))
    assert found is not None
    assert found > small.correct.sum() / small.count.sum() + 0.15


def test_samples_are_even_seeded_and_within_their_limits() -> None:
    rows = rows_of(3, 50, 0, 20, 100)
    found = sample_rows(rows, 64, 7, "look")
    assert found.counts.tolist() == [3, 20, 0, 20, 20], "as many of each as it has"
    for k in range(5):
        own = found.of(k)
        assert set(own) <= set(rows.of(k))
        assert (np.diff(own) > 0).all()
    again = sample_rows(rows, 64, 7, "look")
    assert (again.index == found.index).all()
    assert (sample_rows(rows, 64, 8, "look").index != found.index).any()
    assert sample_rows(rows, 10**6, 7, "look").index.tolist() == rows.index.tolist()
    assert sample_rows(rows, 10**6, 7, "look", each=5).counts.tolist() == [3, 5, 0, 5, 5]
    few = sample_rows(rows, 2, 7, "look")
    assert few.counts.sum() == 2
    assert few.counts.max() == 1, "more clients than rows: some are drawn"
    assert sample_rows(rows_of(0, 0), 5, 7, "look").counts.tolist() == [0, 0]


def test_a_sample_without_some_rows_keeps_everybody_elses(population: Population) -> None:
    from fedtl.data.clients import ClientSplit

    split = ClientSplit(population.train, population.test, population.names, population.domains)
    sample = draw_sample(split, 40, 20, 1, "tried")
    places = np.setdiff1d(np.arange(len(sample.kept)), [0, 5, 17])
    less = sample.only(places)
    gone = sample.kept[[0, 5, 17]]
    for before, after in ((sample.train, less.train), (sample.test, less.test)):
        for k in range(5):
            stay = [row for row in sample.kept[before.of(k)] if row not in gone]
            assert less.kept[after.of(k)].tolist() == stay


def test_gains_are_paired() -> None:
    before = np.array([True] * 10 + [False] * 10)
    after = np.array([True] * 8 + [False] * 2 + [True] * 7 + [False] * 3)
    found = gain_of(before, after)
    assert found is not None
    assert (found.won, found.lost) == (7, 2)
    assert found.gain == pytest.approx(5 / 20)
    assert found.p_value == pytest.approx(binomtest(7, 9).pvalue)
    same = gain_of(before, before)
    assert same is not None
    assert (same.gain, same.p_value) == (0, 1)
    nothing = np.empty(0, np.bool_)
    assert gain_of(nothing, nothing) is None
    assert accuracy(nothing) is None
