"""FLoRA: what the server adds is the average of the clients' full updates."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.plans import RoundPlan
from fedtl.strategies.averaging import FedAvg, FedProx
from fedtl.strategies.stacking import Stacking
from fedtl.types import ClientUpdates, LocalTraining

A, B, SUM = (f"tail.x.parametrizations.weight.0.{own}" for own in ("A", "B", "merged"))
SCALE = 2.0


def head() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        A: rng.normal(size=(3, 20)).astype(np.float32),
        B: np.zeros((10, 3), np.float32),
        SUM: rng.normal(size=(10, 20)).astype(np.float32),
        "weight": rng.normal(size=(2, 10)).astype(np.float32),
        "bias": np.zeros(2, np.float32),
    }


def answers(start: dict[str, np.ndarray], round: int = 1) -> ClientUpdates:
    rng = np.random.default_rng(round)
    tensors = {
        name: (own + rng.normal(size=(4, *own.shape))).astype(np.float32)
        for name, own in start.items()
        if name != SUM
    }
    counts = np.array([10, 20, 30, 40])
    return ClientUpdates(round, np.arange(4), tensors, counts, np.zeros(4))


def weight(start: dict[str, np.ndarray]) -> np.ndarray:
    """What stands in place of W - W0, in float64."""
    factors = (start[name].astype(np.float64) for name in (B, A))
    return start[SUM] + SCALE * np.matmul(*factors)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_two_rounds_are_averages_of_full_updates(rate: float) -> None:
    strategy = Stacking(FedAvg(server_learning_rate=rate), SCALE, seed=1)
    state = strategy.init(head(), 4)
    for round in (1, 2):
        before, sent = weight(state.head), answers(state.head, round)
        each = [
            weight({**state.head, **{n: t[k] for n, t in sent.tensors.items()}}) for k in range(4)
        ]
        wanted = before + rate * sum(
            p * (own - before) for p, own in zip((0.1, 0.2, 0.3, 0.4), each, strict=True)
        )
        start, state = state, strategy.step(state, sent)
        assert not state.head[B].any()
        np.testing.assert_allclose(weight(state.head), wanted, rtol=0, atol=1e-6)
        plain = {name: start.head[name] for name in ("weight", "bias")}
        alone = FedAvg(server_learning_rate=rate)
        other = alone.step(alone.init(plain, 4), sent)
        assert all(np.array_equal(state.head[name], other.head[name]) for name in plain)
        assert list(state.head) == list(start.head)
        assert not np.array_equal(state.head[A], start.head[A])


def test_a_single_client_gets_its_own_network_back() -> None:
    strategy = Stacking(FedAvg(), SCALE, seed=1)
    state = strategy.init(head(), 1)
    sent = answers(state.head)
    one = ClientUpdates(
        1, sent.clients[:1], {n: t[:1] for n, t in sent.tensors.items()}, sent.num_examples[:1],
        sent.loss[:1],
    )  # fmt: skip
    own = weight({**state.head, **{n: t[0] for n, t in sent.tensors.items()}})
    np.testing.assert_allclose(weight(strategy.step(state, one).head), own, atol=1e-6)


def test_the_sum_goes_down_and_never_up() -> None:
    training = LocalTraining(1, 8, 0.1)
    plan = RoundPlan(1, np.arange(2), np.zeros(2, np.uint64), training)
    strategy = Stacking(FedProx(mu=0.5), SCALE, seed=1)
    plan = strategy.plan(strategy.init(head(), 2), plan)
    assert plan.training.proximal == 0.5
    assert set(plan.reply(head())) == {A, B, "weight", "bias"}
    factors = 4 * (3 * (20 + 10) + 2 * 10 + 2)  # r (in + out) and the head, in float32
    assert plan.up_bytes(head()) == factors
    assert plan.down_bytes(head()) == factors + 4 * 10 * 20
