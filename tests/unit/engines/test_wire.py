"""What travels comes back as it was sent; whatever else arrives is refused and costs nothing."""

from __future__ import annotations

import json
import math
import tracemalloc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtl.engines import wire
from fedtl.engines.wire import pack, unpack
from fedtl.errors import InputError
from fedtl.plans import Compression, Personal, Protection, RoundPlan, Statistics
from fedtl.types import ClientFailure, ClientMetrics, ClientUpdates, LocalTraining, head_bytes

FACTS = {"round": 3, "rate": 0.1, "name": "Müller <b>", "list": [1, None, True, {"a": "b"}]}
TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "sum": np.array([1.5, np.nan]),
    "ids": np.array([-1, 2**60]),
    "keys": np.array([2**64 - 1], np.uint64),
    "bytes": np.arange(5, dtype=np.uint8),
    "none": np.empty((0, 4), np.float32),
    "one": np.float32(2.0).reshape(()),
}


def blob(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def described(**tensors: object) -> dict[str, object]:
    return {"__metadata__": {"fedtl": "{}"}, **tensors}


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return described(w={"dtype": dtype, "shape": shape, "data_offsets": offsets})


def test_what_is_sent_arrives() -> None:
    facts, tensors = unpack(pack(FACTS, TENSORS), 10_000)
    assert facts == FACTS
    assert set(tensors) == set(TENSORS)
    for name, sent in TENSORS.items():
        assert tensors[name].dtype == sent.dtype
        assert tensors[name].shape == sent.shape
        assert tensors[name].tobytes() == sent.tobytes()
        assert tensors[name].flags.aligned
    assert unpack(pack({}, {}), 100) == ({}, {})


def test_strided_tensors_arrive_in_order() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, tensors = unpack(pack({}, {"t": whole.T, "s": whole[:, ::2]}), 10_000)
    np.testing.assert_array_equal(tensors["t"], whole.T)
    np.testing.assert_array_equal(tensors["s"], whole[:, ::2])


def test_tensors_that_arrive_misaligned_are_moved() -> None:
    content = blob(one(), b"\x00\x00\x80?")
    padded = blob(json.dumps(one()).encode() + b" ", b"\x00\x00\x80?")
    for sent in (content, padded):
        tensor = unpack(sent, 1000)[1]["w"]
        assert tensor.tolist() == [1.0]
        assert tensor.flags.aligned


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header"),
        (b"\x01\x02", "header"),
        (b"\x80\x04\x95pickle?", "header"),
        ((2**63).to_bytes(8, "little") + b"{}", "header"),
        (blob(b"{" * 50), "cannot be read"),
        (blob(b"[" * 200_000), "cannot be read"),
        (blob([1]), "no table"),
        (blob({}), "no facts"),
        (blob({"__metadata__": {"other": "{}"}}), "no facts"),
        (blob({"__metadata__": {"fedtl": 3}}), "no text"),
        (blob({"__metadata__": {"fedtl": "[]"}}), "no table"),
        (blob({"__metadata__": {"fedtl": '{"a": NaN}'}}), "cannot be read"),
        (blob({"__metadata__": {"fedtl": '{"a": 1e999}'}}), "cannot be read"),
        (blob({"__metadata__": {"fedtl": '{"a": ' + "9" * 5000 + "}"}}), "cannot be read"),
        (blob(described(w=3)), "described"),
        (blob(one(dtype="F16"), b"1234"), "wrong type"),
        (blob(one(dtype="BOOL"), b"1234"), "wrong type"),
        (blob(one(dtype=["F32"]), b"1234"), "wrong type"),
        (blob(one(shape=[-1])), "shape"),
        (blob(one(shape=[1.0]), b"1234"), "shape"),
        (blob(one(shape=[True]), b"1234"), "shape"),
        (blob(one(shape="1"), b"1234"), "shape"),
        (blob(one(shape=[1] * 9), b"1234"), "shape"),
        (blob(one(shape=[2**40]), b"1234"), "another size"),
        (blob(one(shape=[2**47, 2**47]), b"1234"), "another size"),
        (blob(one(shape=[0, 2**47, 2**47], offsets=[0, 0])), "absurd"),
        (blob(one(offsets=[0, 8]), b"1234"), "another size"),
        (blob(one(offsets=[4, 0]), b"1234"), "another size"),
        (blob(one(offsets=[0]), b"1234"), "place"),
        (blob(one(), b"12345"), "do not fill"),
        (blob(one(offsets=[4, 8]), b"12345678"), "begin"),
        (
            blob(
                described(
                    a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                ),
                b"1234",
            ),
            "begin",
        ),
        (
            blob(
                described(
                    **{
                        f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                        for i in range(2**13 + 1)
                    }
                )
            ),
            "too many",
        ),
    ],
)
def test_malformed_content_is_refused_with_a_reason(content: bytes, why: str) -> None:
    with pytest.raises(InputError, match=why):
        unpack(content, 10**6)


