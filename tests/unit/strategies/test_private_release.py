"""A closed form from one noised release, against the plain one and against plain algebra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.clients.statistics import pack_symmetric, statistics, unpack_symmetric
from fedtl.plans import RoundPlan
from fedtl.privacy.noise import seeded
from fedtl.privacy.statistics import BIAS, encoded_length, noised
from fedtl.strategies import private_release
from fedtl.strategies.class_means import FedLDA, FedNCM
from fedtl.strategies.closed_form import ABSENT, AFL, Fed3R, OneShot
from fedtl.strategies.private import SecureRing
from fedtl.strategies.private_release import PrivateRelease, repaired
from fedtl.types import LocalTraining, Population, Rows

C, D = 4, 6
INNER = [
    Fed3R(),
    Fed3R(bias=False, normalise=False, temperature=1.0),
    Fed3R(random_features=11, scale=0.4),
    AFL(),
    FedNCM(),
    FedLDA(),
    FedLDA(covariance="total"),
]
LARGE = 1e3


def people(
    sizes: tuple[int, ...] = (40, 30, 25, 60, 45), seed: int = 0, width: int = D, apart: float = 2.0
) -> Population:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    labels = rng.integers(0, C, n).astype(np.int32)
    features = rng.normal(size=(n, width)) + apart * np.eye(C, width)[labels]
    none = Rows(np.empty(0, np.int64), np.zeros(len(sizes) + 1, np.int64))
    rows = Rows(np.arange(n), np.cumsum([0, *sizes]))
    names = tuple(f"c{i}" for i in range(len(sizes)))
    return Population(
        features.astype(np.float32), labels, tuple("abcd"), rows, none, names, ("",) * len(sizes)
    )


def plan_for(strategy, state, population) -> RoundPlan:
    ids = np.arange(population.num_clients)
    keys = ids.astype(np.uint64)
    return replace(
        strategy.plan(state, RoundPlan(1, ids, keys, LocalTraining(1, 1, 0.1))), noise_keys=keys
    )


def summed(strategy, population, threads: int = 1):
    width = population.features.shape[1]
    head = {"weight": np.zeros((C, width), np.float32), "bias": np.zeros(C, np.float32)}
    state = strategy.init(head, population.num_clients)
    plan = plan_for(strategy, state, population)
    return strategy.absorb(state, statistics(population, state.head, plan, threads=threads))


def solved(strategy, population):
    return strategy.solve(summed(strategy, population))


def release(inner: OneShot, multiplier: float = 0.0, clip: float = LARGE, unit="example", key=1):
    return PrivateRelease(inner, unit, clip, multiplier, noise=seeded(key))


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_without_noise_and_with_a_large_clip_it_is_the_plain_closed_form(inner, unit) -> None:
    population = people()
    if unit == "client":  # rows of at most sqrt(D), so that none is shortened
        population = replace(population, features=population.features / 4)
    plain = solved(inner, population)
    state = solved(release(inner, unit=unit, clip=1e6 if unit == "client" else LARGE), population)
    assert (state.slots["counts"] == plain.slots["counts"]).all()
    expected, found = inner.solved(dict(plain.slots)), inner.solved(dict(state.slots))
    assert found.weight == pytest.approx(expected.weight, rel=1e-9, abs=1e-10)
    assert found.bias == pytest.approx(expected.bias, rel=1e-9, abs=1e-10)
    assert state.head["weight"] == pytest.approx(plain.head["weight"], rel=1e-5, abs=1e-6)


def test_shortened_rows_give_the_ridge_of_those_rows() -> None:
    """The oracle fits the shortened rows themselves, with the ridge in the rows' own unit."""
    population, clip, ridge = people(), 1.5, 0.3
    state = solved(
        release(Fed3R(ridge=ridge, normalise=False, temperature=1.0), 0, clip), population
    )
    x, y = population.features.astype(np.float64), np.eye(C)[population.labels]
    scales = np.array([(1 - BIAS**2) ** 0.5 / clip] * D + [BIAS])
    z = np.hstack([x, np.ones((len(x), 1))]) * scales
    lengths = np.linalg.norm(z, axis=1)
    assert (lengths > 1).sum() > 50
    z /= np.maximum(1, lengths)[:, None]
    weights = np.linalg.solve(z.T @ z + ridge * np.diag(scales**2), z.T @ y) * scales[:, None]
    assert state.head["weight"] == pytest.approx(weights[:-1].T, rel=1e-5, abs=1e-6)
    assert state.head["bias"] == pytest.approx(weights[-1], rel=1e-5, abs=1e-6)


