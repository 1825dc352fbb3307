"""However rows are dealt to clients and in whatever order they report, the sums are the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.clients.statistics import statistics, unpack_symmetric
from fedtl.plans import RoundPlan, Statistics
from fedtl.strategies import ServerState
from fedtl.strategies.class_means import CCVR, FedLDA, FedNCM
from fedtl.strategies.closed_form import AFL, Fed3R, OneShot
from fedtl.types import LocalTraining, Population, Rows

N, D, C = 120, 7, 3
HEAD = {"weight": np.zeros((C, D), np.float32), "bias": np.zeros(C, np.float32)}
STRATEGIES = [Fed3R(), Fed3R(random_features=11, scale=0.5), AFL(), FedNCM(), FedLDA(), CCVR()]


def deal(rows: np.ndarray, sizes: list[int], scale: float) -> Population:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, N).astype(np.int32)
    features = scale * (rng.normal(size=(N, D)) + 0.5 + 2 * np.eye(C, D)[labels])
    people = len(sizes)
    return Population(
        features.astype(np.float32),
        labels,
        ("a", "b", "c"),
        Rows(rows, np.cumsum([0, *sizes])),
        Rows(np.empty(0, np.int64), np.zeros(people + 1, np.int64)),
        tuple(map(str, range(people))),
        ("",) * people,
    )


def summed(strategy: OneShot, population: Population, order: list[int]) -> ServerState:
    """The state after clients reported one by one in an order of their own."""
    state = strategy.init(HEAD, population.num_clients)
    training = LocalTraining(1, 1, 0.1)
    for client in order:
        plan = RoundPlan(1, np.array([client]), np.zeros(1, np.uint64), training)
        state = strategy.absorb(
            state, statistics(population, state.head, strategy.plan(state, plan))
        )
    return state


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, N), min_size=0, max_size=12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_heads_do_not_depend_on_the_split_or_the_order(cuts, seed, scale, strategy) -> None:
    rng = np.random.default_rng(seed)
    ends = [0, *sorted(cuts), N]
    split = deal(rng.permutation(N), np.diff(ends).tolist(), scale)
    pooled = deal(np.arange(N), [N], scale)
    one = summed(strategy, pooled, [0])
    many = summed(strategy, split, rng.permutation(split.num_clients).tolist())
    for name in set(one.slots) - {"reported"}:
        tolerance = 1e-12 * max(1e-9, float(np.abs(one.slots[name]).max()))
        np.testing.assert_allclose(many.slots[name], one.slots[name], rtol=0, atol=tolerance)
    if isinstance(strategy, CCVR):  # its samples follow from the sums, its search stops early
        return
    a, b = strategy.solved(dict(one.slots)), strategy.solved(dict(many.slots))
    if strategy == AFL():  # no ridge at all
        assert not a.singular
    for x, y in ((a.weight, b.weight), (a.bias, b.bias)):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-10 * max(1e-9, float(np.abs(x).max())))


@settings(max_examples=20, deadline=None)
@given(
    dealt=st.lists(st.integers(0, 5), min_size=N, max_size=N),
    asked=st.sampled_from([Statistics(), Statistics(bias=False), Statistics(class_grams=True)]),
)
def test_nothing_honest_is_refused(dealt, asked) -> None:
    from fedtl.strategies.admissible import inadmissible

    owner = np.array(dealt)
    sizes = np.bincount(owner, minlength=6)
    population = deal(np.argsort(owner, kind="stable"), sizes.tolist(), 1.0)
    ids = np.arange(6)
    plan = RoundPlan(
        1,
        ids,
        np.zeros(6, np.uint64),
        LocalTraining(1, 1, 0.1),
        task="statistics",
        statistics=asked,
    )
    got = statistics(population, HEAD, plan)
    for k in range(6):
        own = {name: tensor[k] for name, tensor in got.tensors.items()}
        assert inadmissible(own, asked, int(sizes[k])) is None
        assert np.linalg.eigvalsh(unpack_symmetric(own["gram"])).min() > -1e-9 * N * D
