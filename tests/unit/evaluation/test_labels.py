"""Label distances against slow ones, and their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from fedtl.evaluation.labels import DISTANCES, distribution, emd, hellinger, js, pairs, to_all


def slow(name: str, p: list[float], q: list[float]) -> float:
    if name == "emd":
        return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if name == "hellinger":
        return math.sqrt(max(0.0, 1 - sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))))
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for x in (a, b):
            total += x * math.log2(2 * x / (a + b)) / 2 if x > 0 else 0.0
    return total


@pytest.mark.parametrize("name", DISTANCES)
def test_agrees_with_the_definition_for_every_pair(name: str) -> None:
    generator = np.random.default_rng(1)
    counts = generator.integers(0, 5, size=(40, 7))
    counts[:, 0] += 1
    shares = distribution(counts)
    found = pairs(DISTANCES[name], counts)
    for i in range(40):
        for j in range(40):
            expected = slow(name, shares[i].tolist(), shares[j].tolist())
            assert found[i, j] == pytest.approx(expected, abs=3e-8)
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_shares_are_at_zero_and_disjoint_ones_at_one(name: str) -> None:
    distance = DISTANCES[name]
    assert distance(np.array([1, 2, 7]), np.array([3, 6, 21])) == 0.0
    assert distance(np.array([4, 0, 0]), np.array([0, 9, 1])) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("name", DISTANCES)
def test_an_empty_client_has_no_distance(name: str) -> None:
    found = pairs(DISTANCES[name], np.array([[0, 0], [1, 2], [3, 0]]))
    assert np.isnan(found[0]).all()
    assert np.isnan(found[:, 0]).all()
    assert not np.isnan(found[1:, 1:]).any()
    assert np.isnan(to_all(DISTANCES[name], np.array([[0, 0], [1, 2]]))).tolist() == [True, False]


def test_known_values() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    assert js(p, q) == 0.5
    assert hellinger(p, q) == pytest.approx(math.sqrt(0.5))
    assert emd(p, q) == 0.5
    assert js(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2)


@pytest.mark.parametrize("name", DISTANCES)
def test_order_of_classes_does_not_matter(name: str) -> None:
    generator = np.random.default_rng(2)
    p, q, order = generator.random((6, 9)), generator.random((6, 9)), generator.permutation(9)
    there, back = DISTANCES[name](p, q), DISTANCES[name](p[:, order], q[:, order])
    np.testing.assert_allclose(there, back, atol=1e-15)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(3).integers(1, 50, size=(31, 5))
    whole = pairs(js, counts)
    monkeypatch.setattr("fedtl.evaluation.labels.BLOCK", 1)
    assert (pairs(js, counts) == whole).all()
