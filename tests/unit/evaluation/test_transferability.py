"""Scores from sums against the papers' algorithms on rows."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.evaluation.distances import Moments, shrinkage
from fedtl.evaluation.transferability import h_score, logme, nce_leep

CLASSES = 3


def rows(n: int, width: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    x = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 3
    x[np.arange(n), y % width] += 2
    return x, y


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    hot = np.eye(CLASSES)[y]
    return Moments(hot.sum(axis=0).astype(np.int64), hot.T @ x, x.T @ x)


def slow_logme(x: np.ndarray, y: np.ndarray) -> float:
    """You et al., algorithm 1: a fixed point on rows, then the evidence, per class."""
    n, d = x.shape
    found = []
    for c in np.unique(y):
        target = (y == c).astype(float)
        alpha = beta = 1.0
        for _ in range(5000):
            a = alpha * np.eye(d) + beta * x.T @ x
            m = beta * np.linalg.solve(a, x.T @ target)
            gamma = d - alpha * np.trace(np.linalg.inv(a))
            new = gamma / (m @ m), (n - gamma) / ((x @ m - target) ** 2).sum()
            still = abs(new[0] / new[1] - alpha / beta) <= 1e-9 * alpha / beta
            alpha, beta = new
            if still:
                break
        a = alpha * np.eye(d) + beta * x.T @ x
        m = beta * np.linalg.solve(a, x.T @ target)
        evidence = n / 2 * np.log(beta) + d / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        evidence -= beta / 2 * ((x @ m - target) ** 2).sum() + alpha / 2 * m @ m
        evidence -= np.linalg.slogdet(a)[1] / 2
        found.append(evidence / n)
    return float(np.mean(found))


@pytest.mark.parametrize(("n", "width"), [(80, 6), (300, 12), (15, 20)])
def test_logme_from_sums_is_logme_from_rows(n: int, width: int) -> None:
    x, y = rows(n, width)
    assert logme(moments(x, y)) == pytest.approx(slow_logme(x, y), rel=1e-5)


def test_logme_prefers_features_that_tell_the_classes() -> None:
    x, y = rows(200, 6)
    noise = np.random.default_rng(1).permutation(y)
    assert logme(moments(x, y)) > logme(moments(x, noise))
    assert h_score(moments(x, y)) > h_score(moments(x, noise))


def test_h_score_from_sums_is_h_score_from_rows() -> None:
    x, y = rows(120, 7)
    covariance = np.cov(x.T)
    means = np.stack([x[y == c].mean(axis=0) for c in range(CLASSES)])[y]
    rho = shrinkage(np.linalg.eigvalsh(covariance), 120)
    matrix = (1 - rho) * covariance + rho * np.trace(covariance) / 7 * np.eye(7)
    slow = np.trace(np.linalg.pinv(matrix) @ ((1 - rho) * np.cov(means.T)))
    assert h_score(moments(x, y)) == pytest.approx(slow, rel=1e-9)
    assert 0 < h_score(moments(x, y)) < CLASSES - 1


def test_h_score_of_classes_far_apart_nears_its_upper_end() -> None:
    rng = np.random.default_rng(2)
    y = np.arange(30_000) % CLASSES
    x = rng.normal(size=(30_000, 4)) * 0.01 + np.eye(CLASSES, 4)[y]
    assert h_score(moments(x, y)) == pytest.approx(CLASSES - 1, rel=1e-2)


def test_scores_do_not_depend_on_the_order_of_rows_or_the_names_of_classes() -> None:
    x, y = rows(90, 5)
    order = np.random.default_rng(3).permutation(90)
    other = moments(x[order], (y[order] + 1) % CLASSES)
    for score in (h_score, logme):
        assert score(other) == pytest.approx(score(moments(x, y)), rel=1e-9)


def test_scores_are_undefined_where_there_is_nothing_to_tell() -> None:
    x, y = rows(40, 5)
    one_class, constant = moments(x, np.zeros(40, int)), moments(np.ones((40, 5)), y)
    one_each, nobody = moments(x[:3], np.arange(3)), moments(x[:0], y[:0])
    for score in (h_score, logme):
        for case in (one_class, one_each, nobody):
            assert np.isnan(score(case))
    assert np.isnan(h_score(constant))
    assert np.isfinite(logme(constant))  # the features are a bias: the class shares are the model


def slow_nce(y: np.ndarray, z: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(y, z, strict=True):
        total += np.log(((y == a) & (z == b)).sum() / (z == b).sum())
    return total / len(y)


def slow_leep(y: np.ndarray, theta: np.ndarray) -> float:
    n, sources = theta.shape
    total = 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(sources):
            joint = theta[y == y[i], z].sum() / n
            likelihood += joint / (theta[:, z].sum() / n) * theta[i, z]
        total += np.log(likelihood)
    return total / n


def test_nce_and_leep_are_what_the_papers_count() -> None:
    rng = np.random.default_rng(4)
    y = rng.integers(0, CLASSES, 50).astype(np.int32)
    theta = rng.dirichlet(np.ones(6), 50)
    theta[np.arange(50), y] += 1
    theta /= theta.sum(axis=1, keepdims=True)
    nce, leep = nce_leep(y, theta.astype(np.float32), CLASSES)
    assert nce == pytest.approx(slow_nce(y, theta.argmax(axis=1)), rel=1e-9)
    assert leep == pytest.approx(slow_leep(y, theta), rel=1e-5)
    sure = np.eye(6, dtype=np.float32)[y]
    assert nce_leep(y, sure, CLASSES) == (0.0, 0.0)
    assert np.isnan(nce_leep(y * 0, sure, CLASSES)).all()
