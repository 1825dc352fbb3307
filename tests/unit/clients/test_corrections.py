"""What each client adds to its gradients, against a loop in plain numpy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.clients.batched import train_batched
from fedtl.clients.batches import batch_order
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.types import LocalTraining

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
PLAIN = LocalTraining(2, 5, 0.1)
FULL = LocalTraining(2, 5, 0.1, momentum=0.9, weight_decay=0.01, proximal=0.1)
SIZES = [11, 0, 3, 24, 5, 1, 9, 2, 30, 10]
HEADS = {"linear": oracle.linear_head(19, 4), "mlp": oracle.mlp_head(19, [7], 4)}


def corrected(people, head, training, scale: float = 0.3):
    random = np.random.default_rng(11)
    return dataclasses.replace(
        oracle.plan_for(people, training),
        corrections={
            name: (scale * random.standard_normal((len(SIZES), *t.shape))).astype(np.float32)
            for name, t in head.items()
        },
    )


def gradient(head, x, y):
    """Of the mean cross-entropy of a linear head or one with a hidden layer, by hand."""
    deep = "hidden.0.weight" in head
    inner = np.maximum(x @ head["hidden.0.weight"].T + head["hidden.0.bias"], 0) if deep else x
    scores = inner @ head["weight"].T + head["bias"]
    error = np.exp(scores - scores.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    found = {"weight": error.T @ inner, "bias": error.sum(0)}
    if deep:
        back = (error @ head["weight"]) * (inner > 0)
        found |= {"hidden.0.weight": back.T @ x, "hidden.0.bias": back.sum(0)}
    return found


def slow(people, head, plan, place: int):
    own, data = plan.training, people.client(int(plan.clients[place]))
    x, y = data.features.astype(float), data.labels
    start = {name: tensor.astype(float) for name, tensor in head.items()}
    w, speed = dict(start), dict.fromkeys(head, 0.0)
    for epoch in range(own.epochs):
        order = batch_order(int(plan.batch_keys[place]), len(y), epoch)
        for low in range(0, len(y), own.batch_size):
            chosen = order[low : low + own.batch_size]
            for name, found in gradient(w, x[chosen], y[chosen]).items():
                step = found + plan.corrections[name][place] + own.weight_decay * w[name]
                step = step + own.proximal * (w[name] - start[name]) + own.momentum * speed[name]
                speed[name] = step
            w = {name: w[name] - own.learning_rate * speed[name] for name in w}
    return w


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL, dataclasses.replace(PLAIN, momentum=0.5)])
def test_agrees_with_the_loop(kind: str, training: LocalTraining) -> None:
    people = oracle.federation(SIZES, 19, 4)
    plan = corrected(people, HEADS[kind], training)
    given = train_clients(people, HEADS[kind], plan)
    for place in range(len(SIZES)):
        for name, exact in slow(people, HEADS[kind], plan, place).items():
            np.testing.assert_allclose(given.tensors[name][place], exact, rtol=0, atol=3e-6)
    assert all(np.array_equal(given.tensors[n][1], HEADS[kind][n]) for n in HEADS[kind])


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL])
def test_neither_blocks_nor_threads_nor_company_change_a_bit(
    kind: str, training: LocalTraining
) -> None:
    people = oracle.federation(SIZES, 19, 4)
    plan = corrected(people, HEADS[kind], training)
    whole = train_clients(people, HEADS[kind], plan)
    others = [
        train_clients(people, HEADS[kind], plan, threads=threads, block_size=block)
        for threads, block in ((1, 1), (1, 3), (2, 4))
    ]
    others += [
        train_clients(people, HEADS[kind], plan.part(np.array(some)))
        for some in ([3], [0, 8], [1, 2, 3, 4, 5, 6, 7, 9])
    ]
    for other in others:
        places = np.isin(whole.clients, other.clients)
        for name in HEADS[kind]:
            assert other.tensors[name].tobytes() == whole.tensors[name][places].tobytes()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL])
def test_corrections_of_zero_are_none_to_the_bit(kind: str, training: LocalTraining) -> None:
    people = oracle.federation(SIZES, 19, 4)
    none = train_clients(people, HEADS[kind], oracle.plan_for(people, training))
    for scale in (0.0, -0.0, 1e-3):
        given = train_clients(people, HEADS[kind], corrected(people, HEADS[kind], training, scale))
        for name in HEADS[kind]:
            same = np.array_equal(given.tensors[name], none.tensors[name])
            assert same == (scale == 0)


def test_the_batched_path_agrees_with_the_kernel() -> None:
    people, head = oracle.federation(SIZES, 19, 4), HEADS["linear"]
    plan = corrected(people, head, FULL)
    fused = train_clients(people, head, plan)
    starts = {name: tensor[None] for name, tensor in head.items()}
    batched = train_batched(people, starts, plan, threads=1, device="cpu")
    for name in head:
        np.testing.assert_allclose(batched.tensors[name], fused.tensors[name], rtol=0, atol=3e-6)


@pytest.mark.parametrize("what", ["name", "shape"])
def test_corrections_that_do_not_fit_are_refused(what: str) -> None:
    people, head = oracle.federation(SIZES, 19, 4), HEADS["linear"]
    plan = corrected(people, head, PLAIN)
    given = dict(plan.corrections)
    if what == "name":
        del given["bias"]
    else:
        given["bias"] = given["bias"][:1]
    with pytest.raises(InputError, match="corrections lack a fitting 'bias'"):
        train_clients(people, head, dataclasses.replace(plan, corrections=given))
