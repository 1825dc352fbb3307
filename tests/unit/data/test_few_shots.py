"""At most so many training examples of a class and client, chosen before the trunk runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtl.data.clients import ClientSplit, few_shot, on_rows, used_rows
from fedtl.types import Rows


def made(seed: int = 0) -> tuple[ClientSplit, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(300)
    counts, tests = [40, 3, 90, 20], [10, 2, 30, 5]

    def of(first: int, sizes: list[int]) -> Rows:
        ends = np.cumsum([0, *sizes]).astype(np.int64)
        parts = [np.sort(rows[first + a : first + b]) for a, b in itertools.pairwise(ends)]
        return Rows(np.concatenate(parts), ends)

    labels = rng.integers(0, 5, 300).astype(np.int32)
    names = tuple(f"client {k}" for k in range(4))
    return ClientSplit(of(0, counts), of(200, tests), names, ("d",) * 4), labels


@pytest.mark.parametrize("shots", [1, 3, 1000])
def test_no_class_of_a_client_has_more_and_none_has_fewer_than_it_could(shots: int) -> None:
    split, labels = made()
    few = few_shot(split, labels, shots, seed=7)
    for client in range(4):
        had, has = split.train.of(client), few.train.of(client)
        assert np.isin(has, had).all()
        assert (np.diff(has) > 0).all()
        for label in range(5):
            assert (labels[has] == label).sum() == min(shots, (labels[had] == label).sum())
    assert few.test is split.test


def test_fewer_shots_are_among_more_and_another_seed_takes_others() -> None:
    split, labels = made()
    one, five = (few_shot(split, labels, shots, seed=7).train.index for shots in (1, 5))
    assert np.isin(one, five).all()
    assert (few_shot(split, labels, 5, seed=8).train.index != five).any()


def test_a_client_draws_the_same_whoever_else_there_is() -> None:
    split, labels = made()
    everybody = few_shot(split, labels, 2, seed=7)
    own = split.train.of(2)
    alone = ClientSplit(
        Rows(np.arange(len(own)), np.array([0, len(own)])), split.test, ("client 2",), ("d",)
    )
    found = few_shot(alone, labels[own], 2, seed=7)
    assert (own[found.train.index] == everybody.train.of(2)).all()


def test_what_nobody_uses_is_left_out_and_rows_are_numbered_anew() -> None:
    split, labels = made()
    few = few_shot(split, labels, 2, seed=7)
    used = used_rows(few)
    moved = on_rows(few, used)
    for client in range(4):
        assert (used[moved.train.of(client)] == few.train.of(client)).all()
        assert (used[moved.test.of(client)] == few.test.of(client)).all()


def test_a_client_that_loses_all_it_trains_on_is_out() -> None:
    split, _ = made()
    keep = np.setdiff1d(used_rows(split), split.train.of(1))
    moved = on_rows(split, keep)
    assert moved.names == ("client 0", "client 2", "client 3")
    assert moved.excluded == (("client 1", 0),)
    for place, client in enumerate((0, 2, 3)):
        assert (keep[moved.train.of(place)] == split.train.of(client)).all()
        assert (keep[moved.test.of(place)] == split.test.of(client)).all()
