"""Training one client after the other by autograd, against torch modules under torch.optim.SGD."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtl import seeding
from fedtl.clients.autograd import _batches, train_autograd
from fedtl.clients.batched import classify, forward
from fedtl.clients.batches import batch_order
from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.neighbours import shared_view
from fedtl.clients.networks import judge
from fedtl.clients.priors import prior_offsets
from fedtl.clients.regularisation import divided, spread
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.scenario.transfer import Head as Section
from fedtl.strategies.validation import accept_updates
from fedtl.transfer.heads import initial_head
from fedtl.types import Head, LocalTraining, Population

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))
WIDTH, CLASSES = 7, 3
KINDS = ("linear", "mlp", "cosine", "prototype")
PLAIN = LocalTraining(3, 8, 0.1)
FULL = LocalTraining(3, 8, 0.1, momentum=0.9, weight_decay=0.05, proximal=0.2)
WAYS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.2},
    "mixup": {"mixup": 0.4},
    "dropout": {"dropout": 0.3},
    "noise": {"noise": 0.5},
    "all": {"label_smoothing": 0.1, "mixup": 0.4, "dropout": 0.3, "noise": 0.5},
}


def people() -> Population:
    return oracle.federation([31, 12, 9, 1, 0], WIDTH, CLASSES)


def started(kind: str) -> Head:
    """A head of some kind, with nothing at zero."""
    section = Section(kind=kind, hidden=[6], scale=3.0 if kind in KINDS[2:] else None)
    head = initial_head(section, WIDTH, CLASSES, 0)
    random = np.random.default_rng(5)
    return {
        name: tensor + 0.3 * random.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in head.items()
    }


def planned(training: LocalTraining, clients: tuple[int, ...] = (0, 1, 2, 3, 4)) -> RoundPlan:
    ids = np.array(clients, np.int64)
    return RoundPlan(4, ids, seeding.client_keys(9, "batches", 4, ids), training)


class Net(nn.Module):
    """A head as its papers have it, in float64."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.own = nn.ParameterDict(
            {n.replace(".", "_"): nn.Parameter(torch.tensor(t).double()) for n, t in head.items()}
        )

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        own = self.own
        if "hidden_0_weight" in own:
            x = torch.relu(nn.functional.linear(x, own["hidden_0_weight"], own["hidden_0_bias"]))
        x = x if kept is None else x * kept
        if "cosine_scale" in own:
            cosines = torch.cosine_similarity(x[:, None], own["weight"][None], dim=2)
            return own["cosine_scale"] * cosines + own["bias"]
        if "prototype_scale" in own:
            apart = (x[:, None] - own["weight"][None]).square().mean(2)
            return own["bias"] - own["prototype_scale"] * apart
        return nn.functional.linear(x, own["weight"], own["bias"])


