"""Laws that every partition obeys."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.data.clients import split_clients
from fedtl.data.examples import Examples
from fedtl.data.partitions import assign_clients
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients

OWN = (
    "iid",
    "dirichlet",
    "dirichlet_capacity",
    "label_quantity",
    "shards",
    "quantity",
    "domain",
    "natural",
)


@st.composite
def populations(draw: Any) -> Examples:
    """Any labels, domains and natural clients, up to 120 rows."""
    size = draw(st.integers(1, 120))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    top = [draw(st.integers(1, 6)) for _ in range(3)]
    labels, domains, clients = (generator.integers(0, t, size).astype(np.int32) for t in top)
    return Examples(
        labels,
        tuple(map(str, range(top[0]))),
        "f",
        features=np.zeros((size, 1), np.float32),
        domains=domains,
        domain_names=tuple(f"domain{i}" for i in range(top[1])),
        clients=clients,
        client_names=tuple(f"site{i}" for i in range(top[2])),
    )


requests = st.builds(
    Clients,
    partition=st.sampled_from(OWN),
    num=st.none() | st.integers(1, 130),
    within_domains=st.booleans(),
    alpha=st.sampled_from([1e-8, 0.01, 0.5, 1e6, float("inf")]),
    shards_per_client=st.integers(1, 4),
    quantity=st.sampled_from(["lognormal", "zipf"]),
    sigma=st.sampled_from([0.0, 1.0, 30.0]),
    exponent=st.sampled_from([0.0, 1.0, 30.0]),
    min_examples=st.integers(1, 3),
)


@settings(max_examples=300, deadline=None)
@given(populations(), requests, st.integers(0, 2**63 - 1))
def test_exact_cover_or_a_refusal_that_says_what_would_do(
    examples: Examples, clients: Clients, seed: int
) -> None:
    refused = None
    try:
        assignment = assign_clients(examples, clients, seed)
    except InputError as error:
        refused = error
    if refused:
        assert refused.allowed or refused.do
        return
    num = len(assignment.names)
    assert assignment.client.shape == (len(examples),)
    assert assignment.client.min() >= 0
    assert assignment.client.max() < num
    assert len(set(assignment.names)) == num == len(assignment.domains)
    if clients.num is not None:
        assert num == clients.num
    held = np.bincount(assignment.client, minlength=num)
    if clients.partition != "dirichlet":
        assert held.min() >= 1
    if clients.partition == "dirichlet_capacity":
        assert held.min() >= clients.min_examples
    if clients.partition == "domain" or (clients.within_domains and clients.partition != "natural"):
        names = np.array(examples.domain_names)[examples.domains]
        assert (np.array(assignment.domains)[assignment.client] == names).all()
    again = assign_clients(examples, clients, seed)
    assert (again.client == assignment.client).all()
    assert again.names == assignment.names


@settings(max_examples=150, deadline=None)
@given(populations(), requests, st.integers(0, 2**63 - 1), st.sampled_from([0.01, 0.2, 0.5, 0.97]))
def test_a_split_covers_the_clients_that_stay(
    examples: Examples, clients: Clients, seed: int, fraction: float
) -> None:
    try:
        assignment = assign_clients(examples, clients, seed)
        split = split_clients(assignment, examples, clients, fraction, seed)
    except InputError:
        return
    numbers = {name: k for k, name in enumerate(assignment.names)}
    assert set(numbers) == {*split.names, *(name for name, _ in split.excluded)}
    for place, name in enumerate(split.names):
        rows = np.sort(np.concatenate([split.train.of(place), split.test.of(place)]))
        mine = np.flatnonzero(assignment.client == numbers[name])
        assert (rows == mine).all()
        assert len(split.train.of(place)) >= 1
        assert len(mine) >= clients.min_examples
        assert abs(len(split.test.of(place)) - fraction * len(mine)) <= 1
    for name, held in split.excluded:
        assert held == (assignment.client == numbers[name]).sum() < clients.min_examples


def balanced(size: Any = 6000, classes: Any = 10) -> Examples:
    return Examples(
        (np.arange(size) % classes).astype(np.int32),
        tuple(map(str, range(classes))),
        "f",
        features=np.zeros((size, 1), np.float32),
        domains=(np.arange(size) // classes % 2).astype(np.int32),
        domain_names=("left", "right"),
    )


@pytest.mark.parametrize("partition", [name for name in OWN if name not in ("domain", "natural")])
@pytest.mark.parametrize("within", [False, True])
def test_another_seed_gives_another_partition(partition: str, within: bool) -> None:
    clients = Clients(partition=partition, within_domains=within)
    found = [assign_clients(balanced(), clients, seed).client for seed in range(4)]
    for i in range(4):
        for j in range(i):
            assert (found[i] != found[j]).mean() > 0.3


def jensen_shannon(table: Any) -> float:
    """Mean Jensen-Shannon divergence (bits) of the clients' label distributions to the pooled."""

    def entropy(p: Any) -> Any:
        return -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)

    p = table / table.sum(axis=1, keepdims=True)
    q = table.sum(axis=0) / table.sum()
    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean())


def test_skew_falls_as_alpha_grows_and_vanishes_in_the_limit() -> None:
    examples = balanced()
    skews = []
    for alpha in (0.01, 0.1, 1.0, 10.0, 1e6):
        clients = Clients(partition="dirichlet", alpha=alpha)
        table = np.zeros((10, 10))
        np.add.at(table, (assign_clients(examples, clients, 1).client, examples.labels), 1)
        skews.append(jensen_shannon(table[table.sum(axis=1) > 0]))
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.4
    assert skews[-1] < 0.01
