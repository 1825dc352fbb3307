"""Every engine goes through one list of checks; new engines are added to MAKERS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl import seeding
from fedtl.engines import Engine, LocalEngine
from fedtl.plans import RoundPlan
from fedtl.types import LocalTraining, Population

MAKERS: dict[str, Callable[[Population], Engine]] = {
    "local": lambda population: LocalEngine(population, 1),
    "local with two threads": lambda population: LocalEngine(population, 2),
    "local in blocks of one": lambda population: LocalEngine(population, 2, block_size=1),
    "ray, one worker": lambda population: _ray(population, num_cpus=1, block_size=1),
    "ray, two workers": lambda population: _ray(population, num_cpus=2),
    "flower, two nodes": lambda population: _flower(population, num_nodes=2),
    "flower, a node per client": lambda population: _flower(population, num_nodes=5, block_size=1),
}


def _ray(population: Population, **options: Any) -> Engine:
    from fedtl.engines.ray_workers import RayEngine

    return RayEngine(population, **options)


def _flower(population: Population, **options: Any) -> Engine:
    from fedtl.engines.flower_simulation import flower_engine

    return flower_engine(population, num_cpus=2, **options)


HEADS = {
    "linear": {"weight": (3, 9), "bias": (3,)},
    "mlp": {
        "hidden.0.weight": (4, 9), "hidden.0.bias": (4,), "weight": (3, 4), "bias": (3,),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MAKERS))
def engine(request, make_population):
    """One for all tests and both heads: starting Ray or Flower takes seconds."""
    made = MAKERS[request.param](make_population())
    try:
        made.start(zeros(HEADS["linear"]))
        yield made
    finally:
        made.close()


def zeros(shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(params=list(HEADS))
def head(request):
    rng = np.random.default_rng(5)
    shapes = HEADS[request.param]
    return {name: rng.normal(size=s, scale=0.1).astype(np.float32) for name, s in shapes.items()}


def plan(clients: list[int]) -> RoundPlan:
    ids = np.array(clients)
    training = LocalTraining(2, 8, 0.1, momentum=0.5, weight_decay=0.01, proximal=0.1)
    return RoundPlan(3, ids, seeding.client_keys(1, "batches", 3, ids), training)


def collected(replies):
    rows = {}
    for reply in replies:
        assert reply.round == 3
        for i, client in enumerate(reply.clients.tolist()):
            rows[client] = {name: tensor[i].tobytes() for name, tensor in reply.tensors.items()}
    return rows


def test_every_planned_client_answers_once_with_the_heads_shapes(engine, head, population) -> None:
    replies = engine.run_clients(plan([0, 2, 4]), head)
    answered = [client for reply in replies for client in reply.clients.tolist()]
    assert sorted(answered) == [0, 2, 4]
    for reply in replies:
        for name, start in head.items():
            assert reply.tensors[name].shape == (len(reply.clients), *start.shape)
            assert reply.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(reply.num_examples, population.train.counts[reply.clients])


def test_the_bits_are_those_of_the_plain_local_engine(engine, head, population) -> None:
    plain = LocalEngine(population, 1)
    assert collected(engine.run_clients(plan([0, 1, 2, 3, 4]), head)) == collected(
        plain.run_clients(plan([0, 1, 2, 3, 4]), head)
    )


def test_a_clients_bits_do_not_depend_on_the_others(engine, head) -> None:
    together = collected(engine.run_clients(plan([0, 1, 2, 3, 4]), head))
    assert collected(engine.run_clients(plan([3]), head)) == {3: together[3]}


def test_metrics_are_sorted_and_count_every_test_example(engine, head, population) -> None:
    metrics = engine.evaluate(head, np.array([1, 3]))
    assert metrics.clients.tolist() == [1, 3]
    assert metrics.count.sum(axis=1).tolist() == population.test.counts[[1, 3]].tolist()
    assert (metrics.correct <= metrics.count).all()


def test_the_head_that_is_sent_out_is_not_touched(engine, head) -> None:
    before = {name: tensor.tobytes() for name, tensor in head.items()}
    engine.run_clients(plan([0, 1]), head)
    assert {name: tensor.tobytes() for name, tensor in head.items()} == before
