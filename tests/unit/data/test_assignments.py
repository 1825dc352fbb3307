"""The partitions: names, domains, distributions and refusals (tests/property has their laws)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedtl.data.examples import Examples
from fedtl.data.partitions import (
    PARTITIONS,
    assign_clients,
    deal_distinct,
    deal_iid,
)
from fedtl.data.skews import dirichlet_shares
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients

TEN_CLASSES = np.arange(1000) % 10


def counts(examples: Examples, assignment: Any) -> npt.NDArray[np.int64]:
    """Examples by client and class, [K, C]."""
    table = np.zeros((len(assignment.names), len(examples.classes)), dtype=np.int64)
    np.add.at(table, (assignment.client, examples.labels), 1)
    return table


def refusal(examples: Examples, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        assign_clients(examples, Clients(**options), 0)
    assert caught.value.exit_code == 2
    return caught.value.line()


def test_the_table_has_every_name_of_the_schema() -> None:
    allowed = Clients.model_fields["partition"].annotation.__args__
    assert set(PARTITIONS) == set(allowed)


def test_names_and_domains_without_domains(make_examples: Callable[..., Examples]) -> None:
    assignment = assign_clients(make_examples(TEN_CLASSES), Clients(num=3), 0)
    assert assignment.names == ("client-0000", "client-0001", "client-0002")
    assert assignment.domains == ("", "", "")
    assert assignment.client.dtype == np.int32
    wide = assign_clients(make_examples([0, 1] * 6000), Clients(num=12_000), 0)
    assert (wide.names[7], wide.names[-1]) == ("client-00007", "client-11999")
    assert len(assign_clients(make_examples(TEN_CLASSES), Clients(), 0).names) == 10


def test_a_client_of_several_domains_is_mixed(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1, 0, 1, 0], domains=[0, 0, 0, 1, 1], clients=[0, 0, 1, 1, 2])
    assignment = assign_clients(examples, Clients(partition="natural"), 0)
    assert assignment.names == ("site 0", "site 1", "site 2")
    assert assignment.domains == ("a", "mixed", "b")
    assert assignment.client.tolist() == [0, 0, 1, 1, 2]


def test_iid_sizes_differ_by_one_at_most(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(np.arange(103) % 4)
    assignment = assign_clients(examples, Clients(num=10), 0)
    assert set(np.bincount(assignment.client).tolist()) == {10, 11}


def test_dirichlet_shares_for_any_alpha() -> None:
    generator = np.random.default_rng(0)
    for alpha in (1e-300, 1e-3, 0.01, 1.0, 1e6, 1e300):
        for num in (1, 2, 1000):
            shares = dirichlet_shares(alpha, num, generator)
            assert np.isfinite(shares).all()
            assert (shares >= 0).all()
            assert shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_have_the_moments_of_a_dirichlet(alpha: float) -> None:
    """Mean 1/K and variance (1/K)(1 - 1/K) / (K alpha + 1)."""
    generator = np.random.default_rng(1)
    draws = np.array([dirichlet_shares(alpha, 5, generator) for _ in range(4000)])
    variance = 0.2 * 0.8 / (5 * alpha + 1)
    assert draws.mean(axis=0) == pytest.approx(np.full(5, 0.2), abs=5 * (variance / 4000) ** 0.5)
    assert draws.var(axis=0).mean() == pytest.approx(variance, rel=0.1)


def test_dirichlet_with_tiny_alpha_gives_each_class_to_few(
    make_examples: Callable[..., Examples],
) -> None:
    """With K alpha = 1 and 100 rows a class, 1 + 1/2 + ... + 1/100 = 5.2 clients are expected."""
    examples = make_examples(TEN_CLASSES)
    for alpha, low, high in ((1e-3, 4, 8), (1e-9, 1, 1)):
        options = Clients(partition="dirichlet", alpha=alpha, num=1000)
        table = counts(examples, assign_clients(examples, options, 0))
        assert table.sum() == 1000
        assert low <= (table > 0).sum(axis=0).mean() <= high


def test_dirichlet_counts_are_unbiased_for_tiny_classes(
    make_examples: Callable[..., Examples],
) -> None:
    """One example per class and many clients: no client is favoured by rounding."""
    examples = make_examples(np.arange(50))
    held = np.zeros(10)
    for seed in range(100):
        options = Clients(partition="dirichlet", alpha=1.0, num=10)
        held += np.bincount(assign_clients(examples, options, seed).client, minlength=10)
    assert held.sum() == 5000
    assert np.abs(held - 500).max() < 6 * (500 * 0.9) ** 0.5


@pytest.mark.parametrize(("num", "each"), [(10, 2), (10, 1), (5, 4), (20, 3), (100, 2), (10, 10)])
def test_shards_give_exactly_that_many_classes(
    make_examples: Callable[..., Examples], num: int, each: int
) -> None:
    examples = make_examples(np.arange(6000) % 10)
    for seed in range(5):
        options = Clients(partition="shards", num=num, shards_per_client=each)
        table = counts(examples, assign_clients(examples, options, seed))
        assert ((table > 0).sum(axis=1) == each).all()
        assert (table.sum(axis=1) == 6000 // num).all()


def test_pairs_of_shards_vary_between_seeds(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(TEN_CLASSES)
    options = Clients(partition="shards", num=10)
    pairs = set()
    for seed in range(30):
        table = counts(examples, assign_clients(examples, options, seed))
        pairs |= {tuple(np.flatnonzero(row)) for row in table}
    assert len(pairs) > 40  # of 45


def test_distinct_cards_where_it_can_be_had() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        sizes = generator.integers(1, 8, 7)
        kinds = np.repeat(np.arange(7), sizes)
        num = 7
        kinds = kinds[: len(kinds) // num * num]
        owner = deal_distinct(kinds.astype(np.int32), num, generator)
        assert (np.bincount(owner, minlength=num) == len(kinds) // num).all()
        assert len(set(zip(owner.tolist(), kinds.tolist(), strict=True))) == len(kinds)
    assert len(deal_distinct(np.zeros(9, np.int32), 3, np.random.default_rng(0))) == 9


def test_quantity_follows_its_law(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1] * 50_000)

    def sizes(seed: int = 0, **options: Any) -> npt.NDArray[np.int64]:
        clients = Clients(partition="quantity", **options)
        return np.bincount(assign_clients(examples, clients, seed).client)

    zipf = sizes(num=20, quantity="zipf", exponent=1.0)
    assert zipf == pytest.approx(zipf[0] / np.arange(1, 21), rel=0.01)
    assert set(sizes(num=10, quantity="zipf", exponent=0.0).tolist()) == {10_000}
    assert set(sizes(num=10, sigma=0.0).tolist()) == {10_000}
    logs = np.log(sizes(num=2000, sigma=0.7))
    assert logs.std() == pytest.approx(0.7, rel=0.1)
    assert sizes(num=1000, sigma=50.0).min() == 1


def test_domain_partition(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(np.arange(60) % 2, domains=[0] * 30 + [1] * 20 + [2] * 10)
    one_each = assign_clients(examples, Clients(partition="domain"), 0)
    assert one_each.names == one_each.domains == ("a", "b", "c")
    assert (one_each.client == examples.domains).all()
    more = assign_clients(examples, Clients(partition="domain", num=5), 0)
    assert more.names == ("a-0", "a-1", "b-0", "b-1", "c")
    assert more.domains == ("a", "a", "b", "b", "c")
    assert np.bincount(more.client).tolist() == [15, 15, 10, 10, 10]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity"])
def test_within_domains(make_examples: Callable[..., Examples], partition: str) -> None:
    examples = make_examples(np.arange(400) % 4, domains=np.arange(400) // 100)
    options = Clients(partition=partition, within_domains=True, num=6)
    assignment = assign_clients(examples, options, 3)
    assert assignment.names == ("a-0", "a-1", "b-0", "b-1", "c", "d")
    home = np.array([ord(name[0]) - ord("a") for name in assignment.names])
    assert (home[assignment.client] == examples.domains).all()


def test_within_domains_has_ten_clients_or_one_per_domain(
    make_examples: Callable[..., Examples],
) -> None:
    few = make_examples(np.arange(400) % 4, domains=np.arange(400) // 200)
    many = make_examples(np.arange(60) % 4, domains=np.arange(60) // 10)
    assert len(assign_clients(few, Clients(within_domains=True), 0).names) == 10
    assert len(assign_clients(many, Clients(within_domains=True, num=6), 0).names) == 6
    assert assign_clients(many, Clients(within_domains=True), 0).names[-1] == "f"


def test_domains_without_an_example_get_no_client(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples(np.arange(30) % 2, domains=np.arange(30) // 10)
    examples = examples.subset(np.flatnonzero(examples.domains != 1))
    assignment = assign_clients(examples, Clients(partition="domain"), 0)
    assert assignment.names == ("a", "c")


def test_too_many_clients(make_examples: Callable[..., Examples]) -> None:
    text = refusal(make_examples([0, 1] * 5), num=11)
    assert "11 clients for 10 examples" in text
    assert "--set clients.num=10" in text


@pytest.mark.parametrize("sizes", [(3, 1, 5), (5, 5, 2), (1, 9, 9), (4, 4, 4), (2, 2, 9)])
def test_the_feasible_number_within_domains_is_feasible_and_the_largest(
    make_examples: Callable[..., Examples], sizes: Any
) -> None:
    domains = np.repeat(np.arange(3), sizes)
    examples = make_examples(np.arange(len(domains)) % 2, domains=domains)
    text = refusal(examples, partition="domain", num=3 * 9 + 1)
    feasible = int(text.rpartition("=")[2])
    assert len(assign_clients(examples, Clients(partition="domain", num=feasible), 0).names)
    refusal(examples, partition="domain", num=feasible + 1)


def test_other_infeasible_requests(make_examples: Callable[..., Examples]) -> None:
    plain = make_examples([0, 1] * 10)
    both = make_examples([0, 1] * 10, domains=[0, 1] * 10, clients=np.arange(20) % 4)
    assert "at least 2, one per domain" in refusal(both, partition="domain", num=1)
    assert "data.domains" in refusal(plain, partition="domain")
    assert "clients.within_domains" in refusal(plain, within_domains=True)
    assert "'client'" in refusal(plain, partition="natural")
    assert "allowed: 4" in refusal(both, partition="natural", num=3)
    text = refusal(plain, partition="shards", num=5, shards_per_client=5)
    assert "at most 4 shards a client, or at most 4 clients" in text
    with pytest.raises(InputError, match="Did you mean 'dirichlet'"):
        assign_clients(plain, Clients.model_construct(partition="dirichlett"), 0)


def test_a_clash_of_names(make_examples: Callable[..., Examples]) -> None:
    import dataclasses

    examples = make_examples([0, 1] * 6, domains=[0] * 8 + [1] * 4)
    clashing = dataclasses.replace(examples, domain_names=("x", "x-1"))
    text = refusal(clashing, partition="domain", num=3)
    assert "same name" in text
    assert "x-1" in text


def test_deal_iid_does_not_look_at_labels() -> None:
    generator = (np.random.default_rng(5), np.random.default_rng(5))
    a = deal_iid(np.zeros(9, np.int32), 3, Clients(), generator[0])
    b = deal_iid(np.arange(9, dtype=np.int32), 3, Clients(), generator[1])
    assert a.tolist() == b.tolist()
