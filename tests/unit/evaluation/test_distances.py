"""Distances from summed statistics against slow ones from rows, closed forms, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from fedtl.clients.statistics import pack_symmetric
from fedtl.evaluation.distances import (
    Gaussian,
    Moments,
    Within,
    class_scatter,
    conditional,
    conditional_pairs,
    coral,
    coral_pairs,
    frechet,
    gaussian,
    principal_directions,
    shrinkage,
)

CLASSES = 4


def rows(n: int, width: int = 6, seed: int = 0, shift: float = 0.0, classes: int = CLASSES):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(CLASSES, width))
    mixing = np.random.default_rng(98).normal(size=(width, width))
    return rng.normal(size=(n, width)) @ mixing + centres[y] + 5 + shift, y


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    hot = np.eye(CLASSES)[y]
    return Moments(hot.sum(axis=0).astype(np.int64), hot.T @ x, x.T @ x)


def random_covariance(width: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(width, 3 * width))
    return x @ x.T / (3 * width)


def whole(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    """Of so many examples that nothing is shrunk."""
    return gaussian(mean, float(np.trace(covariance)), covariance, 10**15)


def shrunk(covariance: np.ndarray, examples: int) -> np.ndarray:
    rho = shrinkage(np.linalg.eigvalsh(covariance), examples)
    return (1 - rho) * covariance + rho * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )


def test_the_covariance_of_sums_is_that_of_the_rows() -> None:
    x, y = rows(50)
    assert moments(x, y).covariance() == pytest.approx(np.cov(x.T, bias=True), rel=1e-10)
    assert moments(x, y).mean == pytest.approx(x.mean(axis=0), rel=1e-13)


def test_everybody_but_one_is_the_sum_of_the_others() -> None:
    (x, y), (u, v) = rows(50), rows(30, seed=1)
    together = moments(np.concatenate([x, u]), np.concatenate([y, v]))
    rest = together.without(moments(x, y))
    assert rest.covariance() == pytest.approx(np.cov(u.T, bias=True), rel=1e-10)
    assert rest.counts.tolist() == np.bincount(v, minlength=CLASSES).tolist()


def test_a_constant_feature_varies_by_exactly_nothing() -> None:
    x, y = rows(50)
    x[:, 2] = 0.1
    covariance = moments(x, y).covariance()
    assert (covariance[2] == 0).all()
    assert (covariance[:, 2] == 0).all()
    assert covariance[3, 3] > 0
    assert np.isnan(moments(x[:1], y[:1]).covariance()).all()


def test_coral_is_the_papers_loss() -> None:
    a, b = random_covariance(5, 1), random_covariance(5, 2)
    assert coral(a, b) == pytest.approx(np.linalg.norm(a - b, "fro") ** 2 / (4 * 25), rel=1e-13)
    assert coral(a, b) == coral(b, a)
    assert coral(a, a) == 0
    assert coral(2 * np.eye(3), np.eye(3)) == pytest.approx(3 / 36)


@pytest.mark.parametrize("bias", [False, True])
def test_coral_of_all_pairs_is_coral_of_each(bias: bool) -> None:
    data = [rows(n, seed=n, shift=n / 10) for n in (2, 9, 40, 300)]
    data.append(data[3])  # the same again
    data.append((data[0][0][:1], data[0][1][:1]))  # no covariance at all
    grams = []
    for x, _ in data:
        z = np.c_[x, np.ones(len(x))] if bias else x
        grams.append(pack_symmetric(z.T @ z))
    means = np.array([x.mean(axis=0) for x, _ in data])
    examples = np.array([len(x) for x, _ in data])
    found = coral_pairs(grams, means, examples, np.cov(data[2][0].T))
    for i in range(5):
        for j in range(5):
            slow = coral(np.cov(data[i][0].T, bias=True), np.cov(data[j][0].T, bias=True))
            assert found[i, j] == pytest.approx(slow, rel=1e-9, abs=1e-15)
    assert (found[:5, :5] == found[:5, :5].T).all()
    assert found[3, 4] == pytest.approx(0, abs=1e-24)
    assert np.isnan(found[5, :5]).all()
    assert found[5, 5] == 0


def test_oas_is_the_papers_equation() -> None:
    s = random_covariance(7, 3)
    p, n = 7, 25
    square = sum(s[i, j] ** 2 for i in range(p) for j in range(p))
    trace = sum(s[i, i] for i in range(p))
    slow = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    values = np.linalg.eigvalsh(s)
    assert shrinkage(values, n + 1) == pytest.approx(min(1.0, slow), rel=1e-12)
    assert shrinkage(values, 2) == 1
    assert shrinkage(values, 10**9) < 1e-7
    assert shrinkage(np.ones(4), 100) == shrinkage(np.zeros(4), 100) == 1


def test_frechet_is_the_closed_form_on_gaussians() -> None:
    a, b = random_covariance(6, 4), random_covariance(6, 5)
    m, k = np.arange(6.0), np.ones(6)
    slow = ((m - k) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet(whole(m, a), whole(k, b)) == pytest.approx(slow, rel=1e-9)
    # Commuting covariances: the sum over directions of squared differences of the deviations.
    one, other = np.diag([4.0, 9.0, 1.0]), np.diag([1.0, 1.0, 16.0])
    zero = np.zeros(3)
    assert frechet(whole(zero, one), whole(zero, other)) == pytest.approx(1 + 4 + 9, rel=1e-12)
    assert frechet(whole(m, a), whole(k, b)) == pytest.approx(frechet(whole(k, b), whole(m, a)))
    assert frechet(whole(m, a), whole(m, a)) == pytest.approx(0, abs=1e-12)
    # Without a spread it is the squared distance of the means.
    assert frechet(*(whole(mean, np.zeros((6, 6))) for mean in (m, k))) == ((m - k) ** 2).sum()


def test_both_are_shrunk_as_the_smaller_one_is() -> None:
    a, b = random_covariance(6, 4), random_covariance(6, 5)
    zero = np.zeros(6)
    found = frechet(gaussian(zero, np.trace(a), a, 30), gaussian(zero, np.trace(b), b, 9000))
    assert found == pytest.approx(
        frechet(whole(zero, shrunk(a, 30)), whole(zero, shrunk(b, 30))), rel=1e-9
    )
    # equal covariances stay equal, however few examples one side has
    few, many = gaussian(zero, np.trace(a), a, 3), gaussian(zero, np.trace(a), a, 9000)
    assert frechet(few, many) == pytest.approx(0, abs=1e-12)


def test_frechet_beside_the_shared_directions_is_that_of_isotropic_gaussians() -> None:
    found, full = [], []
    for seed, variance in ((6, 9.0), (7, 4.0)):
        mean, inner = np.arange(5.0) * seed, random_covariance(3, seed)
        found.append(gaussian(mean, np.trace(inner) + 2 * variance, inner, 40))
        block = np.zeros((5, 5))
        block[:3, :3] = shrunk(inner, 40)
        block[3:, 3:] = variance * np.eye(2)
        full.append(whole(mean, block))
    assert frechet(*found) == pytest.approx(frechet(*full), rel=1e-9)


def test_directions_that_are_left_out_only_bring_gaussians_nearer() -> None:
    mean = np.zeros(8)
    for seed in range(20):
        a, b = random_covariance(8, seed), np.diag(np.arange(8.0)) @ random_covariance(8, 50 + seed)
        b = b @ np.diag(np.arange(8.0))
        directions, _ = principal_directions(a + b, 3)
        seen = [
            gaussian(mean, float(np.trace(s)), directions.T @ s @ directions, 10**15)
            for s in (a, b)
        ]
        assert frechet(*seen) <= frechet(whole(mean, a), whole(mean, b)) + 1e-9


def test_a_covariance_of_two_examples_is_taken_for_a_ball() -> None:
    s, t = (moments(*rows(2, seed=seed)) for seed in (0, 1))
    found, expected = [], 0.0
    for own in (s, t):
        covariance = own.covariance()
        found.append(gaussian(own.mean, float(np.trace(covariance)), covariance, 2))
    expected = ((s.mean - t.mean) ** 2).sum()
    expected += np.square(np.subtract(*(np.sqrt(np.trace(m.covariance())) for m in (s, t))))
    assert frechet(*found) == pytest.approx(expected, rel=1e-10)


def test_principal_directions_hold_most_of_the_variance() -> None:
    directions, share = principal_directions(np.diag([1.0, 5.0, 2.0, 0.0]), 2)
    assert np.abs(directions) == pytest.approx(np.eye(4)[:, [1, 2]])
    assert share == pytest.approx(7 / 8)
    assert principal_directions(np.zeros((3, 3)), 2)[1] == 1


def within_of(*data: tuple[np.ndarray, np.ndarray]) -> Within:
    scatters, degrees = np.array([class_scatter(moments(*own)) for own in data], float).T
    return Within.of(scatters, degrees, sum(float((x**2).sum()) for x, _ in data))


def slow_spread(x: np.ndarray, y: np.ndarray) -> float:
    return sum(((x[y == c] - x[y == c].mean(axis=0)) ** 2).sum() for c in set(y.tolist()))


def slow_conditional(s, t, unit: float, noise: tuple[float, float]) -> float:
    (x, y), (u, v) = s, t
    found, weights = 0.0, 0.0
    for c in set(y.tolist()) & set(v.tolist()):
        a, b = x[y == c], u[v == c]
        w = len(a) * len(b) / (len(a) + len(b))
        chance = noise[0] / len(a) + noise[1] / len(b)
        found += w * (((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() - chance)
        weights += w
    return max(0.0, found / (unit * weights)) if weights else np.nan


def test_the_variance_within_classes_is_that_of_the_rows() -> None:
    data = [rows(60), (rows(40, seed=1)[0] * 2, rows(40, seed=1)[1]), rows(9, seed=2)]
    free = [len(x) - len(set(y.tolist())) for x, y in data]
    found = within_of(*data)
    everybody = sum(slow_spread(*own) for own in data) / sum(free)
    assert found.variance == pytest.approx(everybody, rel=1e-11)
    own = [slow_spread(*data[k]) / free[k] for k in (0, 1)]
    assert found.own == pytest.approx([*own, everybody], rel=1e-11)  # nine examples are too few


def test_conditional_is_what_the_rows_say_one_by_one_and_all_at_once() -> None:
    data = [rows(80), rows(50, seed=1, shift=1), rows(9, seed=2, shift=-2), rows(5, seed=3)]
    data.append((rows(20, seed=4)[0], np.full(20, 2)))
    within = within_of(*data)
    counts = np.array([moments(*own).counts for own in data])
    found = conditional_pairs(counts, [moments(*own).sums for own in data], within)
    for i, own in enumerate(data):
        for j, other in enumerate(data):
            if i == j:
                assert found[i, j] == 0
                continue
            noise = within.own[i], within.own[j]
            slow = slow_conditional(own, other, within.variance, noise)
            one = conditional(moments(*own), moments(*other), within, *noise)
            assert one == pytest.approx(slow, rel=1e-9, abs=1e-12, nan_ok=True)
            assert found[i, j] == pytest.approx(slow, rel=1e-9, abs=1e-12, nan_ok=True)


def test_another_mix_of_classes_alone_is_no_conditional_gap() -> None:
    x, y = rows(4000)
    first = np.random.default_rng(5).random(4000) < np.array([0.9, 0.9, 0.1, 0.1])[y]
    s, t = (x[first], y[first]), (x[~first], y[~first])
    within = within_of(s, t)
    assert conditional(moments(*s), moments(*t), within, *within.own) < 0.01
    # while a distance that does not know of classes sees it
    plain = gaussian(*_marginal(s)), gaussian(*_marginal(t))
    assert frechet(*plain) > 0.05 * within.variance
    shifted = (t[0] + 2.0, t[1])
    expected = 6 * 4 / within.variance
    found = conditional(moments(*s), moments(*shifted), within, *within.own)
    assert found == pytest.approx(expected, rel=0.1)


def _marginal(data):
    own = moments(*data)
    covariance = own.covariance()
    return own.mean, float(np.trace(covariance)), covariance, own.examples


def test_what_chance_adds_to_conditional_is_taken_off() -> None:
    # Few examples of one distribution, more spread at one client: before it is clipped at 0 the
    # distance averages 0; plain squared distances would average half the yardstick.
    class Signed(Within):
        def judged(self, between, chance, weight):
            return (between - chance) / (self.variance * weight)

    values = []
    for seed in range(200):
        s, t = (moments(*rows(n, seed=2 * seed + n)) for n in (20, 31))
        (x, y), centres = rows(25, seed=10**6 + seed), np.random.default_rng(99).normal(size=(4, 6))
        wide = moments(3 * (x - centres[y] - 5) + centres[y] + 5, y)
        degrees = np.array([class_scatter(own) for own in (s, t, wide)], float)
        within = Within.of(*degrees.T, 1.0)
        for one, other, own in ((s, t, [0, 1]), (s, wide, [0, 2])):
            signed = Signed(within.variance, within.own)
            values.append(conditional(one, other, signed, *within.own[own]))
    for column in np.array(values).reshape(200, 2).T:
        error = column.std() / np.sqrt(200)
        assert abs(column.mean()) < 4 * error
        assert error < 0.05


def test_without_a_spread_only_what_is_equal_is_equal() -> None:
    x = np.repeat(np.eye(4, 6), 3, axis=0) + 5
    y = np.repeat(np.arange(4), 3)
    within = within_of((x, y), (x, y))
    assert within.variance == 0
    assert conditional(moments(x, y), moments(x, y), within, 0.0) == 0
    assert np.isnan(conditional(moments(x, y), moments(x + 1, y), within, 0.0))
    assert np.isnan(Within.of(np.zeros(2), np.zeros(2), 0.0).variance)
