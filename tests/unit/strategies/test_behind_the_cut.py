"""Every strategy with a network behind the cut: it trains it, or a rule refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.clients.personal_store import PersonalStore
from fedtl.engines import LocalEngine
from fedtl.planning import plan_round
from fedtl.scenario import schema
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.transfer_rules import PLAIN
from fedtl.strategies import STRATEGIES, make_strategy
from fedtl.strategies.personal import degenerate
from fedtl.transfer.tails import first_head, open_network
from fedtl.types import TAIL, Population, Rows

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"malicious": 0} for name in ("krum", "multikrum", "bulyan")},
    "fltrust": {"root": "a"},
    "trimmed_mean": {"trim": 0.34},
}
RUN = sorted(set(STRATEGIES) - set(PLAIN) - {"flower"})


def scenario_of(name: str) -> schema.Scenario:
    content = {
        "name": "cut",
        "rounds": 2,
        "data": {"source": "folder", "path": "pictures"},
        "clients": {"num": 3},
        "backbone": {"name": "squeezenet1_1", "weights": "none", "image_size": 32},
        "transfer": {"mode": "last_blocks", "cut": 1},
        "training": {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.01},
        "strategy": {"name": name, **OPTIONS.get(name, {})},
    }
    return schema.Scenario.model_validate(content)


@pytest.fixture(scope="module")
def population() -> Population:
    scenario = scenario_of("fedavg")
    tail = open_network(scenario.backbone, scenario.transfer, scenario.seed)[1]
    assert tail is not None
    stream, ends = np.random.default_rng(0), np.arange(4) * 8
    features = stream.uniform(0, 1, (24, int(np.prod(tail.shape)))).astype(np.float32)
    labels = stream.integers(0, 3, 24).astype(np.int32)
    rows = Rows(np.arange(24), ends)
    return Population(features, labels, ("x", "y", "z"), rows, rows, tuple("abc"), ("",) * 3, tail)


@pytest.mark.parametrize("name", RUN)
def test_it_trains_what_is_behind_the_cut(
    name: str, population: Population, tmp_path: Path
) -> None:
    scenario = scenario_of(name)
    assert find_conflicts(scenario) == []
    strategy = make_strategy(scenario, population.names)
    engine = LocalEngine(population, 1, store=PersonalStore(tmp_path))
    head = first_head(scenario, population.tail, population.width, 3)
    state = strategy.init(head, 3)
    for round in (1, 2):
        plan = plan_round(scenario, 3, strategy, state, round)
        (updates,) = engine.run_clients(plan, state.head)
        assert set(updates.tensors) == set(plan.reply(state.head))
        state = strategy.step(state, replace(updates, training=plan.training))
    local = plan.personal.local if plan.personal is not None else ()
    for tensor, own in state.result.items():
        assert np.isfinite(own).all()
        if tensor.startswith(TAIL):
            assert np.array_equal(own, head[tensor]) == (tensor in local), tensor


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_needs_plain_features_is_refused(name: str) -> None:
    assert "strategy.name" in {problem.where for problem in find_conflicts(scenario_of(name))}


def test_personal_layers_mean_something_behind_a_cut() -> None:
    for name in ("fedper", "fedrep", "lgfedavg", "fedbabu"):
        assert degenerate(name, "linear") is not None
        assert degenerate(name, "linear", "last_blocks") is None
