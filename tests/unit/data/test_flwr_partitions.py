"""The adapter to flwr-datasets, and our partitions against theirs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl.data.examples import Examples
from fedtl.data.partitions import assign_clients
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients

pytest.importorskip("flwr_datasets")

LABELS = np.repeat(np.arange(10), 40)


def options(partitioner: str, num: int | None = None, **parameters: Any) -> Clients:
    return Clients(
        partition="flwr_datasets", partitioner=partitioner, num=num, parameters=parameters
    )


def refusal(examples: Examples, *args: Any, **parameters: Any) -> str:
    with pytest.raises(InputError) as caught:
        assign_clients(examples, options(*args, **parameters), 0)
    return caught.value.line()


@pytest.mark.parametrize(
    ("partitioner", "parameters"),
    [
        ("IidPartitioner", {}),
        ("LinearPartitioner", {}),
        ("SquarePartitioner", {}),
        ("ExponentialPartitioner", {}),
        ("DirichletPartitioner", {"alpha": 0.5, "min_partition_size": 0}),
        ("ShardPartitioner", {"num_shards_per_partition": 2, "keep_incomplete_shard": True}),
        (
            "PathologicalPartitioner",
            {"num_classes_per_partition": 6, "class_assignment_mode": "deterministic"},
        ),
        ("ContinuousPartitioner", {"strictness": 0.5}),
    ],
)
def test_partitioners_by_name(
    make_examples: Callable[..., Examples], partitioner: str, parameters: dict[str, Any]
) -> None:
    examples = make_examples(LABELS)
    assignment = assign_clients(examples, options(partitioner, 5, **parameters), 3)
    assert len(assignment.names) == 5
    assert assignment.names[0] == "client-0000"
    again = assign_clients(examples, options(partitioner, 5, **parameters), 3)
    assert (assignment.client == again.client).all()
    other = assign_clients(examples, options(partitioner, 5, **parameters), 4)
    assert (assignment.client != other.client).any()


def test_rows_are_shuffled_first(make_examples: Callable[..., Examples]) -> None:
    """IidPartitioner cuts the rows as they come; sorted labels would make it one class each."""
    assignment = assign_clients(make_examples(LABELS), options("IidPartitioner", 10), 0)
    table = np.zeros((10, 10))
    np.add.at(table, (assignment.client, LABELS), 1)
    assert (table > 0).sum(axis=1).min() >= 8


def test_sizes_and_natural_ids(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1] * 10, domains=[0, 1] * 10, clients=np.arange(20) % 5)
    sized = assign_clients(examples, options("SizePartitioner", partition_sizes=[5, 15]), 0)
    assert np.bincount(sized.client).tolist() == [5, 15]
    natural = assign_clients(examples, options("NaturalIdPartitioner"), 0)
    pairs = set(zip(natural.client.tolist(), examples.clients.tolist(), strict=True))
    assert len(pairs) == 5
    by_domain = assign_clients(examples, options("NaturalIdPartitioner", partition_by="domain"), 0)
    assert sorted(by_domain.domains) == ["a", "b"]


def test_refusals(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(LABELS)
    assert "Did you mean 'IidPartitioner'" in refusal(examples, "IIDPartitioner", 5)
    assert "unknown" in refusal(examples, "VerticalEvenPartitioner", 5)
    assert "unknown" in refusal(examples, None, 5)
    assert "Did you mean 'alpha'" in refusal(examples, "DirichletPartitioner", 5, alpa=1.0)
    assert "allowed: alpha" in refusal(examples, "DirichletPartitioner", 5)
    assert "two different numbers" in refusal(examples, "IidPartitioner", 5, num_partitions=6)
    assert "at most 400" in refusal(examples, "IidPartitioner", 401)
    assert "gave up" in refusal(examples, "DirichletPartitioner", 5, alpha=-1.0)
    assert "gave up" in refusal(examples, "NaturalIdPartitioner")
    text = refusal(examples, "PathologicalPartitioner", 2, num_classes_per_partition=3)
    assert "to nobody" in text
    assert "gave up" in refusal(
        examples, "PathologicalPartitioner", 2, num_classes_per_partition=11
    )


def test_endless_retries_end(make_examples: Callable[..., Examples]) -> None:
    text = refusal(
        make_examples(LABELS), "DirichletPartitioner", 100, alpha=0.01, min_partition_size=4
    )
    assert "max number of attempts" in text


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_dirichlet_is_distributed_like_theirs(
    make_examples: Callable[..., Examples], alpha: float
) -> None:
    """The largest share of a class any client has, averaged over classes and seeds."""
    examples = make_examples(LABELS)
    ours = Clients(partition="dirichlet", alpha=alpha, num=8)
    theirs = options("DirichletPartitioner", 8, alpha=alpha, min_partition_size=0)

    def mean_max_share(clients: Clients) -> float:
        shares = []
        for seed in range(12):
            table = np.zeros((8, 10))
            np.add.at(table, (assign_clients(examples, clients, seed).client, LABELS), 1)
            shares.append((table / 40).max(axis=0).mean())
        return np.mean(shares)

    assert mean_max_share(ours) == pytest.approx(mean_max_share(theirs), abs=0.06)


def test_iid_is_distributed_like_theirs(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(LABELS)

    def mean_max_share(clients: Clients) -> float:
        shares = []
        for seed in range(12):
            table = np.zeros((8, 10))
            np.add.at(table, (assign_clients(examples, clients, seed).client, LABELS), 1)
            shares.append((table / 40).max(axis=0).mean())
        return np.mean(shares)

    assert mean_max_share(Clients(num=8)) == pytest.approx(
        mean_max_share(options("IidPartitioner", 8)), abs=0.02
    )
