"""Training and test rows of each client."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl import seeding
from fedtl.data.clients import ClientSplit, split_clients, stratified_test
from fedtl.data.examples import Examples
from fedtl.data.partitions import Assignment, assign_clients
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients


def assignment_of(client: Any, num: int | None = None) -> Assignment:
    client = np.asarray(client, dtype=np.int32)
    num = num or int(client.max()) + 1
    return Assignment(
        client, tuple(f"c{k}" for k in range(num)), tuple(f"d{k}" for k in range(num))
    )


def split(
    examples: Examples,
    client: Any,
    fraction: float = 0.2,
    num: int | None = None,
    seed: int = 0,
    **options: Any,
) -> ClientSplit:
    return split_clients(assignment_of(client, num), examples, Clients(**options), fraction, seed)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_every_client_and_every_class_is_within_one_of_its_share(
    make_examples: Callable[..., Examples], fraction: float
) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 7, 3000)
    client = np.minimum(generator.exponential(8, 3000).astype(int), 60)
    examples = make_examples(labels)
    found = split(examples, client, fraction, min_examples=1)
    names = [int(name[1:]) for name in found.names]
    for place, k in enumerate(names):
        train, test = found.train.of(place), found.test.of(place)
        mine = np.flatnonzero(client == k)
        assert (np.sort(np.concatenate([train, test])) == mine).all()
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        assert abs(len(test) - fraction * len(mine)) <= 1
        if len(mine) >= 2:
            assert len(test) >= 1
            assert len(train) >= 1
        for c in range(7):
            have = (labels[mine] == c).sum()
            assert abs((labels[test] == c).sum() - fraction * have) <= 1 + 1e-9


def test_test_classes_are_not_aligned_between_clients(
    make_examples: Callable[..., Examples],
) -> None:
    """One example of each class at each client: every class must get its share of test rows."""
    labels, client = np.tile(np.arange(10), 500), np.repeat(np.arange(500), 10)
    found = split(make_examples(labels), client)
    assert (found.test.counts == 2).all()
    by_class = np.bincount(labels[found.test.index], minlength=10)
    assert np.abs(by_class - 100).max() < 45


def test_each_row_is_equally_likely(make_examples: Callable[..., Examples]) -> None:
    labels, client = np.array([0, 0, 0, 1, 1, 2] * 2), np.repeat([0, 1], 6)
    hits = np.zeros(12)
    for seed in range(600):
        keys = seeding.named_keys(seed, "split", ("a", "b"))
        hits += stratified_test(client.astype(np.int32), keys, labels.astype(np.int32), 0.5)
    assert np.abs(hits / 600 - 0.5).max() < 0.1


def test_a_client_alone_splits_as_in_company(make_examples: Callable[..., Examples]) -> None:
    """A real client that sees only its own rows must find the split that the simulation has."""
    rng = np.random.default_rng(0)
    labels, client = rng.integers(0, 4, 300), rng.integers(0, 5, 300)
    together = split(make_examples(labels), client)
    for k in range(5):
        rows = np.flatnonzero(client == k)
        alone = split_clients(
            Assignment(np.zeros(len(rows), np.int32), (f"c{k}",), ("",)),
            make_examples(labels[rows]), Clients(), 0.2, 0,
        )  # fmt: skip
        assert (rows[alone.test.index] == together.test.of(k)).all()
        assert (rows[alone.train.index] == together.train.of(k)).all()


def test_seeds(make_examples: Callable[..., Examples]) -> None:
    examples, client = make_examples(np.arange(200) % 3), np.arange(200) % 5
    one, same, other = (split(examples, client, seed=seed) for seed in (1, 1, 2))
    assert (one.test.index == same.test.index).all()
    assert (one.test.index != other.test.index).any()


def test_small_and_empty_clients_are_left_out_and_reported(
    make_examples: Callable[..., Examples],
) -> None:
    examples = make_examples([0, 1, 0, 1, 0, 1, 0])
    found = split(examples, [4, 4, 4, 0, 2, 2, 4], num=6)
    assert found.names == ("c2", "c4")
    assert found.domains == ("d2", "d4")
    assert found.excluded == (("c0", 1), ("c1", 0), ("c3", 0), ("c5", 0))
    assert (found.train.counts + found.test.counts).tolist() == [2, 4]
    assert found.train.offsets.dtype == found.train.index.dtype == np.int64
    lonely = split(examples, [4, 4, 4, 0, 2, 2, 4], num=6, min_examples=1)
    assert lonely.names == ("c0", "c2", "c4")
    assert lonely.train.of(0).tolist() == [3]
    assert lonely.test.counts[0] == 0


def test_a_given_split_is_used_as_it_is(make_examples: Callable[..., Examples]) -> None:
    is_test = [True, False, False, True, True, True, False]
    examples = make_examples([0, 1, 0, 1, 0, 1, 0], is_test=is_test)
    found = split(examples, [0, 0, 1, 1, 2, 2, 1], fraction=0.9)
    assert found.names == ("c0", "c1")
    assert found.excluded == (("c2", 2),)
    assert found.train.of(0).tolist() == [1]
    assert found.test.of(0).tolist() == [0]
    assert found.train.of(1).tolist() == [2, 6]
    assert found.test.of(1).tolist() == [3]


def test_all_left_out(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1, 0, 1])
    with pytest.raises(InputError, match="largest with 1 examples") as caught:
        split(examples, [0, 1, 2, 3])
    assert caught.value.exit_code == 2
    assert "clients.min_examples" in caught.value.line()
    with pytest.raises(InputError, match="for training"):
        split(make_examples([0, 1], is_test=[True, True]), [0, 0])


def test_together_with_a_partition(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(np.arange(500) % 5)
    options = Clients(partition="dirichlet", alpha=0.05, num=50)
    assignment = assign_clients(examples, options, 0)
    found = split_clients(assignment, examples, options, 0.25, 0)
    used = np.concatenate([found.train.index, found.test.index])
    assert len(np.unique(used)) == len(used)
    assert len(used) + sum(held for _, held in found.excluded) == 500
    assert len(found.names) + len(found.excluded) == 50


def test_rows_of_a_class_are_drawn_at_random_not_at_regular_places(
    make_examples: Callable[..., Examples],
) -> None:
    found = split(make_examples([0] * 200), [0] * 200)
    assert len(set(np.diff(found.test.index).tolist())) > 3
