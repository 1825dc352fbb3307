"""A closed-form start loses nothing of either strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtl.clients.batched import classify
from fedtl.clients.statistics import statistics
from fedtl.plans import RoundPlan
from fedtl.scenario.schema import Head as Section
from fedtl.strategies import STRATEGIES
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState
from fedtl.strategies.closed_form import ABSENT, Fed3R
from fedtl.strategies.warm_start import WarmStart, start_of, started_from
from fedtl.transfer.heads import initial_head
from fedtl.types import ClientUpdates, Float32, Int64, LocalTraining, Population, Rows

HEAD = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
REQUIRED = {"fltrust": {"root": 0}, "flower": {"class_": "FedAdam"}}
LATER = [name for name, build in STRATEGIES.items() if not hasattr(build, "absorb")]


@pytest.mark.parametrize("name", LATER)
def test_the_slots_of_both_are_kept_apart(name: str) -> None:
    then = STRATEGIES[name](**REQUIRED.get(name, {}))
    warm = WarmStart(Fed3R(), then)
    state = warm.init(HEAD, 5)
    for mine, theirs in (
        (warm._sums(state).slots, Fed3R().init(HEAD, 5).slots),
        (warm._own(state).slots, then.init(HEAD, 5).slots),
    ):
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}


SIZES = (9, 1, 14, 6)
"""Examples of the clients; the last one does not answer in round 1."""


def people() -> Population:
    """Four clients with classes 0, 1 and 3, far from centred; class 2 is the fourth one's alone."""
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 3], sum(SIZES)).astype(np.int32)
    labels[-SIZES[-1] :] = 2
    features = (rng.normal(size=(len(labels), 5)) * 3 + labels[:, None] + 4).astype(np.float32)
    rows = Rows(np.arange(len(labels)), np.cumsum([0, *SIZES]))
    names = tuple(f"c{i}" for i in range(len(SIZES)))
    return Population(features, labels, ("a", "b", "c", "d"), rows, rows, names, ("",) * len(names))


def begun(section: Section, population: Population) -> tuple[ServerState, ServerState]:
    """The state before and after round 1."""
    head = initial_head(section, 5, 4, seed=1)
    strategy = started_from(section, FedAvg())
    state = strategy.init(head, len(SIZES))
    asked = np.arange(len(SIZES) - 1)
    training = LocalTraining(1, 8, 0.1)
    plan = strategy.plan(state, RoundPlan(1, asked, np.zeros(len(asked), np.uint64), training))
    assert plan.task == "statistics"
    sent = {"counts", "sums"} | ({"gram"} if section.initial == "fed3r" else set())
    assert set(plan.plain_reply(head)) == sent
    return state, strategy.step(state, statistics(population, head, plan))


def means_of(population: Population) -> tuple[Any, Int64]:
    """Of each class that somebody asked has, by a loop over all their rows."""
    held = np.array([0, 1, 3])
    asked = np.arange(sum(SIZES[:-1]))
    own, labels = population.features[asked].astype(float), population.labels[asked]
    return np.stack([own[labels == c].mean(axis=0) for c in held]), held


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "prototype"},
        {"kind": "prototype", "scale": 0.7},
        {"kind": "linear"},
        {"kind": "cosine"},
        {"kind": "cosine", "scale": 3.0},
    ],
    ids=str,
)
def test_heads_begin_at_everybodys_class_means(section: dict[str, Any]) -> None:
    own, population = Section(initial="class_means", **section), people()
    _, state = begun(own, population)
    means, held = means_of(population)
    x = np.random.default_rng(4).normal(size=(20, 5)).astype(np.float32) * 3 + 5
    scores = scores_of(state, x)
    if own.kind == "cosine":
        lengths = np.linalg.norm(means, axis=1) * np.linalg.norm(x, axis=1)[:, None]
        expected = (own.scale or 16) * (x @ means.T) / lengths
    else:
        squares = np.square(x[:, None].astype(float) - means).sum(axis=2)
        expected = -squares * (own.scale or 5 / 2) / 5
        # but for a shift of all classes
        expected -= expected.mean(axis=1, keepdims=True)
        scores[:, held] -= scores[:, held].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(scores[:, held], expected, rtol=2e-5, atol=2e-5)
    assert state.head["bias"][2] == ABSENT, "as FedNCM has it, a class of nobody is not predicted"
    assert set(np.unique(scores.argmax(axis=1))) <= {0, 1, 3}


def scores_of(state: ServerState, x: Float32) -> Any:
    head = {name: torch.from_numpy(tensor) for name, tensor in state.head.items()}
    return classify(head, torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("initial", ["fed3r", "class_means"])
def test_the_start_is_remembered_after_training(initial: str) -> None:
    section, population = Section(initial=initial), people()
    before, state = begun(section, population)
    strategy = started_from(section, FedAvg())
    assert start_of(before) is None
    assert start_of(FedAvg().init(state.head, 4)) is None
    trained = {name: tensor[None] + 1 for name, tensor in state.head.items()}
    first = np.zeros(1, np.int64)
    updates = ClientUpdates(2, first, trained, np.ones(1, np.int64), np.zeros(1))
    after = strategy.step(state, updates)
    assert (after.head["bias"] == state.head["bias"] + 1).all()
    found = start_of(after)
    assert found is not None
    assert {n: t.tobytes() for n, t in found.items()} == {
        n: t.tobytes() for n, t in state.head.items()
    }
    shapes = [{n: (t.shape, t.dtype) for n, t in s.slots.items()} for s in (before, state, after)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_without_a_round_of_statistics_the_strategy_is_itself() -> None:
    for initial in ("zeros", "names"):
        then = FedAvg()
        assert started_from(Section(initial=initial), then) is then