def test_too_large_is_refused_before_it_is_read() -> None:
    content = pack({}, {"w": np.zeros(1000, np.float32)})
    with pytest.raises(InputError, match="too large"):
        unpack(content, len(content) - 1)
    assert unpack(content, len(content))


def test_lies_about_sizes_allocate_nothing() -> None:
    content = blob(one(shape=[2**45], offsets=[0, 2**47]), b"1234")
    tracemalloc.start()
    with pytest.raises(InputError):
        unpack(content, 10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damage_is_refused_or_read_never_worse(noise: bytes, at: int) -> None:
    good = pack(FACTS, TENSORS)
    for content in (noise, good[:at], good[:at] + noise + good[at + len(noise) :]):
        with suppress(InputError):
            unpack(content, 10_000)


def plan(**training: object) -> RoundPlan:
    settings = LocalTraining(2, 8, 0.1 + 0.2, momentum=0.9, weight_decay=1e-4, proximal=math.pi)
    return RoundPlan(7, np.array([1, 5]), np.array([3, 2**64 - 1], np.uint64), settings)


HEAD = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}


def travelled(content: tuple) -> tuple:
    return unpack(pack(*content), 10**6)


def test_plans_arrive_to_the_last_bit() -> None:
    sent = plan()
    got, head = wire.read_plan(*travelled(wire.train_request(sent, HEAD)))
    assert (got.round, got.training) == (sent.round, sent.training)
    assert got.clients.tolist() == [1, 5]
    assert got.batch_keys.tolist() == sent.batch_keys.tolist()
    assert {n: t.tobytes() for n, t in head.items()} == {n: t.tobytes() for n, t in HEAD.items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"round": -1}, "round"),
        ({"round": True}, "round"),
        ({"training": None}, "training"),
        ({"training": {"epochs": 1}}, "training"),
        ({"training": {**vars(LocalTraining(1, 1, 0.1)), "epochs": 1.5}}, "training"),
        ({"training": {**vars(LocalTraining(1, 1, 0.1)), "extra": 1}}, "training"),
    ],
)
def test_bad_facts_of_a_plan_are_refused(change: dict, why: str) -> None:
    facts, tensors = wire.train_request(plan(), HEAD)
    with pytest.raises(InputError, match=why):
        wire.read_plan({**facts, **change}, tensors)


def test_updates_arrive_and_only_those_of_the_clients_asked() -> None:
    stacked = {name: np.stack([t, t + 1]) for name, t in HEAD.items()}
    updates = ClientUpdates(
        7, np.array([1, 5]), stacked, np.array([10, 0]), np.array([0.5, np.nan])
    )
    _, tensors = travelled(wire.updates_reply(updates))
    got = wire.read_updates(7, np.array([1, 5]), tensors)
    assert got.tensors["weight"].tobytes() == stacked["weight"].tobytes()
    assert got.num_examples.tolist() == [10, 0]
    np.testing.assert_array_equal(got.loss, updates.loss)
    for others in ([1], [1, 6], [5, 1]):
        with pytest.raises(InputError, match="other clients"):
            wire.read_updates(7, np.array(others), tensors)
    for name, wrong in (
        ("loss", np.zeros(2, np.float32)),
        ("loss", np.zeros(3)),
        ("examples", np.zeros(2)),
        ("examples", np.zeros((2, 1), np.int64)),
        ("spy", np.zeros(2)),
    ):
        with pytest.raises(InputError, match=name):
            wire.read_updates(7, np.array([1, 5]), {**tensors, name: wrong})
    del tensors["loss"]
    with pytest.raises(InputError, match="loss"):
        wire.read_updates(7, np.array([1, 5]), tensors)


