"""kNN-Per against a loop over pairs of examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.neighbours import LEAST, Voters, chosen_share, judge_neighbours, shared_view
from fedtl.plans import Personal, RoundPlan
from fedtl.types import LocalTraining

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))

SIZES = [60, 0, 300, 2, 1]
WIDTH, CLASSES = 9, 4
HEADS = {
    "linear": oracle.linear_head(WIDTH, CLASSES),
    "mlp": oracle.mlp_head(WIDTH, [7, 6], CLASSES),
}


@pytest.fixture
def people():
    """Features near their class's corner, so that neighbours know something."""
    people = oracle.federation(SIZES, WIDTH, CLASSES)
    features = people.features.copy()
    features[np.arange(len(features)), people.labels] += 2
    return dataclasses.replace(people, features=features)


def plan_of(personal, clients=(0, 1, 2, 3, 4)) -> RoundPlan:
    clients = np.array(clients, np.int64)
    keys = np.zeros(len(clients), np.uint64)
    return RoundPlan(1, clients, keys, LocalTraining(1, 5, 0.1), personal=personal)


def knn(**changes) -> Personal:
    return dataclasses.replace(
        Personal("knnper", neighbours=4, scale=0.7, choices=(0.0, 0.3, 0.9)), **changes
    )


def slow_votes(queries, examples, labels, wanted: int, scale: float):
    found = np.zeros((len(queries), CLASSES))
    for i, query in enumerate(queries):
        squares = [float(((query - example) ** 2).sum()) for example in examples]
        for j in np.argsort(squares)[:wanted]:
            found[i, labels[j]] += np.exp(-squares[j] / (len(query) * scale))
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("wanted", [1, 4, 60, 99])
def test_votes_are_those_of_the_nearest(people, kind: str, wanted: int) -> None:
    own = people.train.of(0)
    voters = Voters.of(people, HEADS[kind], own, knn(neighbours=wanted))
    seen, _ = shared_view(people, HEADS[kind], np.arange(20))
    mine, _ = shared_view(people, HEADS[kind], own)
    expected = slow_votes(seen, mine, people.labels[own], wanted, 0.7)
    np.testing.assert_allclose(voters.votes(seen), expected, rtol=1e-9, atol=1e-12)


def test_far_examples_still_vote(people) -> None:
    own = people.train.of(0)
    voters = Voters.of(people, HEADS["linear"], own, knn())
    votes = voters.votes(np.full((1, WIDTH), 1e3))  # exp of minus their distance is 0
    assert np.isfinite(votes).all()
    np.testing.assert_allclose(votes.sum(), 1)


def test_an_example_left_out_is_one_the_client_does_not_have(people) -> None:
    own, head = people.train.of(0), HEADS["linear"]
    seen, _ = shared_view(people, head, own)
    left_out = Voters.of(people, head, own, knn()).votes(seen, np.arange(len(own)))
    for i in range(len(own)):
        without = Voters.of(people, head, np.delete(own, i), knn())
        np.testing.assert_allclose(left_out[i], without.votes(seen[i : i + 1])[0], rtol=1e-9)


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_client_chooses_by_its_own_rows_and_is_judged_with_that(people, kind: str) -> None:
    head, own = HEADS[kind], people.train.of(2)
    voters = Voters.of(people, head, own, knn())
    seen, shared = shared_view(people, head, own)
    votes = voters.votes(seen, np.arange(len(own)))
    truth = np.arange(len(own)), people.labels[own]
    losses = {
        share: -np.log(share * votes[truth] + (1 - share) * shared[truth] + LEAST).sum()
        for share in (0.0, 0.3, 0.9)
    }
    share = chosen_share(people, head, own, voters, (0.0, 0.3, 0.9))
    assert share == min(losses, key=losses.get) > 0
    rows = np.arange(50)
    (metrics,) = judge_neighbours(people, head, plan_of(knn(), [2]), [[rows]])
    there, probabilities = shared_view(people, head, rows)
    mixed = share * voters.votes(there) + (1 - share) * probabilities
    labels = people.labels[rows]
    right = mixed.argmax(axis=1) == labels
    assert metrics.correct[0].tolist() == np.bincount(labels[right], minlength=4).tolist()
    assert metrics.count[0].tolist() == np.bincount(labels, minlength=4).tolist()
    loss = -np.log(mixed[np.arange(50), labels]).sum()
    np.testing.assert_allclose(metrics.loss_sum, [loss], rtol=1e-12)


def test_neighbours_help_where_the_shared_head_does_not_know(people) -> None:
    head = {name: np.zeros_like(tensor) for name, tensor in HEADS["linear"].items()}
    plan, strangers = plan_of(knn(), [0]), people.test.of(2)
    (mixed,) = judge_neighbours(people, head, plan, [[strangers]])
    shared = evaluate_clients(people, head, np.array([2]))
    assert mixed.correct.sum() > 1.5 * shared.correct.sum()


def test_bits_depend_on_no_threads_and_no_grouping(people) -> None:
    rows = [people.test.of(client) for client in range(5)]
    whole, again = judge_neighbours(
        people, HEADS["mlp"], plan_of(knn()), [rows, rows[::-1]], threads=3
    )
    for i in range(5):
        (one,) = judge_neighbours(people, HEADS["mlp"], plan_of(knn(), [i]), [[rows[i]]])
        assert one.loss_sum.tobytes() == whole.loss_sum[i : i + 1].tobytes()
        assert one.correct.tobytes() == whole.correct[i : i + 1].tobytes()
    assert again.count.sum(1).tolist() == SIZES[::-1]


@pytest.mark.parametrize("client", [1, 4])
def test_who_has_one_row_or_none_has_the_shared_head(people, client: int) -> None:
    rows = np.arange(30)
    plan = plan_of(knn(choices=(1.0,)), [client])
    (found,) = judge_neighbours(people, HEADS["mlp"], plan, [[rows]])
    _, shared = shared_view(people, HEADS["mlp"], rows)
    loss = -np.log(shared[np.arange(30), people.labels[rows]]).sum()
    np.testing.assert_allclose(found.loss_sum, [loss], rtol=1e-12)
