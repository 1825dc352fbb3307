"""Capacity-masked Dirichlet, and label and quantity skew together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl.data.examples import Examples
from fedtl.data.partitions import assign_clients
from fedtl.data.skews import MAX_DRAWS, capacity_table, client_sizes, dirichlet_shares, take
from fedtl.errors import InputError
from fedtl.evaluation.labels import js, to_all
from fedtl.scenario.schema import Clients

Make = Callable[..., Examples]
INFINITE = float("inf")


def table_of(examples: Examples, seed: int = 0, **options: Any) -> Any:
    found = assign_clients(examples, Clients(**options), seed)
    table = np.zeros((len(found.names), len(examples.classes)), dtype=np.int64)
    np.add.at(table, (found.client, examples.labels), 1)
    return table


@pytest.mark.parametrize("partition", ["dirichlet", "dirichlet_capacity", "label_quantity"])
@pytest.mark.parametrize("balanced", [True, False])
def test_an_infinite_alpha_is_even(make_examples: Make, partition: str, balanced: bool) -> None:
    """METHODS T1.4: alpha to infinity gives JS < 0.01, for every client."""
    each = [600] * 10 if balanced else [60 * (i + 1) for i in range(10)]
    examples = make_examples(np.repeat(np.arange(10), each))
    table = table_of(examples, partition=partition, alpha=INFINITE, sigma=0.5)
    assert to_all(js, table).max() < 0.01


def slow_capacity(sizes: Any, num: int, shares: Any) -> Any:
    """The published loop, client by client, on given draws."""
    total = sum(sizes)
    held = [0] * num
    table = []
    for size, drawn in zip(sizes, shares, strict=True):
        open_ = [h < total / num for h in held]
        p = [s * o for s, o in zip(drawn, open_, strict=True)]
        p = [s / sum(p) for s in p]
        cuts = [int(c * size) for c in np.cumsum(p)][:-1]
        last = max(k for k in range(num) if open_[k])
        cuts[last:] = [size] * len(cuts[last:])
        row = np.diff([0, *cuts, size])
        held = [h + r for h, r in zip(held, row, strict=True)]
        table.append(row)
    return np.array(table)


def test_capacity_is_the_published_loop() -> None:
    sizes = np.array([50, 31, 7, 90, 64, 12])
    for seed in range(20):
        again = np.random.default_rng(seed)
        drawn = [dirichlet_shares(0.3, 8, again) for _ in sizes]
        found = capacity_table(sizes, 8, 0.3, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, slow_capacity(sizes.tolist(), 8, drawn))
        assert found.sum(axis=1).tolist() == sizes.tolist()


def test_the_two_dirichlets_differ_in_their_sizes(make_examples: Make) -> None:
    examples = make_examples(np.arange(20_000) % 10)
    options = {"num": 20, "alpha": 0.1, "min_examples": 1}
    masked = [table_of(examples, s, partition="dirichlet_capacity", **options) for s in range(5)]
    plain = [table_of(examples, s, partition="dirichlet", **options) for s in range(5)]
    spread = [np.std([t.sum(axis=1).std() for t in tables]) for tables in (masked, plain)]
    assert np.mean([t.sum(axis=1).std() for t in masked]) < np.mean(
        [t.sum(axis=1).std() for t in plain]
    )
    assert spread[0] < 1000  # no client beyond what one class adds to a full one
    for table in masked:
        assert table.sum(axis=1).max() < 20_000 / 20 + 20_000 / 10


def test_capacity_ends_and_says_what_would_do(make_examples: Make) -> None:
    examples = make_examples(np.arange(400) % 2)  # two classes cannot feed fifty clients
    with pytest.raises(InputError, match=f"none of {MAX_DRAWS} draws") as caught:
        table_of(examples, partition="dirichlet_capacity", num=50, alpha=0.01, min_examples=2)
    assert "clients.alpha" in caught.value.line()
    with pytest.raises(InputError, match="at most 8, or at most 40 clients"):
        table_of(examples, partition="dirichlet_capacity", num=50, min_examples=10)


def test_what_a_refusal_allows_is_feasible(make_examples: Make) -> None:
    examples = make_examples(np.arange(300) % 5)
    options = {"partition": "dirichlet_capacity", "num": 12, "alpha": 0.5}
    with pytest.raises(InputError) as caught:
        table_of(examples, 4, **options, min_examples=25)
    allowed = int(str(caught.value.allowed).split()[2])
    assert table_of(examples, 4, **options, min_examples=allowed).sum(axis=1).min() == allowed


@pytest.mark.parametrize("quantity", ["lognormal", "zipf"])
def test_label_and_quantity_skew_together(make_examples: Make, quantity: str) -> None:
    examples = make_examples(np.arange(30_000) % 10)
    options = {"partition": "label_quantity", "num": 30, "quantity": quantity, "sigma": 1.0}
    skews = []
    for alpha in (0.05, 0.5, 5.0, INFINITE):
        table = table_of(examples, 2, **options, alpha=alpha)
        sizes = table.sum(axis=1)
        assert sizes.sum() == 30_000
        assert sizes.max() > 5 * sizes.min()
        if quantity == "zipf":
            assert (np.diff(sizes) <= 0).all()
        skews.append(to_all(js, table).mean())
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.3


def test_label_quantity_follows_the_draw_while_classes_last() -> None:
    """Off by one at most, as long as nothing is used up."""
    generator = np.random.default_rng(3)
    left = np.full(6, 10_000)
    for size in (1, 7, 500):
        p = generator.dirichlet(np.ones(6))
        taken = take(size, left, np.log(p), generator.random())
        assert taken.sum() == size
        assert np.abs(taken - p * size).max() < 1


def test_take_empties_the_pool_exactly() -> None:
    generator = np.random.default_rng(4)
    for _ in range(50):
        left = generator.integers(0, 9, 5)
        for size in {0, int(left.sum()) // 2, int(left.sum())}:
            taken = take(size, left, generator.normal(size=5) * 1e6, generator.random())
            assert taken.sum() == size
            assert (taken <= left).all()
            assert (taken >= 0).all()


def test_sizes_add_up_and_nobody_gets_nothing() -> None:
    for num in (1, 3, 100):
        for options in ({"sigma": 30.0}, {"quantity": "zipf", "exponent": 1e9}):
            sizes = client_sizes(100, num, Clients(**options), np.random.default_rng(0))
            assert sizes.sum() == 100
            assert sizes.min() >= 1
