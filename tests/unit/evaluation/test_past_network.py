"""Tests pass the network behind the cut once, whatever they are judged for; against every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtl.clients.batched import one_torch_thread
from fedtl.clients.evaluation import Right, evaluate_clients
from fedtl.engines.local import LocalEngine
from fedtl.evaluation import calibration
from fedtl.evaluation.references import Judge, everyone_rows, judge_shared, past_network
from fedtl.scenario import schema
from fedtl.transfer.tails import OpenTail, first_head, open_network
from fedtl.types import Head, Population, Rows

TESTS = (150, 3, 0, 65)


@pytest.fixture(scope="module")
def people() -> Population:
    """Activations at the cut; of each client one row to train on, the rest are tests."""
    section = schema.Backbone(name="mobilenet_v2", weights="none", image_size=32)
    tail = open_network(section, schema.Transfer(mode="lora", cut=1, rank=2), 3)[1]
    assert tail is not None
    stream, num = np.random.default_rng(0), sum(TESTS) + 4
    labels = stream.integers(0, 3, num).astype(np.int32)
    features = stream.normal(labels[:, None] - 1, 0.5, (num, np.prod(tail.shape)))
    shuffled = stream.permutation(num)  # a client's rows are not neighbours
    train = Rows(np.sort(shuffled[:4]), np.arange(5))
    test = Rows(shuffled[4:], np.cumsum([0, *TESTS]))
    names = ("a", "b", "c", "d")
    matrix = features.astype(np.float32)
    return Population(matrix, labels, ("x", "y", "z"), train, test, names, ("",) * 4, tail)


@pytest.fixture(scope="module")
def head(people: Population) -> Head:
    """A trained network: its zero factors moved, and a head that tells classes apart."""
    scenario = schema.Scenario(name="x", seed=3, data={"source": "arrays", "path": "x.npz"})
    stream, made = np.random.default_rng(1), first_head(scenario, people.tail, people.width, 3)
    return {n: (t + stream.normal(0, 0.05, t.shape)).astype(np.float32) for n, t in made.items()}


def judge_of(people: Population, clients: list[int], threads: int = 2) -> Judge:
    everybody = everyone_rows(people, np.arange(4), 100, 0)
    return Judge(people, np.array(clients), everybody, threads, "cpu")


@pytest.mark.parametrize("clients", [[0, 1, 2, 3], [1, 3]])
def test_it_judges_as_every_pass_by_itself(
    people: Population, head: Head, clients: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, right, rows = judge_of(people, clients), Right(), list[int]()
    plain = evaluate_clients(people, head, judge.clients, right=right)
    everyone = judge.on_everyone({name: tensor[None] for name, tensor in head.items()})
    known = {row.tobytes(): i for i, row in enumerate(people.features)}
    forward = OpenTail.forward

    def counted(self: OpenTail, module: Any, own: Any, x: Any) -> Any:
        rows.extend(known[row.tobytes()] for row in x.numpy())
        return forward(self, module, own, x)

    monkeypatch.setattr(OpenTail, "forward", counted)
    found = judge_shared(judge, head)
    wanted = {*judge.everyone.tolist()}.union(*(people.test.of(c).tolist() for c in clients))
    assert Counter(rows) == dict.fromkeys(wanted, 1)
    np.testing.assert_array_equal(found.sums.correct, plain.correct)
    np.testing.assert_array_equal(found.sums.loss_sum, plain.loss_sum)
    share = everyone.correct.sum() / len(judge.everyone)
    assert found.facts["accuracy_everyone"] == pytest.approx(share)
    assert 0 < share < 1
    assert found.facts["examples_everyone"] == 100


def test_calibration_is_the_same_behind_it(people: Population, head: Head) -> None:
    judge = judge_of(people, [0, 1, 2, 3])
    with one_torch_thread():
        direct = calibration.calibrate(people, head, judge.clients, judge.everyone, 3)
    place, alone = past_network(judge, head)
    once = calibration.calibrate(place.population, alone, place.clients, place.everyone, 3)
    assert set(alone) == {"weight", "bias"}
    np.testing.assert_allclose(once.calibration_error, direct.calibration_error, atol=1e-5)
    assert once.facts["auroc"] == pytest.approx(direct.facts["auroc"], abs=1e-5)


def test_threads_change_no_bit(people: Population, head: Head) -> None:
    one, three = (past_network(judge_of(people, [0, 1, 3], n), head)[0] for n in (1, 3))
    assert one.population.features.tobytes() == three.population.features.tobytes()


def test_without_a_network_nothing_changes(people: Population, head: Head) -> None:
    judge = judge_of(replace(people, tail=None), [0, 1])
    assert past_network(judge, head) == (judge, head)


def test_nothing_is_compiled_where_a_network_is_trained(
    people: Population, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenTail, "forward", lambda *_: pytest.fail("a pass before round 1"))
    LocalEngine(people, 1).start(head)
