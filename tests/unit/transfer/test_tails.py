"""What stands behind a cut: what of it is trained, what stays, and where batch norm lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtl import seeding
from fedtl.clients.batched import one_torch_thread
from fedtl.clients.batches import batch_order
from fedtl.clients.networks import network
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.personal_training import train_personal
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.scenario import schema
from fedtl.strategies.averaging import FedAdam, FedAvg
from fedtl.strategies.local_norms import LocalNorms, norms_of
from fedtl.transfer.backbones import open_backbone
from fedtl.transfer.modes import whole
from fedtl.transfer.tails import (
    STORED_BYTES,
    blocks_before,
    first_head,
    open_network,
    open_tail,
    still_in,
)
from fedtl.transfer.trunks import hash_state
from fedtl.types import TAIL, LocalTraining, Population, Rows, Tail

SECTION = schema.Backbone(name="mobilenet_v2", weights="none", image_size=32)
SCENARIO = schema.Scenario(name="tails", seed=3, data={"source": "arrays", "path": "x.npz"})
STATISTICS = ("running_mean", "running_var")
COUNTS = (5, 9, 4)


def tail_of(**settings: object) -> Tail:
    tail = open_network(SECTION, schema.Transfer(mode="last_blocks", cut=2, **settings), 3)[1]
    assert tail is not None
    return tail


def people(tail: Tail) -> Population:
    """Three clients with activations at the cut; nobody has tests."""
    stream, ends = np.random.default_rng(0), np.cumsum([0, *COUNTS])
    features = stream.normal(size=(ends[-1], np.prod(tail.shape))).astype(np.float32)
    labels = stream.integers(0, 3, ends[-1]).astype(np.int32)
    none = Rows(np.empty(0, np.int64), np.zeros(4, np.int64))
    train = Rows(np.arange(ends[-1]), ends)
    return Population(features, labels, ("a", "b", "c"), train, none, tuple("xyz"), ("",) * 3, tail)


def plan_of(training: LocalTraining, clients: int = 3) -> RoundPlan:
    ids = np.arange(clients)
    return RoundPlan(1, ids, seeding.client_keys(3, "batches", 1, ids), training)


SGD = LocalTraining(1, 4, 0.05)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.mark.parametrize("kind", ["frozen", "aggregated", "local", "group"])
def test_each_mode_of_batch_norm_trains_what_it_says(kind: str) -> None:
    tail = tail_of(batch_norm=kind)
    population = people(tail)
    head = first_head(SCENARIO, tail, population.width, 3)
    updates = train_clients(population, head, plan_of(SGD))
    moved = {name for name, own in updates.tensors.items() if (own != head[name]).any()}
    assert moved == set(head)  # all that travels is trained
    norms = {n for n in head if n.removeprefix(TAIL) in _norm_tensors(tail)}
    statistics = {name for name in head if name.endswith(STATISTICS)}
    if kind == "frozen":
        assert not norms
    elif kind == "group":
        assert norms
        assert not statistics
        assert not any(name.endswith(STATISTICS) for name in tail.tensors)
        assert (tail.tensors["features.18.1.weight"] == 1).all()  # batch norm's own
    else:
        assert statistics < norms


def test_batch_norm_that_counts_its_batches_is_refused() -> None:
    """The count is the module's own, and threads share modules."""
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=None))
    for kind in ("local", "aggregated"):
        with pytest.raises(InputError, match="momentum = None"):
            whole(module, {"0"}, {"batch_norm": kind})
    assert whole(module, {"0"}, {"batch_norm": "frozen"}) == []


def _norm_tensors(tail: Tail) -> set[str]:
    kinds = (torch.nn.BatchNorm2d, torch.nn.GroupNorm)
    module = open_tail(tail).module
    return {
        f"{name}.{own}"
        for name, part in module.named_modules()
        if isinstance(part, kinds)
        for own in part.state_dict()
    }


def test_the_trunk_stays_as_it_was_bit_for_bit_buffers_too() -> None:
    backbone = open_backbone(SECTION, 3)
    before = hash_state(backbone.trunk())
    for kind in ("frozen", "aggregated"):
        tail = tail_of(batch_norm=kind)
        kept = {name: own.copy() for name, own in tail.tensors.items()}
        population = people(tail)
        head = first_head(SCENARIO, tail, population.width, 3)
        train_clients(population, head, plan_of(SGD), threads=2)
        assert all(np.array_equal(own, tail.tensors[name]) for name, own in kept.items())
        opened = open_tail(tail).module.state_dict()
        assert all(np.array_equal(own, opened[name].numpy()) for name, own in kept.items())
    assert hash_state(open_backbone(SECTION, 3).trunk()) == before


