"""Canaries: fair coins, nothing changed but where they are planted."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.privacy.canaries import canary_notes, deal_coins, plant
from fedtl.scenario.privacy import Privacy
from fedtl.types import Population


def rows_of(population: Population, split: str) -> list[list[int]]:
    rows = getattr(population, split)
    return [rows.of(k).tolist() for k in range(population.num_clients)]


@pytest.mark.parametrize("labels", ["own", "random"])
def test_only_canary_rows_change(population: Population, labels: str) -> None:
    before = population.labels.copy()
    planted, canaries = plant(population, Privacy(canaries=40, canary_labels=labels), seed=1)
    out = set(canaries.members[~canaries.inside].tolist())
    assert canaries.unit == "example"
    assert len(set(canaries.members.tolist())) == 40
    assert 0 < len(out) < 40
    assert rows_of(planted, "test") == rows_of(population, "test")
    for mine, true in zip(rows_of(planted, "train"), rows_of(population, "train"), strict=True):
        assert mine == [row for row in true if row not in out]
        assert mine
    assert planted.features is population.features
    changed = np.flatnonzero(planted.labels != population.labels)
    assert set(changed.tolist()) == (
        set(canaries.members.tolist()) if labels == "random" else set()
    )
    assert (planted.labels[canaries.members] == canaries.labels).all()
    assert canaries.labels.dtype == population.labels.dtype
    assert canaries.labels.min() >= 0
    assert canaries.labels.max() < len(population.classes)
    assert (population.labels == before).all()


def test_clients_as_canaries_lose_all_rows_or_none(population: Population) -> None:
    privacy = Privacy(mechanism="central", canaries=4, noise_multiplier=1.0)
    planted, canaries = plant(population, privacy, seed=4)
    assert canaries.unit == "client"
    assert len(canaries.labels) == 0
    out = canaries.members[~canaries.inside]
    expected = population.train.counts.copy()
    expected[out] = 0
    assert planted.train.counts.tolist() == expected.tolist()
    assert (planted.labels == population.labels).all()
    assert rows_of(planted, "test") == rows_of(population, "test")


def test_coins_are_fair_and_independent_of_the_choice(population: Population) -> None:
    fallen = np.array(
        [plant(population, Privacy(canaries=50), seed)[1].inside for seed in range(200)]
    )
    deviation = 0.5 / np.sqrt(fallen.size)
    assert abs(fallen.mean() - 0.5) < 4 * deviation
    assert (abs(fallen.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(200)).all()
    together = np.corrcoef(fallen[:, ::2].ravel(), fallen[:, 1::2].ravel())[0, 1]
    assert abs(together) < 4 / np.sqrt(fallen.size / 2)


def test_same_seed_same_canaries(population: Population) -> None:
    first, again, other = (plant(population, Privacy(canaries=20), seed)[1] for seed in (3, 3, 4))
    assert (first.members == again.members).all()
    assert (first.inside == again.inside).all()
    assert (first.members != other.members).any()


def test_coins_can_be_dealt_again(population: Population) -> None:
    planted, canaries = plant(population, Privacy(canaries=30, canary_labels="random"), seed=2)
    again = deal_coins(population, canaries)
    assert rows_of(again, "train") == rows_of(planted, "train")
    assert (again.labels == planted.labels).all()


def test_what_is_told_of_them(population: Population) -> None:
    _, canaries = plant(population, Privacy(canaries=30), seed=2)
    (note,) = canary_notes(canaries, "random")
    assert note.startswith("30 training examples are canaries")
    assert f"left {int((~canaries.inside).sum())} of them out" in note
    assert "wrong labels" in note
    assert "wrong labels" not in canary_notes(canaries, "own")[0]
    assert canary_notes(plant(population, Privacy(), seed=2)[1], "own") == []


def test_no_canaries_no_change(population: Population) -> None:
    planted, canaries = plant(population, Privacy(), seed=1)
    assert planted is population
    assert len(canaries.members) == len(canaries.inside) == 0


@pytest.mark.parametrize(("mechanism", "allowed"), [("none", 119), ("central", 4)])
def test_more_canaries_than_there_can_be(
    population: Population, mechanism: str, allowed: int
) -> None:
    plant(population, Privacy(mechanism=mechanism, canaries=allowed), seed=1)
    with pytest.raises(InputError, match=f"at most {allowed}"):
        plant(population, Privacy(mechanism=mechanism, canaries=allowed + 1), seed=1)
