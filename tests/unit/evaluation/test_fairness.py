"""Fairness against slow definitions; what is undefined is None."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtl.evaluation.fairness import evenness, fairness
from fedtl.types import ClientMetrics


def slow(accuracy: list[float], weights: list[int]) -> dict[str, float]:
    """Every example, or client, one by one."""
    all_of_them = sorted(a for a, w in zip(accuracy, weights, strict=True) for _ in range(w))
    size, total = len(all_of_them), sum(all_of_them)
    tail = all_of_them[: max(1, math.ceil(size / 10))]
    return {
        "mean": total / size,
        "worst_decile": sum(tail) / len(tail),
        "spread": float(np.std(all_of_them)),
        "jain": total**2 / (size * sum(a * a for a in all_of_them)),
        "entropy": -sum(a / total * math.log(a / total) for a in all_of_them if a) / math.log(size),
    }


@pytest.mark.parametrize("size", [2, 9, 10, 11, 40])
def test_weights_are_repetitions(size: int) -> None:
    rng = np.random.default_rng(size)
    accuracy, weights = rng.random(size), rng.integers(1, 30, size)
    accuracy[0] = 0
    for some in (weights, np.ones(size, np.int64)):
        found = evenness(accuracy, some)
        assert found == pytest.approx(slow(accuracy.tolist(), some.tolist()), abs=1e-12)
        order = rng.permutation(size)
        assert evenness(accuracy[order], some[order]) == pytest.approx(found, abs=1e-12)


def test_equal_accuracies_are_perfectly_even() -> None:
    found = evenness(np.full(7, 0.6), np.arange(1, 8))
    assert found == pytest.approx(
        {"mean": 0.6, "worst_decile": 0.6, "spread": 0, "jain": 1, "entropy": 1}
    )


def test_what_is_undefined_is_none() -> None:
    assert set(evenness(np.empty(0), np.empty(0, np.int64)).values()) == {None}
    wrong = evenness(np.zeros(3), np.ones(3, np.int64))
    assert (wrong["mean"], wrong["jain"], wrong["entropy"]) == (0, None, None)
    assert evenness(np.array([0.5]), np.array([1]))["entropy"] is None


def test_domains_and_classes_are_counted_by_examples_and_by_clients() -> None:
    count = np.array([[8, 2, 0], [0, 4, 0], [0, 0, 0], [2, 0, 0]])
    correct = np.array([[4, 2, 0], [0, 1, 0], [0, 0, 0], [2, 0, 0]])
    metrics = ClientMetrics(np.arange(4), np.zeros(4), correct, count)
    found = fairness(metrics, ["x", "y", "y", "x"], ["a", "b", "c"])
    assert found["domains"]["x"] == {
        "accuracy": 8 / 12, "accuracy_client_mean": 0.8, "examples": 12, "clients": 2,
    }  # fmt: skip
    assert found["domains"]["y"]["clients"] == 1  # the other one has no tests
    assert found["classes"]["a"] == {
        "recall": 6 / 10, "recall_client_mean": 0.75, "examples": 10, "clients": 2,
    }  # fmt: skip
    assert found["classes"]["c"]["recall"] is None
    assert found["by_clients"]["mean"] == pytest.approx((0.6 + 0.25 + 1) / 3)
    assert found["by_examples"]["mean"] == pytest.approx(9 / 16)
    nobody = ClientMetrics(*(array[:0] for array in vars(metrics).values()))
    assert fairness(nobody, [], ["a", "b", "c"])["by_clients"]["mean"] is None
