"""Calibration against slow definitions; one class only, or nothing, is undefined, never 0."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.evaluation import calibration
from fedtl.evaluation.calibration import calibrate, judge
from fedtl.types import Population, Rows


def head_of(population: Population, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(1)
    weight = (scale * rng.normal(size=(3, 9))).astype(np.float32)
    weight[:, :3] += scale * np.eye(3, dtype=np.float32)
    return {"weight": weight, "bias": np.array([0.1, -0.2, 0], np.float32)}


def probabilities(population: Population, head, rows) -> np.ndarray:
    scores = population.features[rows].astype(float) @ head["weight"].T.astype(float) + head["bias"]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def slow_error(shares: np.ndarray, labels: np.ndarray) -> float:
    """By hand: bins (0, 1/15], (1/15, 2/15], ... of the largest probability."""
    sure, right = shares.max(1), shares.argmax(1) == labels
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (sure > low) & (sure <= low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return total


def slow_area(shares: np.ndarray, labels: np.ndarray) -> float:
    """The chance that one of the class scores higher than one that is not; ties are a half."""
    areas = []
    for c in np.unique(labels):
        own, others = shares[labels == c, c], shares[labels != c, c]
        wins = (own[:, None] > others).mean() + 0.5 * (own[:, None] == others).mean()
        areas.append(wins)
    return float(np.mean(areas))


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_both_are_what_their_definitions_say(population: Population, scale: float) -> None:
    head, rows = head_of(population, scale), population.train.index
    error, area = judge(population, head, rows)
    shares, labels = probabilities(population, head, rows), population.labels[rows]
    assert error == pytest.approx(slow_error(shares, labels), abs=1e-6)
    assert area == pytest.approx(slow_area(shares, labels), abs=1e-6)


def test_classes_that_nobody_has_are_left_out(population: Population) -> None:
    rows = population.train.index[population.labels[population.train.index] != 1]
    head = head_of(population)
    _, area = judge(population, head, rows)
    wanted = slow_area(probabilities(population, head, rows), population.labels[rows])
    assert area == pytest.approx(wanted, abs=1e-6)


def test_one_class_only_and_nothing_are_undefined(population: Population) -> None:
    rows = population.train.index
    only = rows[population.labels[rows] == 2]
    error, area = judge(population, head_of(population), only)
    assert np.isfinite(error)
    assert np.isnan(area)
    assert np.isnan(judge(population, head_of(population), rows[:0])).all()


def test_clients_have_their_own_and_everybody_the_whole(population: Population) -> None:
    nobody = replace(population, test=Rows(population.test.index, np.array([0, 8, 8, 18, 22, 27])))
    everyone = population.test.index
    found = calibrate(nobody, head_of(population), np.array([0, 1, 4]), everyone, 0)
    assert np.isfinite(found.calibration_error[[0, 2]]).all()
    assert np.isnan([found.calibration_error[1], found.auroc[1]]).all()
    error, area = judge(population, head_of(population), everyone)
    assert found.facts == {
        "calibration_error": error, "auroc": area, "bins": 15, "examples": len(everyone),
    }  # fmt: skip


def test_of_too_many_examples_a_seeded_sample_is_looked_at(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LARGEST", 60)
    head, clients = head_of(population), np.array([0])
    rows = population.train.index
    found = calibrate(population, head, clients, rows, 0)
    assert found.facts["examples"] == 20
    assert found.facts == calibrate(population, head, clients, rows, 0).facts
    assert found.facts != calibrate(population, head, clients, rows, 1).facts
