"""Full gradients against autograd, and their bits against threads and splits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl.clients.gradients import gradients
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.types import LocalTraining, Rows

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
HEADS = {"linear": oracle.linear_head(19, 4), "mlp": oracle.mlp_head(19, [7, 5], 4)}
SIZES = [11, 0, 3, 700, 5]  # one client is longer than a block of rows


def slow(people, head, rows):
    """Autograd's gradient of the mean loss over some rows, and that loss."""
    point = {n: torch.tensor(t, dtype=torch.float64).requires_grad_() for n, t in head.items()}
    x = torch.from_numpy(people.features[rows]).double()
    y = torch.from_numpy(people.labels[rows]).long()
    loss = torch.nn.functional.cross_entropy(oracle.scores(point, x), y)
    loss.backward()
    return {name: tensor.grad.numpy() for name, tensor in point.items()}, loss.item()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_agrees_with_autograd(kind: str, dtype: type) -> None:
    people, head = oracle.federation(SIZES, 19, 4, dtype=dtype), HEADS[kind]
    plan = dataclasses.replace(oracle.plan_for(people, LocalTraining(1, 8, 0.1)), task="gradient")
    given = do_task(people, head, plan, threads=2)
    assert {n: (t.shape[1:], t.dtype) for n, t in given.tensors.items()} == plan.reply(head)
    assert given.num_examples.tolist() == SIZES
    for client in (0, 2, 3, 4):
        exact, loss = slow(people, head, people.train.of(client))
        for name in head:
            np.testing.assert_allclose(given.tensors[name][client], exact[name], atol=1e-14)
        np.testing.assert_allclose(given.loss[client], loss, rtol=1e-13)
    assert np.isnan(given.loss[1])
    assert not any(given.tensors[name][1].any() for name in head)


@pytest.mark.parametrize("kind", HEADS)
def test_neither_threads_nor_company_change_a_bit(kind: str) -> None:
    people, head = oracle.federation(SIZES, 19, 4), HEADS[kind]
    plan, before = oracle.plan_for(people, LocalTraining(1, 8, 0.1)), torch.get_num_threads()
    whole = gradients(people, head, plan)
    others = [gradients(people, head, plan, threads=3)]
    others += [gradients(people, head, plan.part(np.array([i]))) for i in range(len(SIZES))]
    for other in others:
        places = np.isin(whole.clients, other.clients)
        assert other.loss.tobytes() == whole.loss[places].tobytes()
        for name in head:
            assert other.tensors[name].tobytes() == whole.tensors[name][places].tobytes()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("kind", HEADS)
def test_the_weighted_sum_is_the_pooled_gradient_for_any_split(kind: str) -> None:
    head, random = HEADS[kind], np.random.default_rng(5)
    people = oracle.federation([900], 19, 4)
    exact, loss = slow(people, head, people.train.index)
    for num in (1, 7, 40):
        cuts = np.sort(random.choice(np.arange(1, 900), num - 1, replace=False))
        rows = Rows(random.permutation(people.train.index), np.array([0, *cuts, 900]))
        split = dataclasses.replace(people, train=rows, names=tuple(map(str, range(num))))
        given = gradients(split, head, oracle.plan_for(split, LocalTraining(1, 8, 0.1)))
        weights = given.num_examples / 900
        for name in head:
            pooled = np.tensordot(weights, given.tensors[name], 1)
            np.testing.assert_allclose(pooled, exact[name], rtol=0, atol=1e-14)
        np.testing.assert_allclose(weights @ given.loss, loss, rtol=1e-13)


@pytest.mark.parametrize("kind", HEADS)
def test_what_training_clients_report_is_of_the_rounds_head(kind: str) -> None:
    people, head = oracle.federation(SIZES, 19, 4), HEADS[kind]
    plan = oracle.plan_for(people, LocalTraining(2, 8, 0.1))
    asked = dataclasses.replace(plan, reports=("start_loss", "start_gradient"))
    plain, given = train_clients(people, head, plan), train_clients(people, head, asked)
    exact = gradients(people, head, plan)
    assert {n: (t.shape[1:], t.dtype) for n, t in given.tensors.items()} == asked.reply(head)
    for name in head:
        assert given.tensors[name].tobytes() == plain.tensors[name].tobytes()
        reported = given.tensors[f"start_gradient.{name}"]
        assert reported.tobytes() == exact.tensors[name].astype(np.float32).tobytes()
    np.testing.assert_allclose(given.loss, exact.loss, rtol=1e-6)
    assert not np.allclose(plain.loss, exact.loss, rtol=1e-3, equal_nan=True)
    silent = train_clients(people, head, dataclasses.replace(plan, reports=("start_gradient",)))
    assert silent.loss.tobytes() == plain.loss.tobytes()


def test_what_is_not_finite_stays_with_its_client() -> None:
    people = oracle.federation([8, 13], 19, 4)
    people.features[people.train.of(1)[2], 3] = np.nan
    given = gradients(people, HEADS["linear"], oracle.plan_for(people, LocalTraining(1, 8, 0.1)))
    assert np.isfinite(given.tensors["weight"][0]).all()
    assert not np.isfinite(given.tensors["weight"][1]).any()


def test_huge_scores_stay_finite() -> None:
    people = oracle.federation([20], 19, 4)
    head = {name: tensor * 1e4 for name, tensor in HEADS["linear"].items()}
    given = gradients(people, head, oracle.plan_for(people, LocalTraining(1, 8, 0.1)))
    exact, loss = slow(people, head, people.train.index)
    np.testing.assert_allclose(given.tensors["weight"][0], exact["weight"], atol=1e-13)
    np.testing.assert_allclose(given.loss, [loss], rtol=1e-13)


@pytest.mark.parametrize(("what", "told"), [("label", r"client 1 \(c1\).*0 to 3"), ("row", "rows")])
@pytest.mark.parametrize("kind", HEADS)
def test_what_does_not_fit_is_refused(kind: str, what: str, told: str) -> None:
    people = oracle.federation([3, 4], 19, 4)
    if what == "label":
        people.labels[people.train.of(1)[0]] = 4
    else:
        people.train.index[0] = 99
    plan = oracle.plan_for(people, LocalTraining(1, 8, 0.1))
    with pytest.raises(InputError, match=told):
        gradients(people, HEADS[kind], plan)
