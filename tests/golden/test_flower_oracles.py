"""Flower's FedAvg family as an oracle for ours, round after round on the same answers.

Both start every accumulator at zero. What differs by definition:

- FedAdam: Flower multiplies the rate by Adam's bias correction sqrt(1 - b2^(t+1)) / (1 - b1^(t+1))
  (one round ahead of Kingma and Ba's t); ours, as in Reddi et al., corrects nothing. Given that
  product as its rate in each round, ours is Flower's.
- FedAdagrad: Flower fixes beta_1 = 0; ours lets one choose.
- Sums: Flower's in float32 where the heads are, ours in float64, rounded once a round.

Krum, median, trimmed mean and Bulyan have their oracles with the robust rules.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.plans import RoundPlan
from fedtl.strategies import ServerState, Strategy
from fedtl.strategies.averaging import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from fedtl.strategies.flower_adapter import FlowerStrategy
from fedtl.types import ClientUpdates, LocalTraining

ROUNDS, CLIENTS = 6, 9
HEAD = {
    name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for name, shape in {"weight": (5, 8), "bias": (5,)}.items()
}
PLAN = RoundPlan(
    1, np.arange(CLIENTS, dtype=np.int64), np.zeros(CLIENTS, np.uint64), LocalTraining(1, 8, 0.1)
)


def adams_rate(eta: float, round: int) -> float:
    """Flower's rate in a round."""
    return eta * np.sqrt(1 - 0.99 ** (round + 1)) / (1 - 0.9 ** (round + 1))


PAIRS = {
    "FedAvg": ({}, lambda t: FedAvg()),
    "FedProx": ({"proximal_mu": 0.2}, lambda t: FedProx(mu=0.2)),
    "FedAvgM": (
        {"server_momentum": 0.9, "server_learning_rate": 0.5},
        lambda t: FedAvgM(momentum=0.9, server_learning_rate=0.5),
    ),
    "FedAdagrad": ({"eta": 0.1}, lambda t: FedAdagrad(server_learning_rate=0.1, beta_1=0.0)),
    "FedAdam": ({"eta": 0.1}, lambda t: FedAdam(server_learning_rate=adams_rate(0.1, t))),
    "FedYogi": ({"eta": 0.1}, lambda t: FedYogi(server_learning_rate=0.1)),
}


def answers(state: ServerState, round: int) -> ClientUpdates:
    """Heads some way from the round's, as far as clients that train go."""
    rng = np.random.default_rng(round)
    tensors = {
        name: (value + 0.5 + rng.normal(size=(CLIENTS, *value.shape))).astype(np.float32)
        for name, value in state.head.items()
    }
    examples = rng.integers(1, 500, CLIENTS)
    return ClientUpdates(round, PLAN.clients, tensors, examples, np.ones(CLIENTS))


def advance(strategy: Strategy, state: ServerState, round: int, given: ClientUpdates):
    planned = strategy.plan(state, replace(PLAN, round=round))
    return strategy.step(state, replace(given, training=planned.training)), planned


@pytest.mark.parametrize("name", PAIRS)
def test_ours_agrees_with_flowers(name: str) -> None:
    parameters, own = PAIRS[name]
    flower = FlowerStrategy(name, parameters)
    ours, theirs = own(1).init(HEAD, CLIENTS), flower.init(HEAD, CLIENTS)
    for round in range(1, ROUNDS + 1):
        given = answers(ours, round)
        ours, our_plan = advance(own(round), ours, round, given)
        theirs, their_plan = advance(flower, theirs, round, given)
        assert our_plan.training == their_plan.training
        for n, tensor in HEAD.items():
            assert np.abs(ours.head[n] - tensor).max() > 0.01 * round
            # Values below 8; each round adds a few roundings of float32 to either.
            np.testing.assert_allclose(ours.head[n], theirs.head[n], rtol=0, atol=round * 2**-20)


def test_without_flowers_bias_correction_adam_is_another_method() -> None:
    # The oracle above is sharp enough to see the correction that Flower applies.
    flower, plain = FlowerStrategy("FedAdam", {"eta": 0.1}), FedAdam(server_learning_rate=0.1)
    state = plain.init(HEAD, CLIENTS)
    given = answers(state, 1)
    ours, _ = advance(plain, state, 1, given)
    theirs, _ = advance(flower, flower.init(HEAD, CLIENTS), 1, given)
    moved = [after.head["weight"] - HEAD["weight"] for after in (ours, theirs)]
    factor = adams_rate(1.0, 1)  # sqrt(1 - 0.99^2) / (1 - 0.9^2) = 0.7424
    assert factor == pytest.approx(0.7424, abs=1e-4)
    np.testing.assert_allclose(moved[1], factor * moved[0], rtol=1e-3, atol=1e-6)