def test_a_head_fitted_to_short_rows_predicts_for_the_long_ones() -> None:
    """A shortened row has the scores of the row itself times a positive number."""
    population = people((400, 400))
    stretch = np.random.default_rng(1).uniform(1, 6, (800, 1))
    x = (population.features * stretch).astype(np.float32).astype(np.float64)
    population = replace(population, features=x.astype(np.float32))
    clip = 2.0
    head = solved(release(Fed3R(), clip=clip), population).head
    predicted = (x @ head["weight"].T + head["bias"]).argmax(axis=1)
    z = np.hstack([x * (0.9**0.5 / clip), np.full((800, 1), BIAS)])
    z /= np.maximum(1, np.linalg.norm(z, axis=1))[:, None]
    own = np.hstack([head["weight"] * clip / 0.9**0.5, head["bias"][:, None] / BIAS])
    assert (predicted == (z @ own.T).argmax(axis=1)).all()
    plain = solved(Fed3R(), population).head
    fair = (x @ plain["weight"].T + plain["bias"]).argmax(axis=1) == population.labels
    assert (predicted == population.labels).mean() > fair.mean() - 0.02


@pytest.mark.parametrize("inner", INNER, ids=str)
def test_the_same_rows_dealt_otherwise_give_the_same_head(inner) -> None:
    population = people()
    ends = np.array([0, 3, 150, 151, 200])
    order = np.random.default_rng(2).permutation(200)
    dealt = replace(
        people((3, 147, 1, 49)),
        features=population.features,
        labels=population.labels,
        train=Rows(order, ends),
    )
    first = solved(release(inner, 1.0, 4.0), population).head
    second = solved(release(inner, 1.0, 4.0), dealt).head
    for name, tensor in first.items():
        assert second[name] == pytest.approx(tensor, rel=1e-5, abs=1e-6), name
    assert not np.allclose(
        first["weight"], solved(release(inner, 1.0, 4.0, key=2), dealt).head["weight"]
    )


def test_bits_depend_on_neither_threads_nor_a_second_try() -> None:
    population = people((900, 3), width=40)
    strategy = release(Fed3R(), 2.0, 4.0)
    first = strategy.solve(summed(strategy, population))
    again = release(Fed3R(), 2.0, 4.0)  # as after a kill: same sums, same stream
    second = again.solve(summed(again, population, threads=3))
    assert all((second.head[name] == tensor).all() for name, tensor in first.head.items())
    assert all((second.slots[name] == tensor).all() for name, tensor in first.slots.items())


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("inner", [Fed3R(), AFL(), FedNCM(), FedLDA()], ids=str)
def test_what_is_kept_is_what_was_released(inner, unit, monkeypatch) -> None:
    """No slot holds exact sums once the head is solved; and sigma is multiplier * sensitivity."""
    monkeypatch.setattr(private_release, "repaired", lambda matrix, radius: matrix)
    population, clip = people(), 5.0
    strategy = release(inner, 0.5, clip, unit)
    state = summed(strategy, population)
    bound = (
        clip if unit == "client" else {Fed3R: 2, AFL: 3, FedNCM: 2, FedLDA: 3}[type(inner)] ** 0.5
    )
    drawn = noised(state.slots, inner.asked(), 0.5 * bound, seeded(1))
    kept = strategy.solve(state).slots
    unit_length = clip if unit == "example" else D**0.5
    scales = np.full(D, 1 / unit_length)
    if inner.asked().bias:
        scales = np.array([0.9**0.5 / unit_length] * D + [BIAS])
    assert kept["sums"] * scales == pytest.approx(drawn["sums"], rel=1e-9, abs=1e-9)
    if inner.asked().gram:
        found = pack_symmetric(unpack_symmetric(kept["gram"]) * np.outer(scales, scales))
        assert found == pytest.approx(drawn["gram"], rel=1e-8, abs=1e-8)
    whole = drawn["sums"][:, -1] / BIAS if inner.asked().bias else drawn["counts"]
    assert (kept["counts"] == np.maximum(int(inner.asked().bias), np.ceil(whole))).all()
    assert kept["counts"].dtype == np.int64
    assert not hasattr(strategy, "keep_statistics")


