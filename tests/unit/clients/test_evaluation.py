from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl.clients.evaluation import evaluate_clients, evaluate_heads, evaluate_own
from fedtl.errors import InputError
from fedtl.types import ClientMetrics, Float32, Int64, Population, Rows

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
SIZES = [11, 0, 3, 150, 5]
HEADS = {"linear": oracle.linear_head(19, 4), "mlp": oracle.mlp_head(19, [7], 4)}


def judged(
    people: Population, rows: Int64, head: Mapping[str, Float32]
) -> tuple[float, list[int], list[int]]:
    """Loss, right predictions and examples by class, row by row."""
    correct, count, loss = [0] * 4, [0] * 4, 0.0
    tensors = {name: torch.tensor(tensor).double() for name, tensor in head.items()}
    for row in rows.tolist():
        x = torch.from_numpy(people.features[row][None]).double()
        scores = oracle.scores(tensors, x).numpy()[0]
        label = people.labels[row]
        loss += np.logaddexp.reduce(scores) - scores[label]
        count[label] += 1
        correct[label] += int(np.flatnonzero(scores == scores.max())[0] == label)
    return loss, correct, count


def check(metrics: ClientMetrics, expected: list[tuple[float, list[int], list[int]]]) -> None:
    losses, correct, count = zip(*expected, strict=True)
    np.testing.assert_allclose(metrics.loss_sum, losses, rtol=1e-5, atol=1e-6)
    assert metrics.correct.tolist() == list(correct)
    assert metrics.count.tolist() == list(count)


def several(kind: str, num: int) -> dict[str, Float32]:
    make = oracle.linear_head if kind == "linear" else lambda d, c, s: oracle.mlp_head(d, [7], c, s)
    heads = [make(19, 4, seed) for seed in range(num)]
    return {name: np.stack([head[name] for head in heads]) for name in heads[0]}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("threads", [1, 2])
def test_one_head_on_every_client(kind: str, threads: int) -> None:
    people = oracle.federation(SIZES, 19, 4)
    clients = np.array([0, 1, 3, 4])
    metrics = evaluate_clients(people, HEADS[kind], clients, threads=threads)
    check(metrics, [judged(people, people.test.of(c), HEADS[kind]) for c in clients])
    assert metrics.clients.tolist() == [0, 1, 3, 4]


def test_splits() -> None:
    people = oracle.federation(SIZES, 19, 4)
    empty = Rows(np.empty(0, np.int64), np.zeros(6, np.int64))
    people = dataclasses.replace(people, test=empty)
    everyone = np.arange(5)
    assert evaluate_clients(people, HEADS["linear"], everyone).count.sum() == 0
    train = evaluate_clients(people, HEADS["linear"], everyone, split="train")
    assert train.count.sum(1).tolist() == SIZES
    with pytest.raises(InputError, match="unknown split"):
        evaluate_clients(people, HEADS["linear"], everyone, split="validation")


@pytest.mark.parametrize("kind", HEADS)
def test_each_client_with_its_own_head(kind: str) -> None:
    people, heads = oracle.federation(SIZES, 19, 4), several(kind, 5)
    one = [{name: tensor[i] for name, tensor in heads.items()} for i in range(5)]
    metrics = evaluate_own(people, heads, np.arange(5), threads=2)
    check(metrics, [judged(people, people.test.of(i), one[i]) for i in range(5)])


@pytest.mark.parametrize("kind", HEADS)
def test_many_heads_on_the_same_rows(kind: str) -> None:
    people, heads = oracle.federation(SIZES, 19, 4), several(kind, 37)
    one = [{name: tensor[i] for name, tensor in heads.items()} for i in range(37)]
    rows = np.arange(5, 95)
    metrics = evaluate_heads(people.features, people.labels, rows, heads, 4, threads=2)
    check(metrics, [judged(people, rows, head) for head in one])
    assert metrics.clients.tolist() == list(range(37))
    strided = np.repeat(people.features, 2, axis=1)[:, ::2]
    again = evaluate_heads(strided, people.labels, rows, heads, 4)
    assert np.array_equal(again.loss_sum, metrics.loss_sum)


@pytest.mark.parametrize("kind", HEADS)
def test_ties_go_to_the_lowest_class(kind: str) -> None:
    people = oracle.federation([40], 19, 4)
    head = {name: np.zeros_like(tensor) for name, tensor in HEADS[kind].items()}
    metrics = evaluate_clients(people, head, np.array([0]))
    assert metrics.correct.tolist() == [[metrics.count[0, 0], 0, 0, 0]]
    np.testing.assert_allclose(metrics.loss_sum, 40 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_nan_survives(kind: str) -> None:
    people = oracle.federation([4, 6], 19, 4)
    people.features[people.test.of(1)[0], 0] = np.nan
    loss = evaluate_clients(people, HEADS[kind], np.arange(2)).loss_sum
    assert np.isfinite(loss[0])
    assert np.isnan(loss[1])


@pytest.mark.parametrize("kind", HEADS)
def test_nobody_and_wrong_labels(kind: str) -> None:
    people = oracle.federation(SIZES, 19, 4)
    nobody = np.empty(0, np.int64)
    heads = several(kind, 1)
    assert evaluate_clients(people, HEADS[kind], nobody).count.shape == (0, 4)
    assert evaluate_own(people, {n: t[:0] for n, t in heads.items()}, nobody).count.shape == (0, 4)
    people.labels[people.test.of(3)[-1]] = -1
    with pytest.raises(InputError, match=r"client 3 \(c3\)"):
        evaluate_clients(people, HEADS[kind], np.array([2, 3]))
    with pytest.raises(InputError, match="another number of classes"):
        evaluate_heads(people.features, people.labels, nobody, heads, 5)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_answers_one_by_one_are_the_counted_ones(kind: str, dtype: type) -> None:
    people = oracle.federation(SIZES, 19, 4)
    people = dataclasses.replace(people, features=people.features.astype(dtype))
    clients, right = np.array([0, 1, 3, 4]), []
    whole = evaluate_clients(people, HEADS[kind], clients, threads=2, right=right)
    assert [len(one) for one in right] == people.test.counts[clients].tolist()
    for i, client in enumerate(clients.tolist()):
        labels = people.labels[people.test.of(client)]
        assert np.bincount(labels[right[i]], minlength=4).tolist() == whole.correct[i].tolist()
    rows, several_right = people.train.of(3), []
    heads = several(kind, 40)
    found = evaluate_heads(
        people.features, people.labels, rows, heads, 4, threads=2, right=several_right
    )
    for i, one in enumerate(several_right):
        labels = people.labels[rows]
        assert np.bincount(labels[one], minlength=4).tolist() == found.correct[i].tolist()
    plain = evaluate_heads(people.features, people.labels, rows, heads, 4, threads=2)
    assert plain.loss_sum.tobytes() == found.loss_sum.tobytes()
