"""Every strategy goes through one list of checks."""

import numpy as np
import pytest

from fedtl.scenario.load import strategy_names
from fedtl.scenario.schema import Scenario
from fedtl.strategies import STRATEGIES, make_strategy

HEAD = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}


@pytest.fixture(params=list(STRATEGIES))
def strategy(request):
    return STRATEGIES[request.param]()


def cohort(updates, seed: int = 0, size: int = 6):
    rng = np.random.default_rng(seed)
    tensors = {name: t + rng.normal(size=(size, *t.shape)) for name, t in HEAD.items()}
    return updates(tensors, examples=rng.integers(1, 99, size).tolist())


def test_step_is_pure(strategy, updates) -> None:
    given = cohort(updates)
    before = strategy.init(HEAD, 9)
    kept = {name: tensor.copy() for name, tensor in before.head.items()}
    first, again = strategy.step(before, given), strategy.step(before, given)
    for name in HEAD:
        assert first.head[name].tobytes() == again.head[name].tobytes()
        assert before.head[name].tobytes() == kept[name].tobytes()


def test_heads_stay_float32_and_keep_their_shapes(strategy, updates) -> None:
    state = strategy.step(strategy.init(HEAD, 9), cohort(updates))
    assert {n: (t.shape, t.dtype) for n, t in state.head.items()} == {
        n: (t.shape, np.dtype(np.float32)) for n, t in HEAD.items()
    }


def test_clients_that_do_not_move_leave_the_head_where_it_is(strategy, updates) -> None:
    still = updates({name: np.stack([t, t, t]) for name, t in HEAD.items()})
    state = strategy.step(strategy.init(HEAD, 9), still)
    assert all(state.head[n].tobytes() == HEAD[n].tobytes() for n in HEAD)


def test_identical_clients_equal_one_of_them(strategy, updates) -> None:
    one = cohort(updates, size=1)
    many = updates({n: np.repeat(t, 5, axis=0) for n, t in one.tensors.items()})
    a = strategy.step(strategy.init(HEAD, 9), one)
    b = strategy.step(strategy.init(HEAD, 9), many)
    for name in HEAD:
        np.testing.assert_allclose(a.head[name], b.head[name], rtol=1e-6, atol=1e-7)


def test_only_the_weights_of_examples_matter_not_their_scale(strategy, updates) -> None:
    tensors = cohort(updates, size=2).tensors
    a = strategy.step(strategy.init(HEAD, 9), updates(tensors, examples=[1, 3]))
    b = strategy.step(strategy.init(HEAD, 9), updates(tensors, examples=[10, 30]))
    for name in HEAD:
        np.testing.assert_allclose(a.head[name], b.head[name], rtol=1e-6)


def test_state_can_be_saved_in_mid_run(strategy, updates) -> None:
    from safetensors.numpy import load, save

    from fedtl.strategies import ServerState

    state = strategy.step(strategy.init(HEAD, 9), cohort(updates, 1))
    slots = load(save(dict(state.slots))) if state.slots else {}
    restored = ServerState(load(save(dict(state.head))), slots)
    a, b = strategy.step(state, cohort(updates, 2)), strategy.step(restored, cohort(updates, 2))
    assert all(a.head[n].tobytes() == b.head[n].tobytes() for n in HEAD)


def test_all_share_fedavgs_fixed_points(strategy, updates) -> None:
    # Clients that move and cancel: the mean update is zero, so nobody's server may move either.
    step = np.random.default_rng(3).normal(size=(2, 3)).astype(np.float32)
    there = {"weight": np.stack([HEAD["weight"] + step, HEAD["weight"] - step])}
    balanced = updates({**there, "bias": np.zeros((2, 2))}, examples=[5, 5])
    state = strategy.init(HEAD, 9)
    for _ in range(3):
        state = strategy.step(state, balanced)
    np.testing.assert_allclose(state.head["weight"], HEAD["weight"], atol=1e-6)


REQUIRED = {"fltrust": {"root": 0}, "flower": {"class_": "FedAvg"}}
"""What must be said besides the name."""


def test_every_name_a_scenario_knows_can_be_built() -> None:
    assert set(strategy_names()) == set(STRATEGIES)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_defaults_of_schema_and_class_agree(name: str) -> None:
    written = {"fltrust": {"root": "a"}, "flower": {"class": "FedAvg"}}.get(name, {})
    scenario = Scenario.model_validate({"name": "x", "strategy": {"name": name, **written}})
    assert make_strategy(scenario, ("a",)) == STRATEGIES[name](**REQUIRED.get(name, {}))