def test_frozen_statistics_do_not_move_where_affine_parameters_need_no_gradient() -> None:
    """requires_grad = False is not enough: a module in training mode moves them all the same."""
    tail = tail_of(batch_norm="frozen")
    with open_tail(tail).running(training=True) as module:
        assert not any(part.training for part in module.modules())
        opened = open_tail(tail)
        opened.forward(module, {}, torch.randn(4, int(np.prod(tail.shape))))
        state = module.state_dict()
    assert all(np.array_equal(state[name].numpy(), own) for name, own in tail.tensors.items())


def test_running_statistics_are_the_clients_weighted_mean() -> None:
    tail = tail_of(batch_norm="aggregated")
    population = people(tail)
    head = first_head(SCENARIO, tail, population.width, 3)
    updates = train_clients(population, head, plan_of(SGD))
    state = FedAvg().step(FedAvg().init(head, 3), updates)
    weights = np.array(COUNTS) / sum(COUNTS)
    names = [name for name in head if name.endswith(STATISTICS)]
    assert names
    for name in names:
        mean = np.tensordot(weights, updates.tensors[name].astype(np.float64), 1)
        np.testing.assert_allclose(state.head[name], mean, rtol=1e-6, atol=1e-7)
        assert np.ptp(updates.tensors[name], axis=0).max() > 0  # they differ, so a mean says much


def test_one_example_leaves_statistics_as_they_are() -> None:
    tail = tail_of(batch_norm="aggregated")
    population = people(tail)
    one = replace(population, train=Rows(np.arange(3), np.arange(4)))
    head = first_head(SCENARIO, tail, population.width, 3)
    updates = train_clients(one, head, plan_of(LocalTraining(1, 1, 0.05)))
    for name, own in updates.tensors.items():
        assert np.isfinite(own).all()
        if name.endswith(STATISTICS):
            assert (own == head[name]).all()


def test_fedbn_never_sends_batch_norm_and_keeps_it_at_home(tmp_path: Path) -> None:
    tail = tail_of(batch_norm="local")
    population = people(tail)
    head = first_head(SCENARIO, tail, population.width, 3)
    strategy = LocalNorms(FedAdam())
    state = strategy.init(head, 3)
    own = set(norms_of(head))
    assert own == {TAIL + name for name in _norm_tensors(tail) if "num_batches" not in name}
    assert not own & {name.partition(".")[2] for name in state.slots}
    store = PersonalStore(tmp_path)
    plan = strategy.plan(state, plan_of(SGD))
    updates = train_personal(population, head, plan, store=store)
    assert set(updates.tensors) == set(head) - own == set(plan.reply(head))
    stepped = strategy.step(state, replace(updates, training=SGD))
    for name, tensor in stepped.head.items():
        assert (name in own) == np.array_equal(tensor, head[name])
    kept = [store.load("personal", name, 2)[1] for name in population.names]
    assert all(set(mine) == own for mine in kept)
    mean = next(name for name in own if name.endswith("running_mean"))
    assert not np.array_equal(kept[0][mean], kept[1][mean])


def test_blocks_open_from_the_back_and_the_rest_stays_bit_for_bit() -> None:
    tail = tail_of(batch_norm="aggregated")
    front, last = tail.recipe["blocks"]
    assert all(name.startswith("features.17.") for name in front)
    assert all(name.startswith("features.18.") for name in last)
    assert [*front, *last] == tail.recipe["trained"]
    assert still_in(tail, 1) == tuple(TAIL + name for name in front)
    assert still_in(tail, 2) == still_in(tail, 0) == ()
    population = people(tail)
    head = first_head(SCENARIO, tail, population.width, 3)
    for training, resting in (
        (replace(SGD, still=(TAIL,)), {TAIL + name for name in (*front, *last)}),
        (replace(SGD, unfrozen=1), {TAIL + name for name in front}),
    ):
        updates = train_clients(population, head, plan_of(training))
        same = {name for name, own in updates.tensors.items() if (own == head[name]).all()}
        assert same == resting