@pytest.mark.parametrize("inner", [Fed3R(), FedNCM()], ids=str)
def test_no_client_counts_for_more_than_the_clip(inner) -> None:
    population = people((200, 10))
    strategy = release(inner, 0.0, 30.0, "client")
    state = strategy.init(
        {"weight": np.zeros((C, D), np.float32), "bias": np.zeros(C, np.float32)}, 2
    )
    found = statistics(population, state.head, plan_for(strategy, state, population))
    own = [{n: t[i] for n, t in found.tensors.items()} for i in range(2)]
    lengths = [encoded_length(one, inner.asked()) for one in own]
    assert lengths[0] > 30 > lengths[1]
    total = strategy.absorb(state, found).slots["sums"]
    assert total == pytest.approx(own[0]["sums"] * 30 / lengths[0] + own[1]["sums"], rel=1e-12)


def test_a_class_that_noise_takes_to_nothing_is_absent() -> None:
    population = people()
    strategy = release(FedNCM(), 1.0, 4.0)
    state = summed(strategy, population)
    state.slots["counts"][2] = -50.0  # as noise of a small epsilon may have it
    head = strategy.solve(state)
    assert head.slots["counts"][2] == 0
    assert head.head["bias"][2] == np.float32(ABSENT)


def test_a_class_whose_count_is_only_a_biass_is_not_lost_to_noise() -> None:
    population = people()
    strategy = release(Fed3R(), 1.0, 4.0)
    state = summed(strategy, population)
    state.slots["sums"][2, -1] = -50.0  # rows far beyond the clip have next to no bias
    head = strategy.solve(state)
    assert head.slots["counts"][2] == 1
    assert head.head["bias"][2] > ABSENT


def test_there_is_one_release() -> None:
    population, strategy = people(), release(Fed3R(), 1.0, 4.0)
    state = strategy.init(
        {"weight": np.zeros((C, D), np.float32), "bias": np.zeros(C, np.float32)}, 5
    )
    assert strategy.solve(state) is state
    assert not strategy.finished(state)  # of nobody: none
    plan = plan_for(strategy, state, population)
    early = statistics(population, state.head, plan.part(np.array([0, 1])))
    after = strategy.solve(strategy.absorb(state, early))
    assert strategy.finished(after)
    assert after.slots["reported"].sum() == 2
    assert not len(plan_for(strategy, after, population).clients)  # who is late stays out
    assert strategy.solve(after) is after  # no second noise on the same sums
    with pytest.raises(AssertionError, match="noise is given"):
        replace(strategy, noise=None).solve(strategy.absorb(state, early))


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("inner", [Fed3R(), AFL(), FedNCM()], ids=str)
def test_in_a_secure_sum_the_clients_add_the_noise(inner, unit, monkeypatch) -> None:
    radii = []
    monkeypatch.setattr(
        private_release, "repaired", lambda matrix, radius: radii.append(radius) or matrix
    )
    population, ring = people(), SecureRing(8.0, 0.6, False)
    strategy = replace(release(inner, 1.0, 5.0, unit), ring=ring, noise=None)
    state = summed(strategy, population)
    plan = plan_for(strategy, state, population)
    assert plan.protection is not None
    assert plan.protection.noise == pytest.approx(strategy.deviation / 3**0.5)  # 3 of 5 are enough
    assert plan.protection.clip == (5.0 if unit == "client" else 0.0)
    exact = summed(release(inner, 0.0, 5.0, unit), population)
    each = [seeded(k) for k in range(5)]
    drawn = [noised(exact.slots, inner.asked(), plan.protection.noise, noise) for noise in each]
    total = sum(one["sums"] for one in drawn) - 4 * exact.slots["sums"]
    assert state.slots["sums"] == pytest.approx(total, rel=1e-9, abs=1e-9)
    after = strategy.solve(state)
    assert strategy.finished(after)
    if inner.asked().gram:  # all five survived: more noise than was promised, and a larger ridge
        width = D + inner.asked().bias
        assert radii == [pytest.approx(strategy.deviation * (5 / 3 * 2 * width) ** 0.5)]


