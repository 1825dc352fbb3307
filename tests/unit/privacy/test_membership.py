"""Membership attacks: against slow oracles, at chance where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from fedtl.privacy.membership import attack_facts, confidences, found_something, lira, losses


def test_confidences_are_the_logit_of_the_true_class() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    own = p[np.arange(50), labels]
    found = confidences(scores, labels)
    np.testing.assert_allclose(found, np.log(own / (1 - own)), rtol=1e-9)
    np.testing.assert_allclose(losses(found), -np.log(own), rtol=1e-9)


def test_confidences_do_not_overflow() -> None:
    found = confidences(np.array([[1e4, 0.0], [-1e6, 3.0]]), np.array([0, 0]))
    assert found.tolist() == [1e4, -1e6 - 3.0]
    assert np.isfinite(losses(found)).all()


def test_lira_is_a_ratio_of_normal_densities() -> None:
    rng = np.random.default_rng(1)
    trained = rng.random((40, 6)) < 0.5
    shadows = np.where(trained, 2.0, 0.0) + rng.normal(size=(40, 6))
    target = rng.normal(size=6)
    expected = []
    spreads = []
    for mask in (trained, ~trained):
        residuals = [shadows[mask[:, i], i] - shadows[mask[:, i], i].mean() for i in range(6)]
        freedom = sum(len(r) - 1 for r in residuals)
        spreads.append(np.sqrt(sum((r**2).sum() for r in residuals) / freedom))
    for i in range(6):
        inside = norm(shadows[trained[:, i], i].mean(), spreads[0]).logpdf(target[i])
        outside = norm(shadows[~trained[:, i], i].mean(), spreads[1]).logpdf(target[i])
        expected.append(inside - outside)
    np.testing.assert_allclose(lira(target, shadows, trained), expected, rtol=1e-9)


def test_lira_says_nothing_of_rows_seen_from_one_side() -> None:
    trained = np.array([[True, True], [True, False], [True, True]])
    ratio = lira(np.ones(2), np.arange(6.0).reshape(3, 2), trained)
    assert ratio[0] == 0
    assert ratio[1] != 0


def test_lira_finds_what_loss_cannot() -> None:
    """Hard members and easy others: the loss mistakes them, their own shadows do not."""
    rng = np.random.default_rng(2)
    hardness = rng.normal(size=400) * 5
    member = np.arange(400) < 200
    trained = rng.random((64, 400)) < 0.5
    shadows = hardness + trained + 0.2 * rng.normal(size=(64, 400))
    target = hardness + member + 0.2 * rng.normal(size=400)
    by_loss = attack_facts("loss", target[member], target[~member])
    ratio = lira(target, shadows, trained)
    by_ratio = attack_facts("lira", ratio[member], ratio[~member])
    assert by_loss["auc"] < 0.65
    assert by_ratio["auc"] > 0.99
    assert found_something(by_ratio)


def test_chance_interval_holds_where_nothing_is_leaked() -> None:
    rng = np.random.default_rng(3)
    inside = [
        abs(facts["auc"] - 0.5) <= facts["chance"]
        for facts in (
            attack_facts("loss", rng.normal(size=80), rng.normal(size=60)) for _ in range(200)
        )
    ]
    assert 0.90 <= np.mean(inside) <= 0.99


def test_rates_at_few_false_alarms() -> None:
    others = np.arange(1000.0)
    members = np.array([999.5, 998.5, 990.5, 0.5])
    facts = attack_facts("loss", members, others)
    assert facts["tpr_at_0.1%"] == 0.5  # one false alarm allows 999.5 and 998.5
    assert facts["tpr_at_1%"] == 0.75
    few = attack_facts("loss", members, others[:150])
    assert few["tpr_at_0.1%"] is None
    assert few["tpr_at_1%"] is not None


@pytest.mark.parametrize("empty", [0, 1])
def test_nobody_to_tell_apart(empty: int) -> None:
    sides = [np.ones(3), np.ones(3)]
    sides[empty] = np.empty(0)
    facts = attack_facts("loss", *sides)
    assert facts["auc"] is None
    assert not found_something(facts)
