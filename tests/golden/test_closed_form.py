"""Published and measured figures of the closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.clients.statistics import pack_symmetric, statistics, unpack_symmetric
from fedtl.evaluation.contributions import squared_error
from fedtl.plans import RoundPlan
from fedtl.strategies.class_means import FedNCM, estimated_gram, scatter_covariance
from fedtl.strategies.closed_form import AFL, Fed3R, OneShot, ridge_weights
from fedtl.types import LocalTraining, Population, Rows


def message(strategy: OneShot, classes: int, width: int):
    """The shapes of one client's answer, and its bytes."""
    head = {
        "weight": np.zeros((classes, width), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    plan = RoundPlan(1, np.arange(1), np.zeros(1, np.uint64), LocalTraining(1, 1, 0.1))
    plan = strategy.plan(strategy.init(head, 1), plan)
    return plan.reply(head), plan.up_bytes(head)


def paper_megabytes(strategy: OneShot, clients: int, classes: int, width: int, means: int) -> float:
    """What FedCOF's Table 3 counts: float32, whole Gram matrices, means of classes that are held.

    Ours are float64 in packed triangles, with the sums of all classes.
    """
    shapes, _ = message(strategy, classes, width)
    per_mean = shapes["sums"][0][1]
    packed = shapes["gram"][0][0] if "gram" in shapes else 0
    whole = 2 * packed - per_mean if packed else 0
    return 4 * (clients * whole + means * per_mean) / 1e6


@pytest.mark.parametrize(
    ("strategy", "clients", "classes", "width", "means", "megabytes"),
    [
        # FedCOF, Table 3: CIFAR-100 on SqueezeNet (printed 110.2 for Fed3R; its formula: 110.7),
        # iNaturalist-120k on MobileNetV2.
        (FedNCM(), 100, 100, 512, 2870, 5.88),
        (Fed3R(bias=False), 100, 100, 512, 2870, 110.7),
        (Fed3R(bias=False), 9275, 1203, 1280, 54590, 61064.0),
    ],
)
def test_the_papers_communication(strategy, clients, classes, width, means, megabytes) -> None:
    got = paper_megabytes(strategy, clients, classes, width, means)
    assert got == pytest.approx(megabytes, rel=6e-4)


def test_our_own_message_is_counted_as_it_is_sent() -> None:
    # Twice the bytes for a number, half the Gram matrix: about the paper's size.
    _, ours = message(Fed3R(), 100, 1280)
    assert ours == 8 * (1281 * 1282 // 2 + 100 * 1281 + 100)
    _, means = message(FedNCM(), 100, 512)
    assert means == 8 * (100 * 512 + 100)


def split(clients: int, seed: int = 0, n: int = 4000, width: int = 16, classes: int = 8):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    centres = rng.normal(size=(classes, width))
    x = (rng.normal(size=(n, width)) + centres[labels] + 0.3).astype(np.float32)
    ends = np.sort(np.concatenate([[0, n], rng.integers(0, n, clients - 1)])).astype(np.int64)
    return Population(
        x,
        labels,
        tuple(map(str, range(classes))),
        Rows(rng.permutation(n), ends),
        Rows(np.empty(0, np.int64), np.zeros(clients + 1, np.int64)),
        tuple(map(str, range(clients))),
        ("",) * clients,
    )


def solution(strategy: OneShot, population: Population) -> np.ndarray:
    """The strategy's head before it is rounded to float32."""
    classes, width = len(population.classes), population.features.shape[1]
    head = {
        "weight": np.zeros((classes, width), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    ids = np.arange(population.num_clients)
    plan = RoundPlan(1, ids, np.zeros(len(ids), np.uint64), LocalTraining(1, 1, 0.1))
    state = strategy.init(head, len(ids))
    state = strategy.absorb(state, statistics(population, head, strategy.plan(state, plan)))
    found = strategy.solved(dict(state.slots))
    return np.c_[found.weight, found.bias]


@pytest.mark.parametrize("clients", [10, 100, 1000])
def test_one_shot_statistics_give_the_pooled_head_for_any_number_of_clients(clients) -> None:
    # Measured 2e-15 to 3e-15 in float64 for 10, 100 and 1,000 clients.
    strategy = Fed3R(normalise=False, temperature=1.0)
    pooled = solution(strategy, split(1))
    x = np.c_[split(1).features.astype(np.float64), np.ones(4000)]
    y = np.eye(8)[split(1).labels]
    exact = np.linalg.solve(x.T @ x + 0.01 * np.eye(17), x.T @ y).T
    assert np.linalg.norm(pooled - exact) < 1e-13 * np.linalg.norm(exact)
    population = split(clients)
    many = solution(strategy, population)
    assert np.linalg.norm(many - pooled) < 1e-13 * np.linalg.norm(pooled)


def recursion(population: Population, gamma: float = 1.0) -> np.ndarray:
    """AFL as its authors wrote it: local ridge heads merged pairwise, then without gammas."""
    merged, gram = np.zeros((16, 8)), np.zeros((16, 16))
    for k in range(population.num_clients):
        data = population.client(k)
        x = data.features.astype(np.float64)
        own = x.T @ x + gamma * np.eye(16)
        weights = np.linalg.solve(own, x.T @ np.eye(8)[data.labels])
        merged = np.linalg.solve(gram + own, gram @ merged + own @ weights)
        gram = gram + own
    clean = gram - population.num_clients * gamma * np.eye(16)
    return np.c_[np.linalg.solve(clean, gram @ merged).T, np.zeros(8)]


@pytest.mark.parametrize("clients", [10, 100, 1000])
def test_summing_keeps_the_digits_that_afls_recursion_loses(clients) -> None:
    # The recursion's error was measured to grow from 3e-13 to 1e-10 over 10, 100, 1,000 clients.
    pooled, population = solution(AFL(), split(1)), split(clients)
    length = np.linalg.norm(pooled)
    ours = np.linalg.norm(solution(AFL(), population) - pooled) / length
    theirs = np.linalg.norm(recursion(population) - pooled) / length
    assert ours < 1e-14
    assert ours < theirs < 1e-9


def test_the_gram_identity() -> None:
    # A = sum_c (N_c - 1) S_c + sum_c N_c (mu_c - mu)(mu_c - mu)^T + N mu mu^T; measured 1.8e-15.
    population = split(1)
    x, y = population.features.astype(np.float64), population.labels
    x, y = x[population.train.index], y[population.train.index]
    head = {"weight": np.zeros((8, 16), np.float32), "bias": np.zeros(8, np.float32)}
    strategy = AFL()
    plan = RoundPlan(1, np.arange(1), np.zeros(1, np.uint64), LocalTraining(1, 1, 0.1))
    plan = strategy.plan(strategy.init(head, 1), plan)
    gram = unpack_symmetric(statistics(population, head, plan).tensors["gram"][0])
    mean = x.mean(axis=0)
    parts = len(x) * np.outer(mean, mean)
    for c in range(8):
        own = x[y == c]
        off = own.mean(axis=0) - mean
        parts += (len(own) - 1) * np.cov(own.T) + len(own) * np.outer(off, off)
    assert np.linalg.norm(gram - parts) < 1e-14 * np.linalg.norm(gram)


def test_fedcof_is_unbiased() -> None:
    # Clients of 3 to 8 rows each from one Gaussian; the mean estimate over 2,000 draws is the
    # covariance to four standard errors in every entry.
    rng = np.random.default_rng(0)
    root = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.2, 0.5]])
    truth = root @ root.T
    sizes = rng.integers(3, 9, 12)
    owner = np.repeat(np.arange(12), sizes)
    found = []
    for _ in range(2000):
        x = rng.normal(size=(len(owner), 3)) @ root.T + 5
        sums = np.stack([x[owner == k].sum(axis=0) for k in range(12)])
        found.append(scatter_covariance(sums, sizes))
    estimates = np.stack(found)
    standard = estimates.std(axis=0) / np.sqrt(2000)
    assert (np.abs(estimates.mean(axis=0) - truth) < 4 * standard).all()
    assert np.linalg.norm(estimates.mean(axis=0) - truth) < 0.03 * np.linalg.norm(truth)


def test_fedcofs_gram_is_the_true_one_without_the_scatter_between_classes() -> None:
    # With one row for each client and no gamma: A - sum_c N_c (mu_c - mu)(mu_c - mu)^T.
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 4)) + 1, np.arange(50) % 3
    sums, counts = np.zeros((50, 3, 4)), np.zeros((50, 3), np.int64)
    sums[np.arange(50), y], counts[np.arange(50), y] = x, 1
    mean = x.mean(axis=0)
    between = sum((y == c).sum() * np.outer(*[x[y == c].mean(axis=0) - mean] * 2) for c in range(3))
    np.testing.assert_allclose(
        estimated_gram(sums, counts, 0.0), x.T @ x - between, rtol=0, atol=1e-12
    )


