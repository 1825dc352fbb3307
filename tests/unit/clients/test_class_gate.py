"""Classes of which a client has few examples stay at home, whatever is summed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.clients.statistics import statistics
from fedtl.plans import Protection, RoundPlan, Statistics
from fedtl.strategies.admissible import inadmissible
from fedtl.strategies.validation import accept_updates
from fedtl.types import LocalTraining, Rows

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
KINDS = [
    Statistics(),
    Statistics(bias=False),
    Statistics(gram=False, bias=False),
    Statistics(gram=False, class_grams=True, bias=False),
    Statistics(random_features=9, scale=0.3),
]


def plan_for(asked: Statistics, safe: Protection | None) -> RoundPlan:
    clients, keys = np.arange(5), np.arange(5).astype(np.uint64)
    plan = RoundPlan(1, clients, keys, LocalTraining(1, 1, 0.1), task="statistics")
    return replace(plan, statistics=asked, protection=safe, noise_keys=keys)


def without_small_classes(population, least: int):
    """The same clients as if they never had their small classes."""
    kept = [population.train.of(k) for k in range(5)]
    for k, rows in enumerate(kept):
        labels = population.labels[rows]
        kept[k] = rows[np.bincount(labels, minlength=3)[labels] >= least]
    ends = np.cumsum([0, *map(len, kept)])
    return replace(population, train=Rows(np.concatenate(kept), ends))


@pytest.mark.parametrize("asked", KINDS, ids=str)
@pytest.mark.parametrize("row_clip", [0.0, 2.0])
def test_the_sums_are_those_without_the_small_classes(asked, row_clip, population) -> None:
    least = 4
    safe = Protection(row_clip=row_clip, least_per_class=least)
    got = statistics(population, HEAD, plan_for(asked, safe))
    smaller = without_small_classes(population, least)
    assert smaller.train.counts.sum() < population.train.counts.sum()
    plain = plan_for(asked, Protection(row_clip=row_clip))
    expected = statistics(smaller, HEAD, plain)
    for name, tensor in expected.tensors.items():
        assert got.tensors[name] == pytest.approx(tensor, rel=1e-12, abs=1e-12), name
    assert not ((got.tensors["counts"] > 0) & (got.tensors["counts"] < least)).any()
    assert (got.num_examples == population.train.counts).all()  # these everybody knows


def test_a_gate_above_everybody_leaves_zeros(population) -> None:
    got = statistics(population, HEAD, plan_for(Statistics(), Protection(least_per_class=100)))
    assert not any(tensor.any() for tensor in got.tensors.values())


@pytest.mark.parametrize("asked", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
@pytest.mark.parametrize(
    "safe", [Protection(least_per_class=4), Protection(row_clip=2.0, least_per_class=4)], ids=str
)
def test_honest_answers_pass_under_protection(asked, safe, scale, population) -> None:
    features = (population.features * scale).astype(np.float32)
    plan = plan_for(asked, safe)
    reply = statistics(replace(population, features=features), HEAD, plan)
    accepted, _ = accept_updates([reply], plan, HEAD, population.train.counts, 10.0)
    assert accepted.failures == ()
    assert len(accepted.clients) == 5


def refused(change, population) -> str | None:
    asked, safe = Statistics(), Protection(row_clip=2.0, least_per_class=4)
    reply = statistics(population, HEAD, plan_for(asked, safe))
    own = {name: tensor[2].copy() for name, tensor in reply.tensors.items()}
    assert inadmissible(own, asked, 55, safe) is None
    change(own)
    return inadmissible(own, asked, 55, safe)


def test_what_protected_rows_cannot_give_is_refused(population) -> None:
    def small_class(own) -> None:
        own["counts"][0] = 3

    def long_rows(own) -> None:
        own["gram"] *= 3

    def bias(own) -> None:
        own["sums"][1, -1] *= 2

    def negative(own) -> None:
        own["sums"][1, -1] = -1

    def many(own) -> None:
        own["counts"][1] += 50

    def scaled(own) -> None:
        own["sums"] *= 3
        own["sums"][:, -1] /= 3

    reasons = [refused(change, population) for change in (small_class, long_rows, bias)]
    reasons += [refused(change, population) for change in (negative, many, scaled)]
    expected = ["fewer than 4", "rows can have", "so many rows", "so many rows", "add up to"]
    expected.append("not positive semidefinite")
    for reason, words in zip(reasons, expected, strict=True):
        assert reason is not None
        assert words in reason


def test_without_a_gate_counts_must_add_up(population) -> None:
    reply = statistics(population, HEAD, plan_for(KINDS[0], Protection(least_per_class=4)))
    own = {name: tensor[1] for name, tensor in reply.tensors.items()}
    assert own["counts"].sum() < 7
    assert "add up" in str(inadmissible(own, KINDS[0], 7))


def test_noised_answers_are_not_judged(population) -> None:
    safe = Protection(row_clip=2.0, noise=5.0)
    plan = plan_for(Statistics(), safe)
    reply = statistics(population, HEAD, plan)
    own = {name: tensor[0] for name, tensor in reply.tensors.items()}
    assert inadmissible(own, Statistics(), 30, safe) is not None
    whole = {**reply.tensors, "counts": reply.tensors["counts"].astype(np.int64)}  # all 0
    accepted, _ = accept_updates(
        [replace(reply, tensors=whole)], plan, HEAD, population.train.counts, 10.0
    )
    assert len(accepted.clients) == 5


@pytest.mark.parametrize(
    "safe", [Protection(row_clip=2.0), Protection(row_clip=2.0, clip=9.0, noise=1.0)]
)
def test_bits_depend_on_neither_threads_nor_company(safe, population) -> None:
    plan = plan_for(Statistics(), safe)
    whole = statistics(population, HEAD, plan)
    shared = statistics(population, HEAD, plan, threads=4)
    alone = statistics(population, HEAD, plan.part(np.array([3])))
    for name, tensor in whole.tensors.items():
        assert (shared.tensors[name] == tensor).all()
        assert (alone.tensors[name][0] == tensor[3]).all()


def test_real_clients_draw_noise_that_nobody_can_repeat(population) -> None:
    plan = replace(plan_for(Statistics(), Protection(row_clip=2.0, noise=1.0)), noise_keys=None)
    one, two = (statistics(population, HEAD, plan, secure=True).tensors["sums"] for _ in range(2))
    assert (one != two).all()
    with pytest.raises(AssertionError, match="has a key"):
        statistics(population, HEAD, plan)