def test_metrics_must_count_the_clients_own_test_examples() -> None:
    count = np.array([[2, 3], [0, 1]])
    good = ClientMetrics(np.array([1, 5]), np.array([0.5, 0.25]), count - [[1, 0], [0, 0]], count)
    _, tensors = travelled(wire.metrics_reply(good))
    asked, tests = np.array([1, 5]), np.array([5, 1])
    got = wire.read_metrics(asked, 2, tests, tensors)
    assert got.correct.tolist() == good.correct.tolist()
    for change, value in (
        ("count", count + 10**12),
        ("correct", count + 1),
        ("correct", count - 9),
        ("count", count.astype(np.float64)),
        ("count", count[:1]),
        ("clients", np.array([1, 4])),
        ("loss_sum", np.zeros(1)),
        ("extra", np.zeros(2)),
    ):
        with pytest.raises(InputError):
            wire.read_metrics(asked, 2, tests, {**tensors, change: value})


def test_all_that_a_plan_may_hold_travels() -> None:
    corrections = {name: np.repeat(t[None] + 1, 2, axis=0) for name, t in HEAD.items()}
    sent = replace(
        plan(),
        task="statistics",
        corrections=corrections,
        reports=("start_loss", "start_gradient"),
        statistics=Statistics(random_features=5, scale=0.5, key=2**40),
        compression=Compression("sign", 0.5, False),
        personal=Personal("knnper", ("bias",), 0.5, choices=(0.0, 0.25)),
    )
    got, _ = wire.read_plan(*travelled(wire.train_request(sent, HEAD)))
    for name in ("task", "reports", "statistics", "compression", "personal"):
        assert getattr(got, name) == getattr(sent, name)
    for name in HEAD:
        assert got.corrections[name].tobytes() == corrections[name].tobytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "shell"},
        {"task": "statistics"},
        {"reports": ["features"]},
        {"reports": "start_loss"},
        {"statistics": {"gram": True}},
        {"personal": {**vars(Personal("ditto")), "method": "upload", "local": [], "choices": []}},
        {"training": {**vars(LocalTraining(1, 1, 0.1)), "layers": "first"}},
        {"compression": {"kind": "zip", "fraction": 0.1, "error_feedback": True}},
    ],
)
def test_a_task_that_nobody_knows_is_refused(wrong: dict[str, object]) -> None:
    facts, tensors = wire.train_request(plan(), HEAD)
    with pytest.raises(InputError, match="malformed"):
        wire.read_plan({**facts, **wrong}, tensors)


@pytest.mark.parametrize("random_features", [-1, 10**5, 2**60])
def test_nobody_can_be_made_to_allocate_without_limit(random_features: int) -> None:
    asked = Statistics(random_features=random_features)
    sent = replace(plan(), task="statistics", statistics=asked)
    with pytest.raises(InputError, match="random features"):
        wire.read_plan(*wire.train_request(sent, HEAD))
    large = replace(sent, statistics=Statistics(random_features=19_000, class_grams=True))
    with pytest.raises(InputError, match="too large"):
        wire.read_plan(*wire.train_request(large, HEAD))
    with pytest.raises(InputError, match="no head"):
        wire.read_plan(*wire.train_request(plan(), {}))


PROTECTED = Protection(
    clip=1.0, noise=0.5, least_per_class=3, ring_bits=32, scale=2.0**20, limit=2**29, masked=True
)  # fmt: skip


