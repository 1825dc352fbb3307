import json
import math

import numpy as np
import pytest

from fedtl.evaluation.metrics import overall, per_client
from fedtl.types import ClientMetrics


def metrics(correct, count, loss=None) -> ClientMetrics:
    count = np.array(count, np.int64)
    loss = np.ones(len(count)) if loss is None else np.array(loss, float)
    return ClientMetrics(np.arange(len(count)), loss, np.array(correct, np.int64), count)


def test_against_scikit_learn_on_random_predictions() -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    client = rng.integers(0, 5, 200)
    correct = np.zeros((5, 4), int)
    count = np.zeros((5, 4), int)
    np.add.at(count, (client, truth), 1)
    np.add.at(correct, (client, truth), truth == guess)
    each, all_ = per_client(metrics(correct, count)), overall(metrics(correct, count))
    assert all_.accuracy == pytest.approx(accuracy_score(truth, guess))
    assert all_.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, guess))
    for k in range(5):
        mine = client == k
        assert each.accuracy[k] == pytest.approx(accuracy_score(truth[mine], guess[mine]))
        assert each.balanced_accuracy[k] == pytest.approx(
            balanced_accuracy_score(truth[mine], guess[mine])
        )
    assert all_.accuracy_client_mean == pytest.approx(each.accuracy.mean())
    assert all_.spread == pytest.approx(each.accuracy.std())
    assert all_.worst_decile_accuracy == each.accuracy.min()


def test_a_class_that_does_not_occur_is_not_counted_as_wrong() -> None:
    each = per_client(metrics([[3, 0, 0]], [[3, 0, 0]]))
    assert each.balanced_accuracy.tolist() == [1.0]


def test_undefined_is_null_never_zero() -> None:
    each = per_client(metrics([[0, 0], [1, 1]], [[0, 0], [1, 1]]))
    assert math.isnan(each.accuracy[0])
    assert math.isnan(each.loss[0])
    facts = overall(metrics([[0, 0]], [[0, 0]])).as_facts()
    assert facts["accuracy"] is None
    assert facts["worst_decile_accuracy"] is None
    json.dumps(facts, allow_nan=False)


def test_clients_without_examples_do_not_drag_the_mean() -> None:
    found = overall(metrics([[0, 0], [1, 1]], [[0, 0], [2, 2]]))
    assert found.accuracy_client_mean == found.worst_decile_accuracy == 0.5


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (100, 10)])
def test_the_worst_tenth_is_at_least_one_client(clients: int, worst: int) -> None:
    correct = [[k, 0] for k in range(clients)]
    found = overall(metrics(correct, [[clients, 0]] * clients))
    assert found.worst_decile_accuracy == pytest.approx(np.mean(np.arange(worst)) / clients)
