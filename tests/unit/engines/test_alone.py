"""What clients that train alone are asked and say: whole, and nothing that cannot be true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtl.engines import alone, wire
from fedtl.errors import InputError
from fedtl.plans import Personal, RoundPlan
from fedtl.types import ClientMetrics, LocalTraining

HEAD = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
TRAININGS = [LocalTraining(1, 4, 0.1), LocalTraining(1, 4, 0.05)]
IDS = np.array([1, 5])
KEYS = np.arange(4, dtype=np.uint64).reshape(2, 2)
ITSELF = RoundPlan(3, IDS, np.array([8, 9], np.uint64), TRAININGS[0])
TUNED = replace(ITSELF, personal=Personal("finetune", epochs=3))


def travelled(message):
    return wire.unpack(wire.pack(*message), 10**6)


def test_every_rounds_keys_and_every_rival_arrive() -> None:
    shared = {name: tensor + 1 for name, tensor in HEAD.items()}
    sent = alone.alone_request(HEAD, IDS, TRAININGS, KEYS, shared, [ITSELF, TUNED])
    got = alone.read_alone(*travelled(sent))
    assert [p.training for p in got.plans] == TRAININGS
    assert [p.batch_keys.tolist() for p in got.plans] == [[0, 1], [2, 3]]
    assert {n: t.tolist() for n, t in got.head.items()} == {n: t.tolist() for n, t in HEAD.items()}
    assert got.shared["weight"].tolist() == shared["weight"].tolist()
    assert [p.personal for p in got.rivals] == [None, TUNED.personal]
    for plan in got.rivals:
        assert (plan.round, plan.training) == (3, TRAININGS[0])
        assert plan.batch_keys.tolist() == [8, 9]
        assert plan.clients.tolist() == [1, 5]


def test_without_rivals_there_is_only_training() -> None:
    got = alone.read_alone(*travelled(alone.alone_request(HEAD, IDS, TRAININGS, KEYS)))
    assert (got.rivals, got.shared) == ((), {})


def test_malformed_questions_are_refused() -> None:
    facts, tensors = alone.alone_request(HEAD, IDS, TRAININGS, KEYS, HEAD, [ITSELF])
    for change, why in (
        ({"batch_keys": KEYS[:1]}, "batch keys"),
        ({"rival_keys": KEYS}, "batch_keys"),
        ({"shared.weight": np.ones(3, np.float32)}, "no head"),
    ):
        with pytest.raises(InputError, match=why):
            alone.read_alone(facts, {**tensors, **change})
    for change, why in (
        ({"trainings": []}, "trainings"),
        ({"rivals": None}, "rivals"),
        ({"rivals": [facts["rivals"][0]] * 5}, "rivals"),
        ({"rivals": ["itself"]}, "rival"),
        ({"rivals": [{}]}, "malformed"),
    ):
        with pytest.raises(InputError, match=why):
            alone.read_alone({**facts, **change}, tensors)


def test_answers_that_cannot_be_true_are_refused() -> None:
    count = np.array([[2, 3], [0, 1]])
    metrics = ClientMetrics(IDS, np.zeros(2), count - [[1, 1], [0, 0]], count)  # 3 of 5, 1 of 1
    good = alone.AloneMetrics(metrics, np.array([[2], [0]]), np.array([[3], [1]]))
    _, tensors = travelled(alone.alone_reply(good))
    tests = np.array([5, 1])
    got = alone.read_alone_reply(IDS, 2, tests, 1, tensors)
    assert (got.beats.tolist(), got.loses.tolist()) == ([[2], [0]], [[3], [1]])
    for change, value in (
        ("beats", np.array([[3], [0]])),  # more than the own head has wrong
        ("loses", np.array([[4], [1]])),  # more than it has right
        ("beats", np.array([[-1], [0]])),
        ("beats", np.array([2, 0])),
        ("loses", np.array([[3.0], [1.0]])),
        ("correct", count + 1),
        ("extra", np.zeros(2)),
    ):
        with pytest.raises(InputError):
            alone.read_alone_reply(IDS, 2, tests, 1, {**tensors, change: value})
    with pytest.raises(InputError):
        alone.read_alone_reply(IDS, 2, tests, 2, tensors)


def test_groups_of_clients_are_joined_by_id() -> None:
    def of(client: int) -> alone.AloneMetrics:
        counts = np.full((1, 2), client)
        metrics = ClientMetrics(np.array([client]), np.zeros(1), counts, counts)
        return alone.AloneMetrics(metrics, counts[:, :1], counts[:, :1])

    joined = alone.AloneMetrics.join([of(4), of(2)])
    assert joined.metrics.clients.tolist() == [2, 4]
    assert joined.beats.tolist() == [[2], [4]]
