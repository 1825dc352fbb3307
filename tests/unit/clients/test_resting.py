"""A network that rests behind the cut is run once for each row: against running it every time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtl import seeding
from fedtl.clients import resting
from fedtl.clients.autograd import _Client
from fedtl.clients.batched import one_torch_thread
from fedtl.clients.evaluation import evaluate_clients
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.scenario import schema
from fedtl.transfer.tails import OpenTail, first_head, open_network
from fedtl.types import TAIL, ClientUpdates, Head, LocalTraining, Population, Rows, Tail

COUNTS, TESTS = (70, 9, 4, 1, 0), 6
TRAINED = sum(COUNTS)
SCENARIO = schema.Scenario(name="rests", seed=3, data={"source": "arrays", "path": "x.npz"})
WARM = LocalTraining(3, 4, 0.05, still=(TAIL,))


def tail_of(batch_norm: str) -> Tail:
    section = schema.Backbone(name="mobilenet_v2", weights="none", image_size=32)
    cut = schema.Transfer(mode="last_blocks", cut=1, batch_norm=batch_norm)
    tail = open_network(section, cut, 3)[1]
    assert tail is not None
    return tail


@pytest.fixture(scope="module")
def frozen() -> Tail:
    return tail_of("frozen")


@pytest.fixture(scope="module")
def aggregated() -> Tail:
    return tail_of("aggregated")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def people(tail: Tail) -> Population:
    """Activations at the cut of five clients; all have the same tests."""
    stream, ends = np.random.default_rng(0), np.cumsum([0, *COUNTS])
    labels = stream.integers(0, 3, TRAINED + TESTS).astype(np.int32)
    features = stream.normal(labels[:, None] - 1, 0.5, (len(labels), np.prod(tail.shape)))
    features = features.astype(np.float32)
    train = Rows(np.arange(TRAINED), ends)
    tests = np.tile(np.arange(TRAINED, TRAINED + TESTS), 5)
    test = Rows(tests, TESTS * np.arange(6))
    return Population(
        features, labels, ("a", "b", "c"), train, test, tuple("vwxyz"), ("",) * 5, tail
    )


def begun(population: Population) -> dict[str, Any]:
    return dict(first_head(SCENARIO, population.tail, population.width, 3))


def trained(
    population: Population, head: Head, training: LocalTraining, round: int = 1, **how: Any
) -> ClientUpdates:
    ids = np.arange(5)
    plan = RoundPlan(round, ids, seeding.client_keys(3, "batches", round, ids), training)
    return train_clients(population, head, plan, **how)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the network behind the cut."""
    seen: list[int] = []
    forward = OpenTail.forward

    def counted(self: OpenTail, module: Any, own: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, module, own, x)

    monkeypatch.setattr(OpenTail, "forward", counted)
    return seen


WAYS = {
    "plain": WARM,
    "all": replace(
        WARM, momentum=0.9, weight_decay=0.05, proximal=0.2, label_smoothing=0.1, dropout=0.3
    ),
    "stopping": replace(WARM, validation_fraction=0.3, early_stopping=1),
    "last": replace(WARM, still=(), layers="last"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["frozen", "aggregated"])
def test_it_is_what_running_the_network_for_every_batch_gives(
    way: str, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the head is trained, but batch norm's statistics move."""
    population = people(request.getfixturevalue(kind))
    head = begun(population)
    quick = trained(population, head, WAYS[way])
    monkeypatch.setattr(_Client, "_rests", lambda *_: False)
    slow = trained(population, head, WAYS[way])
    assert not np.array_equal(quick.tensors["weight"][0], head["weight"])
    for name, own in slow.tensors.items():
        np.testing.assert_allclose(quick.tensors[name], own, rtol=1e-5, atol=1e-5, err_msg=name)
        resting = name.startswith(TAIL) and not (way == "last" and kind == "aggregated")
        assert not resting or (quick.tensors[name] == head[name]).all()
    np.testing.assert_allclose(quick.loss, slow.loss, rtol=1e-5)


def test_every_row_passes_once_in_a_whole_warm_up(frozen: Tail, passed: list[int]) -> None:
    population = people(frozen)
    head = begun(population)
    everybody = np.arange(5)
    for round in (1, 2, 3):
        head = {n: own.mean(0) for n, own in trained(population, head, WARM, round).tensors.items()}
        head |= {n: own for n, own in begun(population).items() if n.startswith(TAIL)}
        evaluate_clients(population, head, everybody)
    assert sum(passed) == TRAINED + TESTS
    passed.clear()
    trained(population, head, replace(WARM, still=()))
    assert sum(passed) == WARM.epochs * TRAINED


def test_what_has_moved_passes_once_a_round(frozen: Tail, passed: list[int]) -> None:
    population = people(frozen)
    head = begun(population)
    head = {n: own[0] for n, own in trained(population, head, WARM).tensors.items()}
    name = next(name for name in head if name.startswith(TAIL))
    moved = {**head, name: head[name] + np.float32(0.01)}
    passed.clear()
    for round in (1, 2):
        trained(population, moved, WARM, round)
    assert sum(passed) == 2 * TRAINED
    before, after = (evaluate_clients(population, one, np.arange(2)) for one in (head, moved))
    assert (before.loss_sum != after.loss_sum).all()


@pytest.mark.parametrize("way", [{"mixup": 0.4}, {"noise": 0.5}])
def test_what_is_mixed_or_blurred_passes_in_every_epoch(
    way: dict[str, float], frozen: Tail, passed: list[int]
) -> None:
    trained(people(frozen), begun(people(frozen)), replace(WARM, **way))
    assert sum(passed) == WARM.epochs * TRAINED


def test_bits_depend_on_nothing_that_was_kept(
    frozen: Tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept, made again, on threads, by another process that has only some of the clients."""
    population, kept = people(frozen), people(frozen)
    head, training = begun(population), WAYS["stopping"]
    trained(kept, head, training)
    first = trained(kept, head, training)
    scores = evaluate_clients(kept, head, np.arange(5), split="train")
    again = evaluate_clients(kept, head, np.arange(5), split="train")
    monkeypatch.setattr(resting, "KEPT_BYTES", 0)
    for threads in (1, 3):
        other = trained(population, head, training, threads=threads)
        for name, own in first.tensors.items():
            np.testing.assert_array_equal(own, other.tensors[name])
    bare = evaluate_clients(population, head, np.arange(5), split="train")
    for one in (again, bare):
        np.testing.assert_array_equal(scores.loss_sum, one.loss_sum)
    ids = np.array([0, 2])
    plan = RoundPlan(1, ids, seeding.client_keys(3, "batches", 1, ids), training)
    some = train_clients(population, head, plan)
    np.testing.assert_array_equal(first.tensors["weight"][ids], some.tensors["weight"])


def test_what_is_kept_is_bounded_and_goes_with_its_features(
    frozen: Tail, monkeypatch: pytest.MonkeyPatch
) -> None:
    population = people(frozen)
    key = id(population.features)
    slice_of_all = 64 * 4 * frozen.width
    monkeypatch.setattr(resting, "KEPT_BYTES", slice_of_all)
    trained(population, begun(population), WARM)
    assert [len(own) for own in resting._KEPT[key].parts.values()] == [64]
    del population
    gc.collect()
    assert key not in resting._KEPT
