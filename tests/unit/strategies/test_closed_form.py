"""One-shot heads against the same head computed from all rows in one place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from fedtl.clients.statistics import statistics, unpack_symmetric
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.strategies.class_means import (
    CALIBRATION_DECAY,
    CCVR,
    FedCOF,
    FedLDA,
    FedNCM,
    estimated_gram,
    lda_bias,
    pooled_covariance,
    scatter_covariance,
    shrunken,
    softmax_head,
)
from fedtl.strategies.closed_form import ABSENT, AFL, Fed3R, OneShot, ridge_weights
from fedtl.types import LocalTraining, Population, Rows

C, D, K = 4, 6, 5
ALL = [
    Fed3R(),
    Fed3R(bias=False, normalise=False, temperature=1.0),
    Fed3R(random_features=11, scale=0.4),
    AFL(),
    AFL(clean=False),
    FedNCM(),
    FedLDA(),
    FedLDA(covariance="total"),
    CCVR(samples=20),
    FedCOF(),
]
HEAD = {"weight": np.zeros((C, D), np.float32), "bias": np.zeros(C, np.float32)}


def people(seed: int = 0, sizes: tuple[int, ...] = (40, 1, 25, 60, 9), classes: int = C):
    """Clients over rows whose classes lie apart; the second has a single example."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    labels = rng.integers(0, classes, n).astype(np.int32)
    features = rng.normal(size=(n, D)) + 2 * np.eye(C, D)[labels]
    rows = Rows(np.arange(n), np.cumsum([0, *sizes]))
    none = Rows(np.empty(0, np.int64), np.zeros(len(sizes) + 1, np.int64))
    names = tuple(f"c{i}" for i in range(len(sizes)))
    return Population(
        features.astype(np.float32), labels, tuple("abcd"), rows, none, names, ("",) * len(sizes)
    )


def asked(strategy: OneShot, state, clients) -> RoundPlan:
    ids = np.array(clients, np.int64)
    plan = RoundPlan(1, ids, np.zeros(len(ids), np.uint64), LocalTraining(1, 1, 0.1))
    return strategy.plan(state, plan)


def run(strategy: OneShot, population, groups=None):
    """The state after the given groups of clients have reported one after the other."""
    state = strategy.init(HEAD, population.num_clients)
    for clients in groups or [range(population.num_clients)]:
        plan = asked(strategy, state, clients)
        state = strategy.absorb(state, statistics(population, state.head, plan))
    return strategy.solve(state)


