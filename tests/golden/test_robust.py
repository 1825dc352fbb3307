"""What the literature and our own measurements say of robust rules and of attacks."""

from dataclasses import replace

import numpy as np
import pytest

from fedtl.clients.attacks import alie_z, lie, poison
from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.scenario.updates import Attack
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.robust import (
    Bulyan,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormClip,
    TrimmedMean,
)
from fedtl.strategies.validation import accept_updates
from fedtl.types import LocalTraining, Population, Rows

RULES = {
    "krum": Krum(malicious=3),
    "multikrum": MultiKrum(malicious=3),
    "bulyan": Bulyan(malicious=3),
    "median": Median(),
    "trimmed_mean": TrimmedMean(trim=0.2),
    "geometric_median": GeometricMedian(),
    "fltrust": FLTrust(root=0),
    "norm_clip": NormClip(),
}
HEAD = {"weight": np.ones((3, 5), np.float32), "bias": np.zeros(3, np.float32)}
CLIENTS, LIARS, EACH = 16, 3, 40
BREAK_THE_MEAN = (
    ({"kind": "sign_flip", "scale": 30.0}, 0.1),
    ({"kind": "inner_product", "scale": 10.0}, 0.1),
    ({"kind": "gaussian", "scale": 3.0}, 0.85),
)
"""Attacks by three of sixteen, and what accuracy FedAvg has left at most."""


def stepped(strategy, given, head=HEAD):
    return strategy.step(strategy.init(head, 99), given).head


def cohort(updates, seed: int = 0, size: int = 15):
    rng = np.random.default_rng(seed)
    moved = {n: t + 0.4 + rng.normal(size=(size, *t.shape)) for n, t in HEAD.items()}
    return updates(moved, examples=rng.integers(1, 99, size).tolist())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_clients_does_not_matter(rule, seed, updates) -> None:
    given, strategy = cohort(updates, seed), RULES[rule]
    order = np.random.default_rng(seed).permutation(15)
    shuffled = replace(
        given,
        tensors={n: t[order] for n, t in given.tensors.items()},
        num_examples=given.num_examples[order],
    )
    if rule == "fltrust":  # its client keeps being trusted wherever it stands
        strategy = FLTrust(root=int(np.flatnonzero(order == 0)[0]))
    one, other = stepped(RULES[rule], given), stepped(strategy, shuffled)
    for name in HEAD:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_identical_updates_are_a_fixed_point(rule, updates) -> None:
    one = cohort(updates, 4, 1)
    same = updates({n: np.repeat(t, 15, axis=0) for n, t in one.tensors.items()})
    head = stepped(RULES[rule], same)
    for name in HEAD:
        np.testing.assert_allclose(head[name], one.tensors[name][0], rtol=1e-6, atol=1e-7)


def test_trim_0_and_multikrum_of_everybody_are_the_mean(updates) -> None:
    given = cohort(updates, 5)
    plain = stepped(FedAvg("uniform"), given)
    weighted = stepped(FedAvg("examples"), given)
    for strategy, mean in (
        (TrimmedMean(trim=0.0), plain),
        (MultiKrum("uniform", malicious=0, selected=15), plain),
        (MultiKrum("uniform", malicious=0), plain),
        (MultiKrum("examples", malicious=0), weighted),
        (NormClip("examples", max_norm=1e9), weighted),
    ):
        head = stepped(strategy, given)
        for name in HEAD:
            np.testing.assert_allclose(head[name], mean[name], rtol=1e-6, atol=1e-7)
    assert not np.allclose(plain["weight"], weighted["weight"], atol=1e-3)


@pytest.mark.parametrize("size", [15, 16])
def test_the_median_breaks_down_at_half(size, updates) -> None:
    given = cohort(updates, 6, size)
    below, half = (size - 1) // 2, -(-size // 2)
    for count, stays in ((below, True), (half, False)):
        far = {n: t.copy() for n, t in given.tensors.items()}
        for tensor in far.values():
            tensor[:count] = 1e9
        head = stepped(Median(), replace(given, tensors=far))
        largest = max(np.abs(tensor).max() for tensor in head.values())
        honest = max(np.abs(t[count:]).max() for t in given.tensors.values())
        assert (largest <= honest) == stays