def test_the_pull_to_pretrained_values_and_the_rate_behind_the_cut() -> None:
    """Against a plain loop with torch.optim.SGD and two parameter groups, of the whole tail."""
    tail = tail_of()
    population = people(tail)
    head = first_head(SCENARIO, tail, population.width, 3)
    training = LocalTraining(2, 4, 0.05, 0.9, 1e-2, tail_rate=0.2, l2_pretrained=0.3)
    plan = plan_of(training, clients=1)
    found = train_clients(population, head, plan).tensors
    with network(tail) as through:
        values = {n: torch.tensor(own, requires_grad=True) for n, own in head.items()}
        behind = [n for n in head if n.startswith(TAIL)]
        groups = [
            {"params": [values[n] for n in behind], "lr": 0.05 * 0.2},
            {"params": [values["weight"], values["bias"]], "lr": 0.05},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-2)
        for epoch in range(2):
            order = batch_order(int(plan.batch_keys[0]), COUNTS[0], epoch)
            for low in range(0, len(order), 4):
                rows = order[low : low + 4]
                z = through(values, torch.from_numpy(population.features[rows]))
                scores = torch.nn.functional.linear(z, values["weight"], values["bias"])
                truth = torch.from_numpy(population.labels[rows]).long()
                loss = torch.nn.functional.cross_entropy(scores, truth)
                for n in behind:
                    start = torch.from_numpy(tail.tensors[n[len(TAIL) :]])
                    loss = loss + 0.3 / 2 * (values[n] - start).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for name, own in values.items():
        np.testing.assert_allclose(found[name][0], own.detach(), rtol=1e-4, atol=1e-5)


def test_stored_and_recomputed_activations_train_the_same() -> None:
    section = schema.Backbone(name="squeezenet1_1", weights="none", image_size=32)
    stored = open_network(section, schema.Transfer(mode="last_blocks", cut=1), 3)
    again = open_network(
        section, schema.Transfer(mode="last_blocks", cut=1, activations="recompute"), 3
    )
    labels = (np.arange(18) % 3).astype(np.int32)
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    )
    ended = []
    for front, tail in (stored, again):
        assert tail is not None
        with torch.inference_mode():
            features = front.trunk()(pixels).numpy()
        assert features.std() > 0.1  # of random weights, yet no rounding
        population = replace(people(tail), features=features, labels=labels)
        head = first_head(SCENARIO, tail, population.width, 3)
        ended.append(train_clients(population, head, plan_of(SGD)).tensors)
    assert set(ended[0]) == set(ended[1])
    for name, own in ended[0].items():
        np.testing.assert_allclose(own, ended[1][name], atol=1e-5, rtol=0)


def test_activations_are_stored_while_they_fit_or_are_smaller_than_the_inputs() -> None:
    def recomputed(cut: str, examples: int, activations: str = "auto") -> bool:
        transfer = schema.Transfer(mode="last_blocks", cut=cut, activations=activations)
        tail = open_network(SECTION, transfer, 3, examples)[1]
        assert tail is not None
        return bool(tail.recipe["recompute"])

    wide = 16 * 16 * 16 * 4  # features.2 sees more numbers than there are pixels
    assert not recomputed("features.2", STORED_BYTES // wide)
    assert recomputed("features.2", STORED_BYTES // wide + 1)
    assert not recomputed("features.18", 10**9)
    assert not recomputed("features.2", 10**9, "store")


def test_random_weights_have_nothing_to_freeze_batch_norm_at() -> None:
    with pytest.raises(InputError) as caught:
        open_network(SECTION, schema.Transfer(mode="scratch"), 3)
    assert caught.value.where == "transfer.batch_norm"
    front, tail = open_network(SECTION, schema.Transfer(mode="scratch", batch_norm="group"), 3)
    assert tail is not None
    assert (front.cut, tail.shape) == ("input", (32, 32, 3))


def test_a_head_for_another_cut_is_refused() -> None:
    tail = tail_of()
    population = people(tail)
    head = dict(first_head(SCENARIO, tail, population.width, 3))
    head.pop(TAIL + tail.recipe["trained"][0])
    with pytest.raises(InputError, match="does not fit the network behind the cut"):
        train_clients(population, head, plan_of(SGD))


def test_rows_have_no_network_to_cut() -> None:
    rows = schema.Backbone(name="fourier", width=8)
    with pytest.raises(InputError, match="has no layers to be trained") as caught:
        blocks_before(rows, 3)
    assert (caught.value.where, caught.value.got) == ("backbone.name", "'fourier'")
    assert "mlp" in str(caught.value.do)
    with pytest.raises(InputError, match="has no layers to be trained") as caught:
        open_network(rows, schema.Transfer(mode="last_blocks"), 3)
    assert caught.value.where == "transfer.mode"