def smoothed(found: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
    logs = torch.log_softmax(found, 1)
    spread_out = -logs.mean(1)
    return ((1 - share) * -logs[torch.arange(len(labels)), labels] + share * spread_out).mean()


def by_hand(
    population: Population, head: Head, plan: RoundPlan, place: int, offset: Any = 0.0
) -> dict[str, np.ndarray]:
    """One client's head after local training, the slow obvious way."""
    own, key = plan.training, int(plan.batch_keys[place])
    rows = population.train.of(int(plan.clients[place]))
    x = torch.tensor(population.features[rows]).double()
    y = torch.tensor(population.labels[rows]).long()
    net, begin = Net(head), Net(head)
    optimizer = torch.optim.SGD(
        net.parameters(), own.learning_rate, own.momentum, weight_decay=own.weight_decay
    )
    chance = {name: seeding.generator(key, name) for name in ("noise", "mixup", "dropout")}
    deviation = x.std(0, correction=0)
    entering = head["weight"].shape[1]
    for epoch in range(own.epochs):
        order = batch_order(key, len(rows), epoch)
        for low in range(0, len(rows), own.batch_size):
            part = order[low : low + own.batch_size]
            seen, other, share, kept = x[part], y[part], 1.0, None
            if own.noise:
                drawn = chance["noise"].standard_normal(tuple(seen.shape), dtype=np.float32)
                seen = seen + own.noise * deviation * torch.tensor(drawn).double()
            if own.mixup:
                share = chance["mixup"].beta(own.mixup, own.mixup)
                partner = chance["mixup"].permutation(len(part))
                seen, other = share * seen + (1 - share) * seen[partner], y[part][partner]
            if own.dropout:
                drawn = chance["dropout"].random((len(part), entering), dtype=np.float32)
                kept = torch.tensor(drawn >= own.dropout).double() / (1 - own.dropout)
            found = net(seen, kept) + offset
            loss = share * smoothed(found, y[part], own.label_smoothing)
            loss = loss + (1 - share) * smoothed(found, other, own.label_smoothing)
            pull = sum(
                (a - b.detach()).square().sum()
                for a, b in zip(net.parameters(), begin.parameters(), strict=True)
            )
            optimizer.zero_grad()
            (loss + own.proximal / 2 * pull).backward()
            optimizer.step()
    return {name: net.own[name.replace(".", "_")].detach().numpy() for name in head}


def same(found: Any, place: int, expected: dict[str, np.ndarray]) -> None:
    for name, tensor in expected.items():
        np.testing.assert_allclose(found.tensors[name][place], tensor, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_every_kind_and_way_is_torchs_sgd(kind: str, way: str) -> None:
    population, head = people(), started(kind)
    for base in (PLAIN, FULL):
        plan = planned(replace(base, **WAYS.get(way, {})))
        if way == "plain":
            starts = {name: tensor[None] for name, tensor in head.items()}
            found = train_autograd(population, starts, plan, threads=1, device="cpu")
        else:
            found = train_clients(population, head, plan)
        for place in range(4):
            same(found, place, by_hand(population, head, plan, place))
        for name, tensor in head.items():  # nobody to train on
            np.testing.assert_array_equal(found.tensors[name][4], tensor)
        assert np.isnan(found.loss[4])
        assert found.num_examples.tolist() == [31, 12, 9, 1, 0]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_it_is_what_the_quick_ways_do(kind: str) -> None:
    population, head, plan = people(), started(kind), planned(FULL)
    random = np.random.default_rng(2)
    corrections = {
        name: random.standard_normal((5, *tensor.shape)).astype(np.float32) / 10
        for name, tensor in head.items()
    }
    for layers in ("all", "last", "hidden"):
        one = replace(plan, corrections=corrections, training=replace(FULL, layers=layers))
        quick = train_clients(population, head, one)
        starts = {name: tensor[None] for name, tensor in head.items()}
        slow = train_autograd(population, starts, one, threads=1, device="cpu")
        for name in head:
            np.testing.assert_allclose(slow.tensors[name], quick.tensors[name], atol=2e-5)
        np.testing.assert_allclose(slow.loss, quick.loss, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["smoothing", "all"])
def test_balanced_softmax_is_an_offset_in_the_loss(kind: str, way: str) -> None:
    population, head = people(), started(kind)
    training = replace(FULL, prior_strength=0.7, **WAYS[way])
    plan = planned(training)
    found = train_clients(population, head, plan)
    offsets = prior_offsets(population, plan.clients, CLASSES, 0.7)
    for place in range(4):
        offset = torch.tensor(offsets[place]).double()
        same(found, place, by_hand(population, head, plan, place, offset))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_nobody_else(kind: str) -> None:
    population, head = people(), started(kind)
    training = replace(FULL, **WAYS["all"], validation_fraction=0.3, early_stopping=2)
    whole = train_clients(population, head, planned(training), threads=1)
    for threads, size in ((3, 1), (2, 4)):
        again = train_clients(population, head, planned(training), threads=threads, block_size=size)
        for name in head:
            np.testing.assert_array_equal(whole.tensors[name], again.tensors[name])
        np.testing.assert_array_equal(whole.loss, again.loss)
    alone = train_clients(population, head, planned(training, (1, 3)))
    for name in head:
        np.testing.assert_array_equal(whole.tensors[name][[1, 3]], alone.tensors[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "nearly", [{"label_smoothing": 1e-9}, {"mixup": 1e-9}, {"dropout": 1e-9}, {"noise": 1e-9}]
)
def test_almost_nothing_is_nothing(kind: str, nearly: dict[str, float]) -> None:
    population, head = people(), started(kind)
    plain = train_clients(population, head, planned(FULL))
    found = train_clients(population, head, planned(replace(FULL, **nearly)))
    for name in head:
        np.testing.assert_allclose(found.tensors[name], plain.tensors[name], atol=3e-5)


def test_streams_are_apart() -> None:
    """Dropout draws the same whether or not there is noise, and another client draws another."""
    population, head = people(), started("linear")
    rows = population.train.of(0)
    still = replace(population, features=np.ones_like(population.features))  # nothing deviates
    assert not spread(still, rows).any()
    one = train_clients(still, head, planned(replace(PLAIN, dropout=0.5)))
    two = train_clients(still, head, planned(replace(PLAIN, dropout=0.5, noise=2.0)))
    np.testing.assert_array_equal(one.tensors["weight"], two.tensors["weight"])
    np.testing.assert_allclose(
        spread(population, rows), population.features[rows].astype(np.float64).std(0), rtol=1e-6
    )


def test_cosines_do_not_see_lengths() -> None:
    head = {name: torch.tensor(tensor) for name, tensor in started("cosine").items()}
    x = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.rand(11, 1, generator=torch.Generator().manual_seed(2)) * 9 + 0.1
    torch.testing.assert_close(forward(head, lengths * x), forward(head, x))
    longer = {**head, "weight": 5 * head["weight"]}
    torch.testing.assert_close(forward(longer, x), forward(head, x))


def test_a_prototype_head_is_the_linear_one_it_expands_to() -> None:
    head = {name: torch.tensor(tensor) for name, tensor in started("prototype").items()}
    x = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
    each = head["prototype.scale"] / WIDTH
    points = head["weight"]
    linear = {
        "weight": 2 * each * points,
        "bias": head["bias"] - each * points.square().sum(1),
    }
    torch.testing.assert_close(forward(head, x), forward(linear, x))
    distances = head["bias"] - each * torch.cdist(x, points).square()
    torch.testing.assert_close(forward(head, x).softmax(1), distances.softmax(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_judge_has_the_same_scores(kind: str) -> None:
    population, head = people(), started(kind)
    rows = population.train.of(0)
    x = torch.tensor(population.features[rows]).double()
    found = Net(head)(x).detach()
    labels = torch.tensor(population.labels[rows]).long()
    loss, right = judge(population.features, population.labels, rows, head, "cpu")
    assert loss == pytest.approx(float(nn.functional.cross_entropy(found, labels) * 31), rel=1e-5)
    np.testing.assert_array_equal(right, found.argmax(1).numpy() == labels.numpy())
    _, probabilities = shared_view(population, head, rows)
    np.testing.assert_allclose(probabilities, found.softmax(1).numpy(), rtol=1e-6)
    sums = evaluate_clients(population, head, np.array([0]), split="train")
    assert sums.loss_sum[0] == pytest.approx(loss, rel=1e-5)
    assert int(sums.correct.sum()) == int(right.sum())


def test_starts() -> None:
    cosine = initial_head(Section(kind="cosine"), WIDTH, CLASSES, 3)
    np.testing.assert_allclose(np.linalg.norm(cosine["weight"], axis=1), 1, rtol=1e-6)
    assert cosine["cosine.scale"].tolist() == [16.0]
    points = initial_head(Section(kind="prototype"), WIDTH, CLASSES, 3)
    assert points["prototype.scale"].tolist() == [WIDTH / 2]
    assert not points["weight"].any()
    again = initial_head(Section(kind="cosine"), WIDTH, CLASSES, 4)
    assert (again["weight"] != cosine["weight"]).all()
    tensors = {name: torch.tensor(t) for name, t in points.items()}
    assert classify(tensors, torch.ones(2, WIDTH)).tolist() == [[0.0] * 3] * 2


VALIDATED = replace(PLAIN, epochs=6, validation_fraction=0.25, early_stopping=99)


def test_the_validation_part_is_the_same_in_every_round() -> None:
    population = people()
    for client, (size, kept) in enumerate([(31, 23), (12, 9), (9, 7), (1, 1), (0, 0)]):
        rows, held = divided(population, client, VALIDATED)
        assert (len(rows), len(held)) == (kept, size - kept)
        own = population.train.of(client)
        assert sorted([*rows, *held]) == sorted(own)
        np.testing.assert_array_equal(rows, [row for row in own if row in set(rows)])
    assert VALIDATED.trains_on(np.array([2, 3, 4])).tolist() == [1, 2, 3]
    renamed = replace(population, names=("other", *population.names[1:]))
    assert (
        divided(renamed, 0, VALIDATED)[1].tolist() != divided(population, 0, VALIDATED)[1].tolist()
    )
    np.testing.assert_array_equal(
        divided(renamed, 1, VALIDATED)[1], divided(population, 1, VALIDATED)[1]
    )


def held_losses(population: Population, head: Head, rate: float) -> tuple[list[float], list[Any]]:
    """Client 0's loss on its validation part before training and after each epoch, by hand."""
    rows, held = divided(population, 0, VALIDATED)
    only = replace(
        population, train=replace(population.train, index=rows, offsets=np.array([0, len(rows)]))
    )
    heads, losses = [], []
    for epochs in range(VALIDATED.epochs + 1):
        plan = planned(LocalTraining(epochs, 8, rate), (0,))
        heads.append(by_hand(only, head, plan, 0))
        x = torch.tensor(population.features[held]).double()
        y = torch.tensor(population.labels[held]).long()
        found = Net(heads[-1])(x).detach()
        losses.append(float(nn.functional.cross_entropy(found, y)))
    return losses, heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.03, 1.5])
@pytest.mark.parametrize("patience", [1, 2, 99])
def test_early_stopping_goes_back_to_its_best(kind: str, rate: float, patience: int) -> None:
    population, head = people(), started(kind)
    losses, heads = held_losses(population, head, rate)
    best, waited = 0, 0
    for epoch in range(1, len(losses)):
        best, waited = (epoch, 0) if losses[epoch] < losses[best] else (best, waited + 1)
        if waited >= patience:
            break
    training = replace(VALIDATED, learning_rate=rate, early_stopping=patience)
    found = train_clients(population, head, planned(training, (0,)))
    same(found, 0, heads[best])
    assert found.num_examples.tolist() == [23]


def test_training_that_only_harms_is_taken_back() -> None:
    """The validation part says the opposite of all that is trained on."""
    population = people()
    rows, held = divided(population, 0, VALIDATED)
    labels, features = population.labels.copy(), population.features.copy()
    features[:], labels[rows], labels[held] = 1.0, 0, 1
    spoilt = replace(population, labels=labels, features=features)
    head = initial_head(Section(), WIDTH, CLASSES, 0)
    found = train_clients(spoilt, head, planned(VALIDATED, (0,)))
    assert not found.tensors["weight"].any()
    assert found.loss[0] > 0  # it did train


def test_the_server_knows_how_many_examples_are_trained_on() -> None:
    population, head = people(), started("linear")
    plan = planned(VALIDATED)
    found = train_clients(population, head, plan)
    accepted, _ = accept_updates([found], plan, head, population.train.counts, 1e4)
    assert accepted.num_examples.tolist() == [23, 9, 7, 1, 0]
    lied = replace(found, num_examples=population.train.counts)
    accepted, _ = accept_updates([lied], plan, head, population.train.counts, 1e4)
    assert accepted.clients.tolist() == [3, 4]
    assert "says it trained on 31 examples, declared 23" in accepted.failures[0].reason


def test_a_lone_last_example_joins_the_batch_before() -> None:
    order = np.arange(9)
    assert [len(part) for part in _batches(order, 4, alone=True)] == [4, 4, 1]
    assert [len(part) for part in _batches(order, 4, alone=False)] == [4, 5]
    assert [len(part) for part in _batches(order[:8], 4, alone=False)] == [4, 4]
    assert _batches(order[:1], 4, alone=False) == []
    assert _batches(order[:0], 4, alone=False) == []
