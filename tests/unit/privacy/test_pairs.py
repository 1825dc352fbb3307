"""Pairs of a trained and a held-out example: the split's coin for each is fair."""

from __future__ import annotations

import numpy as np

from fedtl.data.clients import stratified_test
from fedtl.privacy.pairs import deal_pairs, pair_up
from fedtl.types import Population, Rows


def split(seed: int) -> Population:
    """Two clients of three classes, dealt as a scenario deals them with this seed."""
    from fedtl import seeding

    labels = np.tile([0, 0, 1, 1, 1, 1, 1, 2, 2, 2], 4).astype(np.int32)
    client = np.repeat([0, 1], 20).astype(np.int32)
    keys = seeding.named_keys(seed, "split", ("a", "b"))
    test = stratified_test(client, keys, labels, 0.3)

    def rows(mask: np.ndarray) -> Rows:
        parts = [np.flatnonzero(mask & (client == k)) for k in (0, 1)]
        return Rows(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    x = np.zeros((40, 2), np.float32)
    return Population(x, labels, ("0", "1", "2"), rows(~test), rows(test), ("a", "b"), ("", ""))


def test_pairs_are_disjoint_and_of_one_client_and_class() -> None:
    population = split(1)
    pairs = pair_up(population, 1, 100)
    both = np.concatenate([pairs.first, pairs.second])
    assert len(set(both.tolist())) == len(both) > 8
    assert (population.labels[pairs.first] == population.labels[pairs.second]).all()
    assert (pairs.first // 20 == pairs.second // 20).all()
    trained = np.isin(pairs.first, population.train.index)
    assert (trained == pairs.inside).all()
    assert (np.isin(pairs.second, population.test.index) == pairs.inside).all()
    assert len(pair_up(population, 1, 3).first) == 3


def test_given_the_pairs_the_coins_are_fair() -> None:
    """Over many splits: whenever two rows are a pair, each is the trained one half of the time."""
    lower = np.zeros((40, 40))
    seen = np.zeros((40, 40))
    inside = []
    for seed in range(3000):
        pairs = pair_up(split(seed), seed, 100)
        trained = np.where(pairs.inside, pairs.first, pairs.second)
        a, b = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
        np.add.at(seen, (a, b), 1)
        np.add.at(lower, (a, b), trained == a)
        inside.append(pairs.inside.mean())
    known = seen > 30
    assert known.sum() > 50
    z = (lower[known] - seen[known] / 2) / np.sqrt(seen[known] / 4)
    assert abs(z).max() < 4.5
    assert 0.8 < (z**2).mean() < 1.2
    assert abs(np.mean(inside) - 0.5) < 0.01


def test_other_coins_swap_the_pairs_two_rows_and_nothing_else() -> None:
    population = split(2)
    pairs = pair_up(population, 2, 100)
    same = deal_pairs(population, pairs, pairs.inside)
    assert (same.train.index == population.train.index).all()
    assert (same.test.index == population.test.index).all()
    turned = pairs.inside.copy()
    turned[0] = not turned[0]
    one = deal_pairs(population, pairs, turned)
    changed = set(one.train.index.tolist()) ^ set(population.train.index.tolist())
    assert changed == {int(pairs.first[0]), int(pairs.second[0])}
    assert (one.train.counts == population.train.counts).all()
    for k in (0, 1):
        assert (np.diff(one.train.of(k)) > 0).all()
        assert not set(one.train.of(k).tolist()) & set(one.test.of(k).tolist())