@pytest.mark.parametrize("rule", RULES)
def test_outliers_of_a_milliard_break_the_mean_and_no_rule(rule, updates) -> None:
    given = cohort(updates, 7)
    far = {n: t.copy() for n, t in given.tensors.items()}
    for tensor in far.values():
        tensor[-LIARS:] = 1e9
    lied = replace(given, tensors=far, num_examples=np.full(15, 10))
    reach = max(np.abs(t[:-LIARS] - HEAD[n]).max() for n, t in given.tensors.items())
    moved = {
        key: max(np.abs(h[n] - HEAD[n]).max() for n in HEAD)
        for key, h in ((rule, stepped(RULES[rule], lied)), ("mean", stepped(FedAvg(), lied)))
    }
    assert moved["mean"] > 1e8
    assert moved[rule] <= 2 * reach


def test_alie_of_50_clients_of_which_24_lie() -> None:
    assert alie_z(50, 24) == pytest.approx(1.426, abs=5e-4)


@pytest.fixture(scope="module")
def people():
    """Makes sixteen clients of one problem, alike or each with one class mostly."""

    def make(skewed: bool = False) -> Population:
        rng = np.random.default_rng(0)
        num = CLIENTS * EACH * 2
        labels = rng.integers(0, 3, num).astype(np.int32)
        if skewed:
            own = np.repeat(np.arange(CLIENTS) % 3, EACH)
            mostly = rng.random(CLIENTS * EACH) < 0.97
            labels[: CLIENTS * EACH][mostly] = own[mostly]
        features = rng.normal(size=(num, 10)).astype(np.float32)
        features[np.arange(num), labels] += 3.5
        ends = np.arange(CLIENTS + 1) * EACH
        return Population(
            features,
            labels,
            ("a", "b", "c"),
            Rows(np.arange(num // 2), ends),
            Rows(np.arange(num // 2, num), ends),
            tuple(f"client-{i}" for i in range(CLIENTS)),
            ("",) * CLIENTS,
        )

    return make


def accuracy(people: Population, strategy, attack: dict[str, object] | None = None) -> float:
    """Of the head after eight rounds, on everybody's test rows."""
    section = Attack.model_validate(attack or {})
    lying = np.arange(CLIENTS - LIARS, CLIENTS) if attack else np.empty(0, np.int64)
    false = poison(people, section, lying, 0)
    head = {"weight": np.zeros((3, 10), np.float32), "bias": np.zeros(3, np.float32)}
    state = strategy.init(head, CLIENTS)
    for round in range(1, 9):
        keys = np.arange(CLIENTS, dtype=np.uint64) + np.uint64(100 * round)
        plan = RoundPlan(round, np.arange(CLIENTS), keys, LocalTraining(2, 10, 0.1))
        replies = lie([train_clients(false, state.head, plan)], plan, state.head, section, lying, 0)
        updates, _ = accept_updates(replies, plan, state.head, false.train.counts, 1e4)
        assert len(updates.clients) == CLIENTS
        state = strategy.step(state, updates)
    judged = evaluate_clients(people, state.head, np.arange(CLIENTS))
    return float(judged.correct.sum() / judged.count.sum())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_withstands_what_breaks_the_mean_and_costs_little_without(rule, people) -> None:
    alike = people()
    mean = accuracy(alike, FedAvg())
    assert mean > 0.98
    for attack, broken in BREAK_THE_MEAN:
        assert accuracy(alike, FedAvg(), attack) < broken
        assert accuracy(alike, RULES[rule], attack) > mean - 0.01
    assert accuracy(alike, RULES[rule]) > mean - 0.01


def test_what_rules_cost_under_label_skew_without_any_attack(people) -> None:
    skewed = people(skewed=True)
    mean = accuracy(skewed, FedAvg())
    cost = {rule: mean - accuracy(skewed, strategy) for rule, strategy in RULES.items()}
    assert mean > 0.98
    # one client's update, or only those that agree with one client's: most classes are lost
    assert min(cost["krum"], cost["fltrust"]) > 0.2
    assert min(cost["bulyan"], cost["median"]) > 0.04
    assert max(cost["norm_clip"], cost["trimmed_mean"], cost["geometric_median"]) < 0.01
