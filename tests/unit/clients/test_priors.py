"""Own class frequencies: in the loss against autograd, and in predictions by the definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl.clients.batches import batch_order
from fedtl.clients.personal import personal_heads
from fedtl.clients.priors import LEAST, confusion, informed, prior_offsets, shift_weights
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.evaluation.personalised import last_plan
from fedtl.plans import Personal
from fedtl.types import LocalTraining, Population, Rows

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
HEADS = {"linear": oracle.linear_head(7, 3), "mlp": oracle.mlp_head(7, [5], 3)}
PLAIN = LocalTraining(3, 8, 0.1, prior_strength=1.0)
FULL = LocalTraining(3, 8, 0.1, 0.9, 0.05, 0.2, prior_strength=1.5)


def skewed() -> Population:
    """Clients of many kinds: skewed, nearly even, of one class, without rows."""
    people = oracle.federation([31, 12, 9, 0], 7, 3)
    labels = people.labels.copy()
    labels[people.train.of(0)[:20]] = 0
    labels[people.train.of(2)] = 2
    return dataclasses.replace(people, labels=labels)


def log_frequencies(people: Population, client: int) -> np.ndarray:
    counts = np.bincount(people.client(client).labels, minlength=3)
    return np.log((counts + 1) / (counts.sum() + 3))


def trained_with_offset(people, head, plan, client: int):
    """Autograd on cross-entropy of scores + tau log pi_k, float64, every step written out."""
    own, data = plan.training, people.client(client)
    x, y = torch.tensor(data.features.astype(np.float64)), torch.tensor(data.labels.astype(int))
    offset = own.prior_strength * torch.tensor(log_frequencies(people, client))
    start = {name: torch.tensor(tensor.astype(np.float64)) for name, tensor in head.items()}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    extra = {n: torch.tensor(t[client].astype(np.float64)) for n, t in plan.corrections.items()}
    optimizer = torch.optim.SGD(
        tensors.values(), own.learning_rate, own.momentum, weight_decay=own.weight_decay
    )
    first = 0.0
    for epoch in range(own.epochs):
        order = torch.tensor(batch_order(int(plan.batch_keys[client]), len(y), epoch))
        for chosen in order.split(own.batch_size):
            optimizer.zero_grad()
            found = oracle.scores(tensors, x[chosen]) + offset
            loss = torch.nn.functional.cross_entropy(found, y[chosen])
            pull = sum((tensors[n] - start[n]).square().sum() for n in tensors)
            push = sum((extra[n] * tensors[n]).sum() for n in extra)
            (loss + own.proximal / 2 * pull + push).backward()
            optimizer.step()
            first += loss.item() * len(chosen) if epoch == 0 else 0.0
    return {n: t.detach().numpy() for n, t in tensors.items()}, first / len(y)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("corrected", [False, True])
def test_balanced_softmax_is_an_offset_in_the_loss(kind, training, corrected) -> None:
    people, head = skewed(), HEADS[kind]
    plan = oracle.plan_for(people, training)
    if corrected:
        random = np.random.default_rng(4)
        extra = {n: 0.1 * random.normal(size=(4, *t.shape)) for n, t in head.items()}
        extra = {name: tensor.astype(np.float32) for name, tensor in extra.items()}
        plan = dataclasses.replace(plan, corrections=extra)
    found = train_clients(people, head, plan, threads=2)
    for client in range(3):
        expected, loss = trained_with_offset(people, head, plan, client)
        for name, tensor in expected.items():
            np.testing.assert_allclose(found.tensors[name][client], tensor, atol=2e-5)
        assert found.loss[client] == pytest.approx(loss, abs=2e-5)
    for name, tensor in head.items():
        assert np.array_equal(found.tensors[name][3], tensor)  # who has no rows trains nothing
    plain = dataclasses.replace(plan, training=dataclasses.replace(training, prior_strength=0.0))
    without = train_clients(people, head, plain)
    assert np.abs(without.tensors["bias"][0] - found.tensors["bias"][0]).max() > 1e-2


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("training", [PLAIN, FULL], ids=["plain", "full"])
def test_equal_frequencies_are_the_identity(kind, training) -> None:
    people = oracle.federation([30, 12], 7, 3)
    labels = people.labels.copy()
    labels[people.train.index] = np.arange(42) % 3
    people = dataclasses.replace(people, labels=labels)
    plan = oracle.plan_for(people, training)
    plain = dataclasses.replace(plan, training=dataclasses.replace(training, prior_strength=0.0))
    found, expected = (train_clients(people, HEADS[kind], p) for p in (plan, plain))
    for name in HEADS[kind]:
        assert found.tensors[name].tobytes() == expected.tensors[name].tobytes()


def test_bits_depend_on_neither_threads_nor_blocks() -> None:
    people, plan = skewed(), oracle.plan_for(skewed(), FULL)
    one, more = (
        train_clients(people, HEADS["linear"], plan, threads=t, block_size=b)
        for t, b in ((1, 4), (3, 1))
    )
    part = train_clients(people, HEADS["linear"], plan.part(np.array([1])))
    for name in HEADS["linear"]:
        assert one.tensors[name].tobytes() == more.tensors[name].tobytes()
        assert one.tensors[name][1].tobytes() == part.tensors[name][0].tobytes()


def test_layers_that_are_not_trained_stay() -> None:
    people = skewed()
    plan = oracle.plan_for(people, dataclasses.replace(FULL, layers="hidden"))
    found = train_clients(people, HEADS["mlp"], plan)
    assert np.array_equal(found.tensors["bias"], np.tile(HEADS["mlp"]["bias"], (4, 1)))


def test_no_class_is_impossible() -> None:
    offsets = prior_offsets(skewed(), np.array([2, 3]), 3, 2.0)
    assert np.allclose(offsets, [[2 * np.log(0.1), 2 * np.log(0.1), 0], [0, 0, 0]])


def test_logit_adjustment_adds_the_clients_own_frequencies() -> None:
    people, head, clients = skewed(), HEADS["mlp"], np.arange(4)
    personal = Personal("prior", scale=0.5, choices=(0.0,) * 3)
    found = personal_heads(people, head, last_plan(personal, PLAIN, 3, 1, clients))
    for client in range(3):
        expected = head["bias"] + 0.5 * log_frequencies(people, client)
        np.testing.assert_allclose(found["bias"][client], expected, atol=1e-6)
    assert np.array_equal(found["bias"][3], head["bias"])
    assert all((found[n] == t).all() for n, t in head.items() if n != "bias")


def test_bbse_recovers_the_exact_shift_from_an_exact_confusion_matrix() -> None:
    random = np.random.default_rng(0)
    rates = 0.7 * np.eye(5) + 0.3 * random.dirichlet(np.ones(5), 5).T  # P(predicted | true)
    everybody, client = random.dirichlet(np.ones(5), 2)
    weights = shift_weights(rates * everybody, rates @ client)
    np.testing.assert_allclose(weights, client / everybody, rtol=1e-12)
    client[0] = 0.0
    noisy = rates @ client - 1e-3 * rates[:, 0]  # fewer of class 0 than none
    assert shift_weights(rates * everybody, noisy)[0] == 0


def cut() -> tuple[Population, dict[str, np.ndarray]]:
    """One feature, two classes; the head says 1 above 0. Half of it is wrong in a known way."""
    features = np.array([-1.0] * 30 + [1.0] * 10 + [-1.0] * 10 + [1.0] * 50)[:, None]
    labels = np.array([0] * 40 + [1] * 60, np.int32)
    tests = Rows(np.array([*range(25), *range(30, 35), *range(50, 55)]), np.array([0, 30, 35]))
    train = Rows(np.arange(100), np.array([0, 60, 100]))
    people = Population(
        features.astype(np.float32), labels, ("a", "b"), train, tests, ("x", "y"), ("", "")
    )
    head = {"weight": np.array([[-1.0], [1.0]], np.float32), "bias": np.zeros(2, np.float32)}
    return people, head


def test_bbse_from_predictions_to_heads() -> None:
    people, head = cut()
    known = confusion(people, head, threads=2)
    np.testing.assert_allclose(known, [[0.30, 0.10], [0.10, 0.50]])
    personal = informed(people, head, Personal("bbse"), 1)
    found = personal_heads(people, head, last_plan(personal, PLAIN, 3, 1, np.arange(2)))
    for client, shares in ((0, [25 / 30, 5 / 30]), (1, [0.0, 1.0])):
        expected = np.linalg.inv(known) @ shares
        shift = np.log(np.maximum(expected, LEAST))
        np.testing.assert_allclose(found["bias"][client], shift, atol=1e-6)
    # labels of tests are not looked at
    blind = people.labels.copy()
    blind[people.test.of(1)] = 0
    other = dataclasses.replace(people, labels=blind)
    plan = last_plan(personal, PLAIN, 3, 1, np.arange(2))
    assert np.array_equal(personal_heads(other, head, plan)["bias"], found["bias"])
    # without tests there is nothing to estimate from
    nobody = dataclasses.replace(people, test=Rows(np.arange(30), np.array([0, 30, 30])))
    assert np.array_equal(personal_heads(nobody, head, plan)["bias"][1], head["bias"])


def test_bbse_is_refused_where_classes_are_hardly_told_apart() -> None:
    people, head = cut()
    features = people.features.copy()
    features[:] = 1.0
    features[[0, 40]] = -1.0  # one of each class: det C = 0.002
    with pytest.raises(InputError, match="condition number") as error:
        informed(dataclasses.replace(people, features=features), head, Personal("bbse"), 1)
    assert "at most 100" in error.value.line()
    plan = last_plan(Personal("bbse"), PLAIN, 3, 1, np.arange(2))
    with pytest.raises(InputError, match="confusion matrix"):
        personal_heads(people, head, plan)
