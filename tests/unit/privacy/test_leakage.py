"""What gradients and sums say outright: exact where they must be."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.clients.gradients import gradients
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.privacy.leakage import (
    cosine,
    counts_of_update,
    inverted,
    label_counts,
    lone_classes,
    share_error,
)
from fedtl.types import LocalTraining, Population, Rows


def one_client(x: np.ndarray, y: np.ndarray, num_classes: int) -> Population:
    rows = Rows(np.arange(len(y)), np.array([0, len(y)]))
    names = tuple(map(str, range(num_classes)))
    return Population(x, y.astype(np.int32), names, rows, rows, ("a",), ("",))


def zero(num_classes: int, width: int) -> dict[str, np.ndarray]:
    return {
        "weight": np.zeros((num_classes, width), np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }


def plan(epochs: int = 1, batch: int = 1000, rate: float = 0.1) -> RoundPlan:
    training = LocalTraining(epochs, batch, rate)
    return RoundPlan(1, np.zeros(1, np.int64), np.ones(1, np.uint64), training)


def test_label_counts_of_a_zero_head_are_exact_in_200_of_200_trials() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        classes, size = int(rng.integers(2, 12)), int(rng.integers(1, 64))
        x = rng.normal(size=(size, 5)).astype(np.float32)
        y = rng.integers(0, classes, size)
        sent = gradients(one_client(x, y, classes), zero(classes, 5), plan()).tensors
        found = label_counts(sent["bias"][0], size)
        np.testing.assert_allclose(found, np.bincount(y, minlength=classes), atol=1e-9)


def test_label_counts_of_another_head_need_its_probabilities() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    head = {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=3)}
    sent = gradients(one_client(x, y, 3), head, plan()).tensors["bias"][0]
    scores = np.exp(x @ head["weight"].T + head["bias"])
    mean = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(label_counts(sent, 20, mean), np.bincount(y, minlength=3), atol=1e-9)
    assert share_error(label_counts(sent, 20), np.bincount(y, minlength=3)) > 0.01


def test_counts_of_a_first_update() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 4, 40) ** 2 // 3
    true, start = np.bincount(y, minlength=4), zero(4, 6)
    client = one_client(x, y, 4)
    one = train_clients(client, start, plan(rate=0.1)).tensors["bias"][0]
    np.testing.assert_allclose(counts_of_update(one, 40, 0.1), true, atol=1e-4)
    several = train_clients(client, start, plan(epochs=3, batch=8)).tensors["bias"][0]
    error = share_error(counts_of_update(several, 40, 0.1 * 15), true)
    assert error < share_error(np.full(4, 10), true) / 2


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_single_row_is_in_its_gradient_and_in_its_update(epochs: int) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(1, 30)).astype(np.float32), np.array([2])
    client, start = one_client(x, y, 5), zero(5, 30)
    sent = gradients(client, start, plan()).tensors
    found = inverted(sent["weight"][0], sent["bias"][0]).astype(np.float32)
    assert (found == x[0]).all()  # no error at all in the features' own precision
    update = train_clients(client, start, plan(epochs=epochs, batch=1)).tensors
    np.testing.assert_allclose(inverted(update["weight"][0], update["bias"][0]), x[0], rtol=1e-4)


def test_a_row_that_left_no_trace_is_not_found() -> None:
    assert np.isnan(inverted(np.zeros((3, 4)), np.zeros(3))).all()


def test_lone_classes_and_similarity() -> None:
    assert lone_classes(np.array([0, 1, 2, 1])).tolist() == [1, 3]
    assert lone_classes(np.array([0.1, 1.2, 2.0])).tolist() == [1]
    rows = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine(rows, rows[0]), [1, np.sqrt(0.5), 0])
    assert cosine(np.full(2, np.nan), rows[0]) == 0


def test_share_error_counts_examples_told_wrong() -> None:
    assert share_error(np.array([3, 1]), np.array([1, 3])) == 0.5
    assert share_error(np.array([1, 3]), np.array([1, 3])) == 0