def rows_of(population):
    rows = population.train.index
    return population.features[rows].astype(np.float64), population.labels[rows]


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_step_is_pure_and_ends_the_run(strategy) -> None:
    population = people()
    start = strategy.init(HEAD, K)
    kept = {name: tensor.copy() for name, tensor in start.slots.items()}
    given = statistics(population, start.head, asked(strategy, start, range(K)))
    first, again = strategy.step(start, given), strategy.step(start, given)
    for name, tensor in kept.items():
        assert start.slots[name].tobytes() == tensor.tobytes()
        assert first.slots[name].tobytes() == again.slots[name].tobytes()
        assert first.slots[name].shape == tensor.shape
        assert first.slots[name].dtype == tensor.dtype
    for name, tensor in start.head.items():
        assert first.head[name].tobytes() == again.head[name].tobytes()
        assert first.head[name].shape == tensor.shape
        assert first.head[name].dtype == np.float32
        assert np.isfinite(first.head[name]).all()
        assert first.head[name].flags.c_contiguous  # or a file would hold it transposed
    assert strategy.finished(first)
    assert not strategy.finished(start)


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_late_clients_are_added_and_nobody_is_asked_twice(strategy) -> None:
    population = people()
    at_once = run(strategy, population)
    state = run(strategy, population, [[0, 3], [1], [2]])
    assert not strategy.finished(state)
    plan = asked(strategy, state, [0, 2, 4])
    assert plan.clients.tolist() == [4]
    assert plan.task == "statistics"
    late = strategy.step(state, statistics(population, state.head, plan))
    assert strategy.finished(late)
    for name in HEAD:
        np.testing.assert_allclose(late.head[name], at_once.head[name], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_who_is_forgotten_was_never_there(strategy) -> None:
    population = people()
    whole = run(strategy, population)
    own = statistics(population, whole.head, asked(strategy, strategy.init(HEAD, K), [3]))
    left = strategy.solve(strategy.forget(whole, own))
    never = run(strategy, population, [[0, 1, 2, 4]])
    for name, tensor in never.slots.items():
        scale = max(1.0, np.abs(whole.slots[name]).max())
        np.testing.assert_allclose(left.slots[name], tensor, rtol=0, atol=1e-12 * scale)
    for name in HEAD:
        np.testing.assert_allclose(left.head[name], never.head[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="once"):
        strategy.forget(left, own)
    with pytest.raises(AssertionError, match="once"):
        strategy.absorb(whole, own)


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_a_class_nobody_has_is_never_predicted(strategy) -> None:
    population = people(classes=C - 1)
    head = run(strategy, population).head
    assert head["bias"][C - 1] == np.float32(ABSENT)
    assert not head["weight"][C - 1].any()
    z = rows_of(population)[0]
    if "fourier.weight" in head:
        omega = head["fourier.weight"]
        z = np.sqrt(2 / len(omega)) * np.cos(z @ omega.T + head["fourier.bias"])
    scores = z @ head["weight"].T.astype(np.float64) + head["bias"]
    assert set(scores.argmax(axis=1)) == {0, 1, 2}


@pytest.mark.parametrize("strategy", [s for s in ALL if not isinstance(s, FedCOF)], ids=str)
def test_identical_clients_are_as_many_copies_of_the_rows(strategy) -> None:
    one = people(sizes=(50,))
    copies = replace(
        one,
        train=Rows(np.tile(np.arange(50), 3), np.arange(4) * 50),
        test=Rows(np.empty(0, np.int64), np.zeros(4, np.int64)),
        names=("a", "b", "c"),
        domains=("",) * 3,
    )
    together = replace(copies, train=Rows(copies.train.index, np.array([0, 150])), names=("a",))
    counts_clients = strategy == AFL(clean=False)
    pooled = AFL(clean=False, gamma=3.0) if counts_clients else strategy
    many, single = run(strategy, copies), run(pooled, together)
    for name in HEAD:
        np.testing.assert_allclose(many.head[name], single.head[name], rtol=2e-6, atol=1e-6)


def test_fedcof_of_identical_clients_sees_no_scatter() -> None:
    sums = np.tile(np.array([[3.0, -1.0], [2.0, 4.0]]), (5, 1, 1))
    counts = np.tile(np.array([2, 4]), (5, 1))
    mean = sums[0].sum(axis=0) / 6
    want = 30 * np.outer(mean, mean) + (9 + 19) * 0.5 * np.eye(2)
    np.testing.assert_allclose(estimated_gram(sums, counts, 0.5), want, rtol=1e-14)


def test_fed3r_is_ridge_regression_with_scaled_columns() -> None:
    x, y = rows_of(people())
    z, onehot = np.c_[x, np.ones(len(x))], np.eye(C)[y]
    w = np.linalg.solve(z.T @ z + 0.3 * np.eye(D + 1), z.T @ onehot)
    plain = run(Fed3R(ridge=0.3, normalise=False, temperature=1.0), people()).head
    np.testing.assert_allclose(plain["weight"], w[:-1].T, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(plain["bias"], w[-1], rtol=1e-6, atol=1e-7)
    lengths = np.linalg.norm(w[:-1], axis=0)
    scaled = run(Fed3R(ridge=0.3, temperature=0.1), people()).head
    np.testing.assert_allclose(scaled["weight"].T, w[:-1] / lengths / 0.1, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scaled["bias"], w[-1] / lengths / 0.1, rtol=1e-6, atol=1e-6)


def test_fed3r_on_random_features_is_ridge_on_what_the_map_gives() -> None:
    strategy = Fed3R(random_features=11, scale=0.4, ridge=0.2, normalise=False, temperature=1.0)
    head = run(strategy, people()).head
    x, y = rows_of(people())
    omega, shift = head["fourier.weight"].astype(np.float64), head["fourier.bias"]
    assert omega.shape == (11, D)
    z = np.c_[np.sqrt(2 / 11) * np.cos(x @ omega.T + shift), np.ones(len(x))]
    w = np.linalg.solve(z.T @ z + 0.2 * np.eye(12), z.T @ np.eye(C)[y])
    np.testing.assert_allclose(head["weight"], w[:-1].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head["bias"], w[-1], rtol=1e-5, atol=1e-6)
    other = replace(strategy, seed=1).init(HEAD, K).head
    assert other["fourier.weight"].tobytes() != head["fourier.weight"].tobytes()


def test_a_singular_matrix_takes_the_pseudo_inverse_and_says_so() -> None:
    few = people(sizes=(2, 1))
    state = run(AFL(), few)
    x, y = rows_of(few)
    want = np.linalg.pinv(x) @ np.eye(C)[y]
    held = np.unique(y)
    assert state.slots["singular"].tolist() == [1]
    np.testing.assert_allclose(state.head["weight"][held], want.T[held], atol=1e-6)
    zero = Fed3R(ridge=0.0, bias=False, normalise=False, temperature=1.0)
    np.testing.assert_allclose(run(zero, few).head["weight"], state.head["weight"], atol=1e-7)
    assert run(Fed3R(), few).slots["singular"].tolist() == [0]
    assert run(AFL(), people()).slots["singular"].tolist() == [0]


def test_afl_with_its_gammas_left_in_is_ridge_of_all_of_them() -> None:
    kept = run(AFL(gamma=0.7, clean=False), people()).head
    ridge = Fed3R(ridge=K * 0.7, bias=False, normalise=False, temperature=1.0)
    assert kept["weight"].tobytes() == run(ridge, people()).head["weight"].tobytes()
    clean = run(AFL(gamma=0.7), people())
    x, y = rows_of(people())
    exact = np.linalg.lstsq(x, np.eye(C)[y], rcond=None)[0]
    np.testing.assert_allclose(clean.head["weight"], exact.T, rtol=1e-5, atol=1e-6)


def test_afls_recursion_gives_the_same_head() -> None:
    # The paper's own way: local ridge heads merged pairwise, then gamma removed.
    population, gamma = people(), 1.0
    merged, gram = None, None
    for k in range(K):
        data = population.client(k)
        x = data.features.astype(np.float64)
        own = x.T @ x + gamma * np.eye(D)
        weights = np.linalg.solve(own, x.T @ np.eye(C)[data.labels])
        if merged is None:
            merged, gram = weights, own
            continue
        total = gram + own
        merged = np.linalg.solve(total, gram @ merged + own @ weights)
        gram = total
    clean = np.linalg.solve(gram - K * gamma * np.eye(D), gram @ merged)
    np.testing.assert_allclose(run(AFL(), population).head["weight"], clean.T, rtol=1e-5, atol=1e-6)


def test_fedncm_is_the_normalised_mean_of_each_class() -> None:
    x, y = rows_of(people())
    means = np.stack([x[y == c].mean(axis=0) for c in range(C)])
    head = run(FedNCM(temperature=0.5), people()).head
    want = means / np.linalg.norm(means, axis=1, keepdims=True) / 0.5
    np.testing.assert_allclose(head["weight"], want, rtol=1e-6, atol=1e-6)
    assert not head["bias"].any()
    plain = run(FedNCM(normalise=False, temperature=1.0), people()).head
    np.testing.assert_allclose(plain["weight"], means, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["within", "total"])
def test_fedlda_is_the_textbooks(kind) -> None:
    x, y = rows_of(people())
    means = np.stack([x[y == c].mean(axis=0) for c in range(C)])
    if kind == "within":
        covariance = (x - means[y]).T @ (x - means[y]) / (len(x) - C)
    else:
        covariance = np.cov(x.T)
    mixed = 0.8 * covariance + 0.2 * np.trace(covariance) / D * np.eye(D)
    weight = np.linalg.solve(mixed, means.T).T
    prior = np.bincount(y) / len(y)
    bias = -0.5 * np.einsum("cd,cd->c", means, weight) + np.log(prior)
    head = run(FedLDA(covariance=kind, shrinkage=0.2), people()).head
    np.testing.assert_allclose(head["weight"], weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head["bias"], bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shrunken(covariance, 0.2), mixed, rtol=1e-13)


def test_unshrunken_lda_is_scikit_learns() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = rows_of(people())
    head = run(FedLDA(shrinkage=0.0), people()).head
    other = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    # scikit-learn divides by N, we by N - C: the discriminant is ours with N / (N - C).
    ours = head["weight"] * len(x) / (len(x) - C)
    np.testing.assert_allclose(ours, other.coef_, rtol=1e-4, atol=1e-5)


def test_a_clients_own_prior_only_shifts_the_bias() -> None:
    rng = np.random.default_rng(0)
    means, weight = rng.normal(size=(2, 3, 4))
    shared, own = np.array([0.2, 0.3, 0.5]), np.array([0.9, 0.1, 0.0])
    shift = lda_bias(means, weight, own) - lda_bias(means, weight, shared)
    np.testing.assert_allclose(shift[:2], np.log([0.9 / 0.2, 0.1 / 0.3]))
    assert np.isfinite(lda_bias(means, weight, own)).all()


def test_ccvr_merges_covariances_exactly_as_its_equation() -> None:
    # sum_k [(n_kc - 1) S_kc + n_kc mu mu^T] / (N_c - 1) - N_c mu_c mu_c^T / (N_c - 1).
    population = people(sizes=(40, 30, 25, 60, 19))
    x, y = rows_of(population)
    slots = run(CCVR(samples=1), population).slots
    for c in range(C):
        total, count = np.zeros((D, D)), 0
        for k in range(K):
            data = population.client(k)
            own = data.features[data.labels == c].astype(np.float64)
            mean = own.mean(axis=0)
            total += (len(own) - 1) * np.cov(own.T) + len(own) * np.outer(mean, mean)
            count += len(own)
        mean = x[y == c].mean(axis=0)
        merged = (total - count * np.outer(mean, mean)) / (count - 1)
        gram = unpack_symmetric(slots["class_grams"][c])
        ours = pooled_covariance(gram, slots["sums"][[c]], slots["counts"][[c]], "total")
        np.testing.assert_allclose(ours, merged, rtol=0, atol=1e-13)
        np.testing.assert_allclose(ours, np.cov(x[y == c].T), rtol=0, atol=1e-13)


def test_ccvr_calibrates_to_the_optimum_on_its_samples() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    x = rng.normal(size=(90, 4)) + np.eye(3, 4)[y]
    weight, bias = softmax_head(x, y, 3)

    def loss(flat: np.ndarray) -> float:
        w, b = flat[:12].reshape(3, 4), flat[12:]
        scores = x @ w.T + b
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return -logs[np.arange(90), y].mean() + CALIBRATION_DECAY / 2 * np.square(flat).sum()

    gradient = approx_fprime(np.append(weight.ravel(), bias), loss, 1e-6)
    assert np.abs(gradient).max() < 1e-5


def test_ccvr_draws_anew_with_another_seed_only() -> None:
    a, again = run(CCVR(seed=1, samples=20), people()), run(CCVR(seed=1, samples=20), people())
    other = run(CCVR(seed=2, samples=20), people())
    assert a.head["weight"].tobytes() == again.head["weight"].tobytes()
    assert a.head["weight"].tobytes() != other.head["weight"].tobytes()


def test_ccvr_of_a_single_example_samples_that_example() -> None:
    population = people(sizes=(1, 1), classes=2)
    population = replace(population, labels=np.array([0, 1], np.int32))
    head = run(CCVR(samples=5), population).head
    x, y = rows_of(population)
    assert (np.argmax(x @ head["weight"].T + head["bias"], axis=1) == y).all()


def test_fedcof_with_single_examples_is_the_sample_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(40, 5)) + 3
    ours = scatter_covariance(x, np.ones(40, np.int64))
    np.testing.assert_allclose(ours, np.cov(x.T), rtol=0, atol=1e-15)


def test_fedcofs_head_as_its_code_has_it() -> None:
    population = people(sizes=(40, 30, 25, 60, 19))
    x, y = rows_of(population)
    gram = len(x) * np.outer(x.mean(axis=0), x.mean(axis=0))
    for c in range(C):
        scatter, mean = 0.3 * np.eye(D), x[y == c].mean(axis=0)
        for k in range(K):
            data = population.client(k)
            own = data.features[data.labels == c].astype(np.float64)
            off = own.mean(axis=0) - mean
            scatter += len(own) * np.outer(off, off) / (K - 1)
        gram += ((y == c).sum() - 1) * scatter
    w = np.linalg.pinv(gram) @ x.T @ np.eye(C)[y]
    head = run(FedCOF(gamma=0.3, temperature=1.0), population).head
    np.testing.assert_allclose(head["weight"], (w / np.linalg.norm(w, axis=0)).T, rtol=1e-5)


def test_fedcof_of_a_class_that_one_client_has_keeps_gamma_alone() -> None:
    sums = np.zeros((3, 1, 2))
    sums[1] = [[4.0, 8.0]]
    counts = np.array([[0], [5], [0]])
    assert not scatter_covariance(sums[:, 0], counts[:, 0]).any()
    want = 4 * 0.2 * np.eye(2) + 5 * np.outer([0.8, 1.6], [0.8, 1.6])
    np.testing.assert_allclose(estimated_gram(sums, counts, 0.2), want, rtol=1e-14)


def test_no_rows_leave_the_head_alone_and_a_deep_head_is_refused() -> None:
    strategy = Fed3R()
    state = strategy.init(HEAD, K)
    assert strategy.solve(state) is state
    with pytest.raises(InputError, match="linear"):
        strategy.init({**HEAD, "hidden.0.weight": np.zeros((2, D), np.float32)}, K)


def test_a_ridge_however_small_is_not_singular() -> None:
    x = np.full((3, 2), 1e5)
    sums = {"gram": np.array([3e10, 3e10, 3e10]), "sums": x[:1] * 3}
    weights, singular = ridge_weights(sums, 1e-2)
    assert not singular
    np.testing.assert_allclose(weights[:, 0], 3e5 / (6e10 + 1e-2), rtol=1e-3)
