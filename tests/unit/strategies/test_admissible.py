"""Honest statistics pass whatever the data; impossible ones are refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.clients.statistics import pack_symmetric, statistics, unpack_symmetric
from fedtl.plans import RoundPlan, Statistics
from fedtl.strategies.admissible import inadmissible
from fedtl.strategies.validation import accept_updates
from fedtl.types import LocalTraining

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
PLAIN = Statistics()


def plan_for(asked: Statistics) -> RoundPlan:
    clients = np.arange(5)
    keys = np.zeros(5, np.uint64)
    training = LocalTraining(1, 1, 0.1)
    return RoundPlan(1, clients, keys, training, task="statistics", statistics=asked)


def honest(population, asked: Statistics = PLAIN, client: int = 2) -> dict[str, np.ndarray]:
    got = statistics(population, HEAD, plan_for(asked))
    return {name: tensor[client].copy() for name, tensor in got.tensors.items()}


@pytest.mark.parametrize(
    "asked",
    [
        PLAIN,
        Statistics(bias=False),
        Statistics(gram=False),
        Statistics(class_grams=True),
        Statistics(gram=False, class_grams=True, bias=False),
        Statistics(random_features=9, scale=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_honest_statistics_pass(asked, scale, population) -> None:
    # Few rows (singular matrices), a constant feature, a copied one, any scale.
    features = population.features.copy()
    features[:, 3], features[:, 4] = 7.0, features[:, 5]
    population = replace(population, features=(features * scale).astype(np.float32))
    for client in range(5):
        own = honest(population, asked, client)
        assert inadmissible(own, asked, int(population.train.counts[client])) is None


def test_features_that_are_all_zero_pass(population) -> None:
    dark = replace(population, features=np.zeros_like(population.features))
    for asked in (PLAIN, Statistics(bias=False)):
        assert inadmissible(honest(dark, asked), asked, 55) is None


def scale_sums(own) -> None:
    own["sums"][:, :-1] *= 3


def shrink_gram(own) -> None:
    own["gram"] *= 0.5


def move_a_count(own) -> None:
    own["counts"] += np.array([1, -1, 0])


def bend_gram(own) -> None:
    matrix = unpack_symmetric(own["gram"])
    matrix[0, 1] += 1e3
    pack_symmetric(matrix, own["gram"])


def negate_gram(own) -> None:
    matrix = unpack_symmetric(own["gram"])
    matrix[:-1, :-1] *= -1
    pack_symmetric(matrix, own["gram"])


LIES = [
    (lambda own: own["counts"].__setitem__(slice(None), [-1, 50, 6]), "count is negative"),
    (lambda own: own["counts"].__imul__(2), "add up to 110, not 55"),
    (move_a_count, "bias entries"),
    (scale_sums, "bias row"),
    (shrink_gram, "bias row"),
    (bend_gram, "not positive semidefinite"),
    (negate_gram, "not positive semidefinite"),
]


@pytest.mark.parametrize(("lie", "reason"), LIES, ids=[reason for _, reason in LIES])
def test_impossible_statistics_are_refused(lie, reason, population) -> None:
    own = honest(population)
    lie(own)
    assert reason in str(inadmissible(own, PLAIN, 55))


def test_three_times_b_is_impossible_without_a_bias_too(population) -> None:
    asked = Statistics(bias=False)
    own = honest(population, asked)
    own["sums"] *= 3
    assert "not positive semidefinite" in str(inadmissible(own, asked, 55))


def test_sums_of_nothing_are_refused(population) -> None:
    asked = Statistics(gram=False, class_grams=True, bias=False)
    own = honest(population, asked)
    own["counts"][:2] += [own["counts"][2], 0]
    own["counts"][2] = 0
    assert "class without examples" in str(inadmissible(own, asked, 55))
    own["sums"][2] = 0
    assert "class 2 is of no examples" in str(inadmissible(own, asked, 55))


def test_class_grams_must_add_up(population) -> None:
    asked = Statistics(class_grams=True)
    own = honest(population, asked)
    own["class_grams"][0] *= 1.5
    assert "do not add up" in str(inadmissible(own, asked, 55))
    asked = Statistics(gram=False, class_grams=True, bias=False)
    own = honest(population, asked)
    own["class_grams"][1] *= 0.5
    assert "class 1 is impossible" in str(inadmissible(own, asked, 55))


def test_random_features_have_a_length_that_is_known(population) -> None:
    asked = Statistics(random_features=9, scale=0.3, bias=False)
    own = honest(population, asked)
    own["gram"] *= 10
    assert "more than 55 rows can have" in str(inadmissible(own, asked, 55))


def test_the_loop_refuses_the_liar_and_keeps_the_others(population) -> None:
    plan = plan_for(PLAIN)
    reply = statistics(population, HEAD, plan)
    reply.tensors["sums"][3] *= 3
    accepted, norms = accept_updates([reply], plan, HEAD, population.train.counts, 10.0)
    assert accepted.clients.tolist() == [0, 1, 2, 4]
    assert len(norms) == 4
    (failure,) = accepted.failures
    assert failure.client == 3
    assert failure.reason.startswith("statistics: ")


def test_flipped_labels_pass(population) -> None:
    # Said in the documentation: what a liar with a label flip sends is possible.
    flipped = replace(population, labels=(2 - population.labels).astype(np.int32))
    assert inadmissible(honest(flipped), PLAIN, 55) is None
