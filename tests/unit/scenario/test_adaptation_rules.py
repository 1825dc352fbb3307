"""Every combination with adaptation that cannot work is refused by name, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS
from fedtl.strategies import STRATEGIES

NAMES = [name for name in STRATEGIES if name != "flower"]
NEEDS = {
    "krum": {"malicious": 0},
    "multikrum": {"malicious": 0},
    "bulyan": {"malicious": 0},
    "fltrust": {"root": "a"},
}

BALANCED = {
    "fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "scaffold", "feddyn",
    "fednova", "fedexp", "krum", "multikrum", "bulyan", "median", "trimmed_mean",
    "geometric_median", "fltrust", "norm_clip", "finetune", "knnper",
}  # fmt: skip
"""Strategies whose clients train one head for all."""

AT_HOME = (BALANCED - {"finetune", "knnper"}) | {"mime", "qfedavg", "lbfgs"}
"""Strategies with a trained head and nothing of each client's own."""


def found(**tables: Any) -> list[Any]:
    scenario = Scenario.model_validate({"name": "x", **tables})
    return [p for p in find_conflicts(scenario) if p.where.startswith("adaptation.")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prior", ["balanced_softmax", "logit_adjustment", "bbse"])
def test_priors(name: str, prior: str) -> None:
    strategy = {"name": name, **NEEDS.get(name, {})}
    problems = found(strategy=strategy, adaptation={"prior": prior})
    fits = name in (BALANCED if prior == "balanced_softmax" else AT_HOME)
    assert (not problems) == fits, problems
    for problem in problems:
        assert name in problem.what
        assert problem.got == f'"{prior}"'
    if name in CLOSED_FORMS:
        assert problems


def test_a_strength_without_anything_that_has_one() -> None:
    for prior, fits in (("none", False), ("bbse", False), ("balanced_softmax", True)):
        problems = found(adaptation={"prior": prior, "prior_strength": 0.5})
        assert (not problems) == fits
    assert not found(adaptation={"prior": "bbse"})


def test_matching_needs_pixels() -> None:
    ready = {"backbone": {"name": "identity"}, "data": {"source": "arrays", "path": "x.npz"}}
    [problem] = found(adaptation={"input": "match"}, **ready)
    assert "pixels" in problem.what
    assert not found(adaptation={"input": "match"})
    assert not found(adaptation={"features": "whiten"}, **ready)


@pytest.mark.parametrize("name", NAMES)
def test_adversarial_training_needs_hidden_layers_that_are_shared(name: str) -> None:
    strategy = {"name": name, **NEEDS.get(name, {})}
    [linear] = found(adaptation={"adversarial": 0.1}, strategy=strategy)
    assert "no layer" in linear.what
    mlp = found(adaptation={"adversarial": 0.1}, head={"kind": "mlp"}, strategy=strategy)
    assert (not mlp) == (name in BALANCED)
    assert not mlp or name in mlp[0].what