def test_binary_least_squares_is_parallel_to_lda() -> None:
    from fedtl.strategies.class_means import FedLDA

    population = split(20, classes=2)
    least = solution(Fed3R(ridge=0.0, normalise=False, temperature=1.0), population)[:, :-1]
    lda = solution(FedLDA(shrinkage=0.0), population)[:, :-1]
    a, b = least[1] - least[0], lda[1] - lda[0]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1.0, abs=1e-12)


def test_an_honest_matrix_is_semidefinite_and_three_times_b_is_far_from_it() -> None:
    # Measured: smallest eigenvalue -3e-15 for honest statistics, -210 for B times three.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 8)) + 0.5, np.eye(4)[rng.integers(0, 4, 200)]

    def smallest(b: np.ndarray) -> float:
        return float(np.linalg.eigvalsh(np.block([[x.T @ x, b], [b.T, y.T @ y]])).min())

    assert smallest(x.T @ y) > -1e-11
    assert smallest(3 * x.T @ y) < -50


def test_leaving_out_and_forgetting_equal_training_without_to_the_last_digits() -> None:
    # Measured: 2e-16 for squared errors, 1e-15 for the head.
    population = split(10)
    x = population.features[population.train.index].astype(np.float64)
    y = np.eye(8)[population.labels[population.train.index]]
    bounds = population.train.offsets

    def sums(rows: slice):
        return {
            "gram": pack_symmetric(x[rows].T @ x[rows]),
            "sums": y[rows].T @ x[rows],
            "counts": y[rows].sum(axis=0).astype(np.int64),
        }

    total = sums(slice(None))
    for k in range(10):
        own = sums(slice(bounds[k], bounds[k + 1]))
        left, _ = ridge_weights({name: total[name] - own[name] for name in total}, 0.01)
        keep = np.r_[0 : bounds[k], bounds[k + 1] : len(x)]
        direct = np.linalg.solve(x[keep].T @ x[keep] + 0.01 * np.eye(16), x[keep].T @ y[keep])
        assert np.linalg.norm(left - direct) < 1e-12 * np.linalg.norm(direct)
        rows = slice(bounds[k], bounds[k + 1])
        slow = np.square(x[rows] @ direct - y[rows]).sum()
        assert squared_error(left, own) == pytest.approx(slow, rel=1e-12, abs=1e-12)