def test_how_an_answer_is_protected_travels() -> None:
    keys = np.array([3, 2**64 - 1], np.uint64)
    for asked in (
        PROTECTED,
        Protection(example_clip=0.5, example_noise=1.5),
        Protection(row_clip=2.0, noise=1.0, ring_bits=64, scale=1e-3, limit=2**63 - 1),
        Protection(clip=1.0),
    ):
        sent = replace(
            plan(), protection=asked, noise_keys=keys, weights=np.array([0.25, 1.0])
        )  # fmt: skip
        got, _ = wire.read_plan(*travelled(wire.train_request(sent, HEAD)))
        assert got.protection == asked
        assert got.noise_keys is not None
        assert got.noise_keys.tolist() == keys.tolist()
        assert got.weights is not None
        assert got.weights.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "change",
    [
        {"clip": -1.0}, {"noise": -0.5}, {"scale": -1.0}, {"row_clip": -1.0}, {"clip": math.inf},
        {"clip": 0.0}, {"least_per_class": 0}, {"least_per_class": -3}, {"ring_bits": 31},
        {"ring_bits": 0}, {"ring_bits": 16}, {"ring_bits": -32}, {"scale": 0.0}, {"limit": 0},
        {"limit": 2**31}, {"limit": -5}, {"example_noise": 1.0},
        {"ring_bits": 0, "scale": 0.0, "limit": 0},
        {"ring_bits": 0, "scale": 0.0, "masked": False},
        {"clip": "1"}, {"clip": 1}, {"masked": 1}, {"limit": 1.5}, {"limit": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_protection_that_protects_nothing_is_refused(change: dict[str, object]) -> None:
    facts, tensors = wire.train_request(replace(plan(), protection=PROTECTED), HEAD)
    wire.read_plan(facts, tensors)
    with pytest.raises(InputError, match="malformed"):
        wire.read_plan({**facts, "protection": {**facts["protection"], **change}}, tensors)


@pytest.mark.parametrize(
    "weights",
    [
        np.array([0.0, 1.0]), np.array([1.1, 1.0]), np.array([np.nan, 1.0]),
        np.array([-1.0, 1.0]), np.array([1.0]), np.ones(2, np.float32),
    ],
    ids=str,
)  # fmt: skip
def test_odd_weights_in_a_sum_are_refused(weights: np.ndarray) -> None:
    facts, tensors = wire.train_request(replace(plan(), protection=PROTECTED), HEAD)
    with pytest.raises(InputError, match="weights"):
        wire.read_plan(facts, {**tensors, "weights": weights})
    with pytest.raises(InputError, match="noise_keys"):
        wire.read_plan(facts, {**tensors, "noise_keys": np.zeros(3, np.uint64)})


def test_clients_that_failed_are_told_beside_those_that_did_not() -> None:
    ring = {"ring.values": np.array([[1, 2**32 - 1]], np.uint32)}
    failed = (ClientFailure(5, "of its answer an entry is too large"),)
    updates = ClientUpdates(7, np.array([1]), ring, np.array([10]), np.array([np.nan]), failed)
    facts, tensors = travelled(wire.updates_reply(updates))
    got = wire.read_updates(7, np.array([1, 5]), tensors, facts)
    assert got.failures == failed
    assert got.tensors["ring.values"].dtype == np.uint32
    assert got.tensors["ring.values"].tolist() == [[1, 2**32 - 1]]
    for clients in ([1], [1, 5, 6], [1, 6], [5]):
        with pytest.raises(InputError, match="other clients"):
            wire.read_updates(7, np.array(clients), tensors, facts)
    for odd in (3, [5], [[5]], [[5, 6]], [["5", "why"]], [[5, "a"], [5, "b"]], [[True, "why"]]):
        with pytest.raises(InputError, match="malformed"):
            wire.read_updates(7, np.array([1, 5]), tensors, {**facts, "failed": odd})


def test_corrections_of_another_form_are_refused() -> None:
    facts, tensors = wire.train_request(plan(), HEAD)
    odd = {"correction.weight": np.zeros((2, 9), np.float32)}
    with pytest.raises(InputError, match="corrections"):
        wire.read_plan(facts, {**tensors, **odd})


def test_an_honest_reply_is_within_its_limit() -> None:
    stacked = {name: np.repeat(t[None], 50, axis=0) for name, t in HEAD.items()}
    ids = np.arange(50)
    updates = ClientUpdates(7, ids, stacked, ids, np.zeros(50))
    counts = np.zeros((50, 2), np.int64)
    metrics = ClientMetrics(ids, np.zeros(50), counts, counts)
    limit = wire.reply_bytes(50, head_bytes(HEAD))
    assert len(pack(*wire.updates_reply(updates))) < limit
    assert len(pack(*wire.metrics_reply(metrics))) < limit
