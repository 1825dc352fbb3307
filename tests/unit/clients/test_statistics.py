"""Statistics of clients against sums written out row by row."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedtl.clients import statistics as module
from fedtl.clients.statistics import fourier_map, pack_symmetric, statistics, unpack_symmetric
from fedtl.errors import InputError
from fedtl.plans import RoundPlan, Statistics
from fedtl.types import LocalTraining, Population, Rows


def plan_for(clients: list[int], asked: Statistics) -> RoundPlan:
    ids = np.array(clients, np.int64)
    keys = np.zeros(len(ids), np.uint64)
    return RoundPlan(2, ids, keys, LocalTraining(1, 1, 0.1), task="statistics", statistics=asked)


def zero_head(classes: int, width: int) -> dict[str, np.ndarray]:
    return {"weight": np.zeros((classes, width), np.float32), "bias": np.zeros(classes, np.float32)}


def oracle(population: Population, client: int, asked: Statistics, classes: int) -> dict:
    """One row after the other, float64."""
    data = population.client(client)
    width = asked.width(data.features.shape[1])
    out = {
        "counts": np.zeros(classes, np.int64),
        "sums": np.zeros((classes, width)),
        "class_grams": np.zeros((classes, width, width)),
    }
    for x, y in zip(data.features, data.labels, strict=True):
        z = x.astype(np.float64)
        if asked.random_features:
            omega, shift = fourier_map(len(x), asked.random_features, asked.scale, asked.key)
            z = np.sqrt(2 / asked.random_features) * np.cos(z @ omega + shift)
        z = np.append(z, 1.0) if asked.bias else z
        out["counts"][y] += 1
        out["sums"][y] += z
        out["class_grams"][y] += np.outer(z, z)
    out["gram"] = out["class_grams"].sum(axis=0)
    return out


CASES = [
    Statistics(),
    Statistics(bias=False),
    Statistics(gram=False),
    Statistics(class_grams=True),
    Statistics(gram=False, class_grams=True, bias=False),
    Statistics(random_features=17, scale=0.3, key=5),
]


@pytest.mark.parametrize("asked", CASES, ids=str)
@pytest.mark.parametrize("form", ["float32", "float16", "strided"])
def test_sums_are_those_of_the_rows(asked, form, population, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)  # more than one block, slice and tile
    monkeypatch.setattr(module, "SLICE_ROWS", 3)
    monkeypatch.setattr(module, "TILE", 4)
    features = population.features
    if form == "float16":
        features = features.astype(np.float16)
    elif form == "strided":
        features = np.repeat(features, 2, axis=1)[:, ::2]
    population = replace(population, features=features)
    plan = plan_for([0, 2, 3], asked)
    got = statistics(population, zero_head(3, 9), plan)
    assert {n: (t.shape[1:], t.dtype) for n, t in got.tensors.items()} == plan.reply(
        zero_head(3, 9)
    )
    for i, client in enumerate([0, 2, 3]):
        want = oracle(population, client, asked, 3)
        for name, tensor in got.tensors.items():
            own = tensor[i]
            if name == "gram":
                own = unpack_symmetric(own)
            elif name == "class_grams":
                own = np.stack([unpack_symmetric(packed) for packed in own])
            np.testing.assert_allclose(own, want[name], rtol=1e-12, atol=1e-11)
    assert got.num_examples.tolist() == [30, 55, 12]
    assert np.isnan(got.loss).all()
    assert got.round == 2


def test_bits_depend_on_neither_threads_nor_company() -> None:
    rng = np.random.default_rng(1)
    sizes = [700, 1, 1300, 40]
    total, width = sum(sizes), 300
    population = Population(
        rng.normal(size=(total, width)).astype(np.float32),
        rng.integers(0, 4, total).astype(np.int32),
        tuple("abcd"),
        Rows(rng.permutation(total), np.cumsum([0, *sizes])),
        Rows(np.empty(0, np.int64), np.zeros(5, np.int64)),
        tuple("wxyz"),
        ("",) * 4,
    )
    head = zero_head(4, width)

    def bits(clients: list[int], threads: int) -> list[bytes]:
        got = statistics(population, head, plan_for(clients, Statistics()), threads=threads)
        return [b"".join(t[i].tobytes() for t in got.tensors.values()) for i in range(len(clients))]

    alone = [bits([k], 1)[0] for k in range(4)]
    for threads in (1, 2, 3, 5):
        assert bits([0, 1, 2, 3], threads) == alone


def test_a_client_without_rows_gives_zeros(population) -> None:
    empty = replace(
        population, train=Rows(population.train.index[:30], np.array([0, 30, 30, 30, 30, 30]))
    )
    got = statistics(empty, zero_head(3, 9), plan_for([1], Statistics(class_grams=True)))
    assert not any(tensor.any() for tensor in got.tensors.values())
    assert got.num_examples.tolist() == [0]


def test_a_label_outside_the_classes_is_refused_by_name(population) -> None:
    with pytest.raises(InputError, match=r"client-0.*0 to 1"):
        statistics(population, zero_head(2, 9), plan_for([0, 1], Statistics()))
    with pytest.raises(InputError, match="unknown client"):
        statistics(population, zero_head(3, 9), plan_for([7], Statistics()))


def test_a_value_that_is_not_finite_shows_in_the_sums(population) -> None:
    broken = population.features.copy()
    broken[population.train.of(1)[0], 4] = np.nan
    got = statistics(
        replace(population, features=broken), zero_head(3, 9), plan_for([0, 1], Statistics())
    )
    assert np.isfinite(got.tensors["gram"][0]).all()
    assert not np.isfinite(got.tensors["gram"][1]).all()


def test_packing_is_the_upper_triangle_by_rows() -> None:
    matrix = np.arange(16.0).reshape(4, 4)
    packed = pack_symmetric(matrix)
    assert packed.tolist() == matrix[np.triu_indices(4)].tolist()
    whole = unpack_symmetric(packed)
    assert (whole == whole.T).all()
    assert (np.triu(whole) == np.triu(matrix)).all()
    for width in range(1, 60):
        assert unpack_symmetric(np.zeros(width * (width + 1) // 2)).shape == (width, width)


def test_random_features_approach_the_gaussian_kernel() -> None:
    # E z(x) z(y) = exp(-scale^2 |x - y|^2 / 2), Rahimi and Recht 2007, section 3.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5))
    omega, shift = fourier_map(5, 20000, 0.7, 9)
    z = np.sqrt(2 / 20000) * np.cos(x @ omega + shift)
    expected = np.exp(-0.49 * np.square(x[0] - x[1]).sum() / 2)
    assert abs(z[0] @ z[1] - expected) < 4 / np.sqrt(20000)  # four standard errors


def test_memory_follows_the_gram_matrix_and_not_the_rows() -> None:
    width, rng = 400, np.random.default_rng(0)
    gram = 8 * (width + 1) ** 2

    def peak(rows: int) -> int:
        none = np.zeros(2, np.int64)
        population = Population(
            rng.standard_normal((rows, width), np.float32),
            np.zeros(rows, np.int32),
            ("a", "b"),
            Rows(np.arange(rows), np.array([0, rows])),
            Rows(none[:0], none),
            ("one",),
            ("",),
        )
        tracemalloc.start()
        statistics(population, zero_head(2, width), plan_for([0], Statistics()), threads=2)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    few, many = peak(1000), peak(5000)
    # The answer is half a Gram matrix, a block of rows 1.3, the products of two threads 0.8.
    assert few < 4 * gram
    assert many - few < 0.2 * gram
