"""The FedAvg family against its equations, written out slowly."""

import numpy as np
import pytest

from fedtl.plans import RoundPlan
from fedtl.strategies import ServerState
from fedtl.strategies.averaging import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from fedtl.types import LocalTraining

HEAD = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}


@pytest.fixture
def three(updates):
    rng = np.random.default_rng(1)
    tensors = {name: t + rng.normal(size=(3, *t.shape)) for name, t in HEAD.items()}
    return updates(tensors, examples=[1, 2, 7])


def slow_delta(head, three, weights):
    return {
        name: sum(p * (t[k].astype(float) - head[name]) for k, p in enumerate(weights))
        for name, t in three.tensors.items()
    }


def test_fedavg_is_the_weighted_mean(three) -> None:
    state = FedAvg().step(FedAvg().init(HEAD, 9), three)
    for name, tensor in three.tensors.items():
        mean = np.average(tensor.astype(float), axis=0, weights=[1, 2, 7])
        np.testing.assert_allclose(state.head[name], mean, rtol=1e-6)
        assert state.head[name].dtype == np.float32


def test_uniform_weights_count_clients_not_examples(three) -> None:
    strategy = FedAvg(weighting="uniform")
    state = strategy.step(strategy.init(HEAD, 9), three)
    np.testing.assert_allclose(state.head["bias"], three.tensors["bias"].mean(0), rtol=1e-6)


def test_one_client_is_taken_over_bit_for_bit(updates) -> None:
    mine = np.random.default_rng(2).normal(size=(1, 2, 3)).astype(np.float32)
    state = FedAvg().step(FedAvg().init(HEAD, 9), updates({"weight": mine, "bias": [[1, 2]]}))
    assert state.head["weight"].tobytes() == mine[0].tobytes()


def test_fedprox_differs_only_in_what_clients_do(three) -> None:
    plan = RoundPlan(1, np.arange(3), np.zeros(3, np.uint64), LocalTraining(1, 2, 0.1))
    assert FedProx(mu=0.3).plan(ServerState(HEAD), plan).training.proximal == 0.3
    assert FedProx(mu=0.0).plan(ServerState(HEAD), plan).training == plan.training
    assert FedAvg().plan(ServerState(HEAD), plan) is plan
    a, b = FedProx(mu=0.3), FedAvg()
    one, other = a.step(a.init(HEAD, 9), three), b.step(b.init(HEAD, 9), three)
    assert all(one.head[n].tobytes() == other.head[n].tobytes() for n in HEAD)


def test_fedavgm_with_beta_zero_is_fedavg_bit_for_bit(three) -> None:
    a, b = FedAvgM(momentum=0.0), FedAvg()
    one, other = a.step(a.init(HEAD, 9), three), b.step(b.init(HEAD, 9), three)
    assert all(one.head[n].tobytes() == other.head[n].tobytes() for n in HEAD)


def test_fedavgm_follows_its_recursion(three) -> None:
    strategy = FedAvgM(momentum=0.9, server_learning_rate=0.5)
    state = strategy.init(HEAD, 9)
    head, velocity = dict(HEAD), {name: np.zeros(t.shape) for name, t in HEAD.items()}
    for _ in range(3):
        state = strategy.step(state, three)
        delta = slow_delta(head, three, [0.1, 0.2, 0.7])
        velocity = {n: 0.9 * velocity[n] + delta[n] for n in head}
        head = {n: (head[n] + 0.5 * velocity[n]).astype(np.float32) for n in head}
    for name in head:
        np.testing.assert_allclose(state.head[name], head[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        (FedAdagrad, lambda v, s: v + s),
        (FedAdam, lambda v, s: 0.99 * v + 0.01 * s),
        (FedYogi, lambda v, s: v - 0.01 * s * np.sign(v - s)),
    ],
)
def test_adaptive_methods_follow_their_equations(kind, accumulate, three) -> None:
    strategy = kind(server_learning_rate=0.1)
    state = strategy.init(HEAD, 9)
    head = dict(HEAD)
    m = {n: np.zeros(t.shape) for n, t in HEAD.items()}
    v = {n: np.zeros(t.shape) for n, t in HEAD.items()}
    for _ in range(3):
        state = strategy.step(state, three)
        delta = slow_delta(head, three, [0.1, 0.2, 0.7])
        m = {n: 0.9 * m[n] + 0.1 * delta[n] for n in head}
        v = {n: accumulate(v[n], delta[n] ** 2) for n in head}
        head = {n: (head[n] + 0.1 * m[n] / (np.sqrt(v[n]) + 1e-3)).astype(np.float32) for n in head}
    for name in head:
        np.testing.assert_allclose(state.head[name], head[name], rtol=1e-5)
