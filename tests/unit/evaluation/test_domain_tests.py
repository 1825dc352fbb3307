"""A-distance and MMD on rows: slow forms, known answers, and how often chance fools them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fedtl.evaluation.domain_tests import LEAST_ROWS, a_distance, compare, mmd


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows = np.concatenate([x, y])
    rows = rows - rows.mean(axis=0)
    return rows @ rows.T


def draw(seed: int, num: int, shift: float = 0.0, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, num, width))
    return products(x, y + shift)


def slow_mmd(x: np.ndarray, y: np.ndarray) -> float:
    rows, m = [*x, *y], len(x)
    apart = [((a - b) ** 2).sum() for i, a in enumerate(rows) for b in rows[i + 1 :]]
    width = np.median([square for square in apart if square > 0])

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * width)))

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(m) for j in range(m) if i != j)
    between = sum(k(a, b) for a in x for b in y)
    return within / (m * (m - 1)) - 2 * between / m**2


def test_mmd_is_the_papers_estimate() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12, 3)) + np.array([0.0, 1.0])[:, None, None]
    assert mmd(products(x, y), 0)[0] == pytest.approx(slow_mmd(x, y), rel=1e-9)
    x[0] = y[0] = 7  # the same row twice is no distance
    assert mmd(products(x, y), 0)[0] == pytest.approx(slow_mmd(x, y), rel=1e-9)


def test_mmd_is_unbiased_and_seldom_significant_on_one_distribution() -> None:
    # 200 draws of one distribution: p < 0.05 as often as it should be, and MMD^2 averages 0.
    found = np.array([mmd(draw(seed, 20), seed) for seed in range(200)])
    values, p = found.T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
    assert (values < 0).any()
    assert binomtest(int((p < 0.05).sum()), 200, 0.05).pvalue > 0.001
    assert binomtest(int((p < 0.5).sum()), 200, 0.5).pvalue > 0.001


def test_mmd_sees_a_shift() -> None:
    value, p = mmd(draw(0, 40, shift=1.0), 0)
    assert value > 0.05
    assert p == 1 / 200


def test_mmd_is_symmetric_and_blind_to_the_order_of_rows() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 15, 4))
    y += 0.5
    value = mmd(products(x, y), 0)[0]
    assert mmd(products(y, x), 0)[0] == pytest.approx(value, abs=1e-13)
    assert mmd(products(x[::-1], y), 0)[0] == pytest.approx(value, abs=1e-13)


def test_a_distance_of_one_distribution_is_near_0_and_of_two_far_ones_2() -> None:
    same = np.mean([a_distance(draw(seed, 100)) for seed in range(30)])
    assert same < 0.15  # what is worse than chance is clipped, so the mean is not quite 0
    assert a_distance(draw(0, 50, shift=5.0)) == 2
    # The very same rows on both sides: its twin misleads about each row.
    x = np.random.default_rng(3).normal(size=(40, 5))
    assert a_distance(products(x, x)) == 0


def test_a_distance_is_that_of_the_classifier_on_rows() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 30, 6))
    y += 0.6
    rows = np.concatenate([x, y])
    target = np.repeat([-1.0, 1.0], 30)
    even = np.tile(np.arange(30) % 2 == 0, 2)
    wrong = 0
    for train in (even, ~even):
        mean = rows[train].mean(axis=0)
        z = rows[train] - mean
        ridge = (z**2).sum() / len(z)
        w = np.linalg.solve(z.T @ z + ridge * np.eye(6), z.T @ target[train])
        wrong += int((np.sign((rows[~train] - mean) @ w) != target[~train]).sum())
    assert a_distance(products(x, y)) == pytest.approx(2 * (1 - 2 * wrong / 60), abs=1e-12)
    assert 0.5 < a_distance(products(x, y)) < 2


def test_rows_that_are_all_alike_cannot_be_told_apart() -> None:
    same = np.ones((20, 3))
    assert compare(products(same, same), 0) == (0.0, 0.0, 1.0)


def test_too_few_rows_say_nothing() -> None:
    few = draw(0, LEAST_ROWS - 1)
    assert np.isnan(compare(few, 0)).all()
    assert np.isfinite(compare(draw(0, LEAST_ROWS), 0)).all()
