"""References against slow, independent computations."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fedtl import seeding
from fedtl.clients.training import train_clients
from fedtl.evaluation.pooled import fit_pooled
from fedtl.evaluation.references import (
    Judge,
    choice_rows,
    everyone_rows,
    from_optimum,
    judge_alone,
    judge_best,
    judge_pooled,
    judge_shared,
)
from fedtl.plans import RoundPlan
from fedtl.types import LocalTraining, Population, Rows

TRAINING = LocalTraining(epochs=2, batch_size=8, learning_rate=0.1)


@pytest.fixture
def judge(population: Population) -> Judge:
    clients = np.arange(5)
    everyone = everyone_rows(population, clients, 999, 0)
    return Judge(population, clients, everyone, 1, "cpu")


def zeros(population: Population):
    classes, width = len(population.classes), population.features.shape[1]
    return {"weight": np.zeros((classes, width), np.float32), "bias": np.zeros(classes, np.float32)}


def accuracy(population: Population, head, index) -> float:
    logits = population.features[index] @ head["weight"].T + head["bias"]
    return float((logits.argmax(1) == population.labels[index]).mean())


def test_alone_means_trained_on_own_and_judged_twice(judge: Judge, population: Population) -> None:
    trainings = [replace(TRAINING, learning_rate=rate) for rate in (0.1, 0.05, 0.01)]
    found = judge_alone(judge, zeros(population), trainings, seed=1)
    everyone = np.concatenate([population.test.of(k) for k in range(5)])
    at_home, abroad = [], []
    for k in range(5):
        heads = None
        for round, training in enumerate(trainings, 1):
            keys = seeding.client_keys(1, "local_only", round, np.array([k]))
            plan = RoundPlan(round, np.array([k]), keys, training)
            heads = train_clients(population, zeros(population), plan, initial=heads).tensors
        head = {name: tensor[0] for name, tensor in heads.items()}
        at_home.append(accuracy(population, head, population.test.of(k)))
        abroad.append(accuracy(population, head, everyone))
    np.testing.assert_allclose(found.own.accuracy, at_home)
    np.testing.assert_allclose(found.everyone.accuracy, abroad)
    counts = population.test.counts
    assert found.facts["accuracy"] == pytest.approx(np.average(at_home, weights=counts))
    assert found.facts["accuracy_everyone"] == pytest.approx(np.mean(abroad))
    assert found.facts["epochs"] == 6
    assert found.facts["examples_everyone"] == len(everyone)


def test_a_shared_head_is_the_same_everywhere(judge: Judge, population: Population) -> None:
    rng = np.random.default_rng(0)
    head = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in zeros(population).items()}
    found = judge_shared(judge, head)
    assert found.facts["accuracy"] == pytest.approx(found.facts["accuracy_everyone"])
    assert found.facts["accuracy"] == pytest.approx(accuracy(population, head, judge.everyone))
    assert (found.everyone.accuracy == found.facts["accuracy_everyone"]).all()


def test_the_pooled_optimum_is_scikit_learns(population: Population) -> None:
    from sklearn.linear_model import LogisticRegression

    index = population.train.index
    decay = 0.01
    fit = fit_pooled(population, zeros(population), index, weight_decay=decay)
    # scikit-learn does not penalise the bias: give it the bias as one more feature instead
    x = np.c_[population.features[index], np.ones(len(index))]
    theirs = LogisticRegression(C=1 / (decay * len(index)), fit_intercept=False, tol=1e-10)
    theirs.fit(x, population.labels[index])
    assert fit.converged
    np.testing.assert_allclose(fit.head["weight"], theirs.coef_[:, :-1], atol=2e-3)
    np.testing.assert_allclose(fit.head["bias"], theirs.coef_[:, -1], atol=2e-3)


def test_pooling_does_not_depend_on_who_holds_what(population: Population) -> None:
    index = population.train.index
    one = replace(population, train=Rows(index, np.array([0, len(index)], np.int64)))
    a = fit_pooled(population, zeros(population), np.sort(population.train.index), 0.1)
    b = fit_pooled(one, zeros(population), np.sort(one.train.index), 0.1)
    assert all(a.head[n].tobytes() == b.head[n].tobytes() for n in a.head)


def test_rows_in_chunks_give_the_same_optimum(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_pooled(population, zeros(population), population.train.index, 0.1)
    monkeypatch.setattr("fedtl.evaluation.pooled.MAX_RESIDENT_BYTES", 9 * 4 * 50)
    chunked = fit_pooled(population, zeros(population), population.train.index, 0.1)
    for name in whole.head:
        np.testing.assert_allclose(whole.head[name], chunked.head[name], atol=1e-3)


def test_pooled_facts_say_whether_it_converged(judge: Judge, population: Population) -> None:
    facts = judge_pooled(judge, zeros(population), weight_decay=0.1).facts
    assert facts["converged"] is True
    assert facts["largest_gradient"] <= 1e-4


def test_a_sample_stands_for_everybody_when_there_are_too_many(population: Population) -> None:
    clients = np.arange(5)
    rows = everyone_rows(population, clients, 7, seed=3)
    assert len(rows) == len(set(rows.tolist())) == 7
    assert set(rows.tolist()) <= set(population.test.index.tolist())
    assert rows.tolist() == everyone_rows(population, clients, 7, seed=3).tolist()
    assert rows.tolist() != everyone_rows(population, clients, 7, seed=4).tolist()


def test_the_distance_to_the_optimum_is_none_at_the_optimum(
    judge: Judge, population: Population
) -> None:
    pooled = judge_pooled(judge, zeros(population), weight_decay=0.1)
    assert pooled.head is not None
    there = from_optimum(judge, pooled.head, pooled, 0.1)
    assert there["optimum_distance"] == 0
    assert there["excess_loss"] == pytest.approx(0, abs=1e-6)
    far = from_optimum(judge, zeros(population), pooled, 0.1)
    assert far["optimum_distance"] == pytest.approx(1)
    assert far["excess_loss"] == pytest.approx(np.log(3) - pooled.facts["train_loss"], abs=1e-6)


def test_without_a_finite_optimum_there_is_no_distance(
    judge: Judge, population: Population
) -> None:
    pooled = judge_pooled(judge, zeros(population), weight_decay=0.1)
    pooled.facts["converged"] = False
    assert from_optimum(judge, zeros(population), pooled, 0.1)["optimum_distance"] is None
    overflowed = replace(pooled, facts={**pooled.facts, "train_loss": None})
    assert from_optimum(judge, zeros(population), overflowed, 0.1)["excess_loss"] is None


def test_an_optimum_of_zeros_has_no_distance_in_units_of_itself(
    judge: Judge, population: Population
) -> None:
    head = zeros(population)
    pooled = judge_pooled(judge, head, weight_decay=0.1)
    nothing = replace(pooled, head=head, facts={**pooled.facts, "converged": True})
    found = from_optimum(judge, head, nothing, 0.1)
    assert found["optimum_distance"] is None  # of constant features, say
    assert found["excess_loss"] is not None


def test_answers_are_those_that_the_sums_count(judge: Judge, population: Population) -> None:
    rng = np.random.default_rng(2)
    head = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in zeros(population).items()}
    shared = judge_shared(judge, head)
    alone = judge_alone(judge, zeros(population), [TRAINING], seed=1)
    for found in (shared, alone):
        assert found.answers is not None
        ends = np.cumsum([0, *found.answers.tests])
        right = [found.answers.own[a:b].sum() for a, b in pairwise(ends)]
        assert right == found.sums.correct.sum(axis=1).tolist()
        everyone = np.unpackbits(found.answers.everyone, axis=1)[:, : len(judge.everyone)]
        assert np.broadcast_to(everyone.mean(axis=1), 5) == pytest.approx(found.everyone.accuracy)


def test_pairs_of_answers_are_counted_one_by_one(judge: Judge, population: Population) -> None:
    head = {n: t + 0.1 for n, t in zeros(population).items()}
    shared = judge_shared(judge, head)
    alone = judge_alone(judge, zeros(population), [TRAINING], seed=1)
    assert shared.answers is not None
    assert alone.answers is not None
    home = shared.answers.at_home(alone.answers)
    abroad = shared.answers.everywhere(alone.answers)
    keys = seeding.client_keys(1, "local_only", 1, np.arange(5))
    heads = train_clients(
        population, zeros(population), RoundPlan(1, np.arange(5), keys, TRAINING)
    ).tensors
    for k in range(5):
        own = {name: tensor[k] for name, tensor in heads.items()}
        for pairs, rows in ((home, population.test.of(k)), (abroad, judge.everyone)):
            mine, theirs = (rights(population, one, rows) for one in (head, own))
            assert pairs.beats[k] == sum(a and not b for a, b in zip(mine, theirs, strict=True))
            assert pairs.loses[k] == sum(b and not a for a, b in zip(mine, theirs, strict=True))
            assert pairs.examples[k] == len(rows)
    # the difference of accuracies is that of the discordant answers
    difference = shared.own.accuracy - alone.own.accuracy
    np.testing.assert_allclose((home.beats - home.loses) / home.examples, difference)
    assert (home.beats + home.loses).sum() > 0


def rights(population: Population, head, rows) -> list[bool]:
    logits = population.features[rows] @ head["weight"].T + head["bias"]
    return (logits.argmax(1) == population.labels[rows]).tolist()


def test_groups_of_heads_give_the_same_answers(
    judge: Judge, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = choice_rows(population, 0)
    whole = judge_alone(judge, zeros(population), [TRAINING], seed=1, choosing=rows)
    monkeypatch.setattr("fedtl.evaluation.references.HEADS_AT_A_TIME", 2)
    parts = judge_alone(judge, zeros(population), [TRAINING], seed=1, choosing=rows)
    assert whole.answers is not None
    assert parts.answers is not None
    for name, array in vars(whole.answers).items():
        np.testing.assert_array_equal(array, getattr(parts.answers, name))
    assert whole.facts == parts.facts


def test_the_best_client_is_chosen_on_training_rows(judge: Judge, population: Population) -> None:
    rows = choice_rows(population, 0)
    assert rows.tolist() == sorted(population.train.index.tolist())
    alone = judge_alone(judge, zeros(population), [TRAINING], seed=1, choosing=rows)
    keys = seeding.client_keys(1, "local_only", 1, np.arange(5))
    heads = train_clients(
        population, zeros(population), RoundPlan(1, np.arange(5), keys, TRAINING)
    ).tensors
    each = [accuracy(population, {n: t[k] for n, t in heads.items()}, rows) for k in range(5)]
    best = int(np.argmax(each))
    found = judge_best(judge, alone)
    assert found.facts["client"] == f"client-{best}"
    assert found.facts["train_accuracy"] == pytest.approx(each[best])
    chosen = {name: tensor[best] for name, tensor in heads.items()}
    assert found.facts["accuracy_everyone"] == pytest.approx(
        accuracy(population, chosen, judge.everyone)
    )
    # with other test examples the choice stays as it is
    blind = replace(population, labels=population.labels.copy())
    blind.labels[population.test.index] = 0
    again = judge_alone(
        replace(judge, population=blind), zeros(population), [TRAINING], seed=1, choosing=rows
    )
    assert again.facts["best_client"] == alone.facts["best_client"]


def test_of_many_training_rows_a_seeded_sample_chooses(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtl.evaluation.references.CHOICE_EXAMPLES", 9)
    rows = choice_rows(population, 3)
    assert len(set(rows.tolist())) == 9
    assert set(rows.tolist()) <= set(population.train.index.tolist())
    assert rows.tolist() == choice_rows(population, 3).tolist()