def test_the_repair_is_the_nearest_positive_matrix_and_its_ridge() -> None:
    rng = np.random.default_rng(3)
    vectors, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    matrix = vectors @ np.diag([4.0, 1.0, -0.5, -2.0, 0.0]) @ vectors.T
    expected = vectors @ np.diag([4.0, 1.0, 0.0, 0.0, 0.0]) @ vectors.T + 0.25 * np.eye(5)
    found = repaired((matrix + matrix.T) / 2, 0.25)
    assert found == pytest.approx(expected, abs=1e-12)
    assert (found == found.T).all()


@pytest.mark.parametrize("kind", ["within", "total"])
def test_the_repaired_covariance_is_positive_although_means_are_noise(kind) -> None:
    population = people((60, 60), width=30)
    strategy = release(FedLDA(covariance=kind, shrinkage=0.0), 20.0, 6.0)
    slots = dict(strategy.solve(summed(strategy, population)).slots)
    assert slots["counts"].any()
    covariance = private_release.pooled_covariance(
        unpack_symmetric(slots["gram"]), slots["sums"], slots["counts"], kind
    )
    assert np.linalg.eigvalsh(covariance).min() > 0


def easy(seed: int) -> tuple[Population, np.ndarray, np.ndarray]:
    """20,000 rows of 64 features in 10 classes, and 4,000 to judge by."""
    rng = np.random.default_rng(seed)
    means, n = 0.5 * rng.normal(size=(10, 64)), 24_000
    labels = rng.integers(0, 10, n).astype(np.int32)
    x = (means[labels] + rng.normal(size=(n, 64))).astype(np.float32)
    base = people((10_000, 10_000))
    population = replace(base, features=x, labels=labels, classes=tuple("abcdefghij"))
    return population, x[20_000:], labels[20_000:]


def test_the_repair_restores_accuracy_at_a_small_epsilon(monkeypatch) -> None:
    """The design's study (N = 20,000, d = 64; plain 0.970, epsilon 0.1: 0.920 with the repair,
    0.191 without) does not give its data; classes at this distance have a plain head of 0.970."""
    population, x, labels = easy(0)
    head = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
    multiplier = 30.75  # epsilon 0.1 at delta 1e-5: analytic Gaussian mechanism
    clip = 9.5  # about the rows' median length
    inner = Fed3R(normalise=False, temperature=1.0)

    def accuracy(strategy: OneShot, keys: range) -> float:
        state = strategy.init(head, 2)
        found = statistics(population, state.head, plan_for(strategy, state, population))
        state = strategy.absorb(state, found)
        right = []
        for key in keys:
            own = strategy.with_noise(seeded(key)) if keys.stop > 1 else strategy
            after = own.solve(state).head
            right.append(((x @ after["weight"].T + after["bias"]).argmax(axis=1) == labels).mean())
        return float(np.mean(right))

    plain = accuracy(inner, range(1))
    with_repair = accuracy(PrivateRelease(inner, "example", clip, multiplier), range(3))
    monkeypatch.setattr(private_release, "repaired", lambda matrix, radius: matrix)
    without = accuracy(PrivateRelease(inner, "example", clip, multiplier), range(3))
    assert plain == pytest.approx(0.970, abs=0.01)
    assert with_repair > 0.85
    assert without < 0.4
