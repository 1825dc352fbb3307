"""The invariants of personalised strategies, through the same rounds that a run has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save

from fedtl import seeding
from fedtl.clients.evaluation import evaluate_clients, evaluate_own
from fedtl.clients.personal import RidgePath, judge_personal, personal_heads
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.personal_training import PURPOSE
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.engines import wire
from fedtl.evaluation.metrics import per_client
from fedtl.evaluation.personalised import judge_personalised
from fedtl.evaluation.references import Judge, judge_shared
from fedtl.plans import RoundPlan
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import personal_of
from fedtl.strategies.class_means import FedLDA
from fedtl.strategies.personal import (
    APFL,
    Ditto,
    FedBABU,
    FedPer,
    FedRep,
    FineTune,
    KnnPer,
    LGFedAvg,
    PersonalRidge,
    PFedMe,
    client_prior,
)
from fedtl.types import LocalTraining, Population, Rows

TRAINING = LocalTraining(2, 8, 0.1)
SEED = 5


def head_of(kind: str, width: int = 9, num_classes: int = 3):
    random = np.random.default_rng(1)
    head = {"weight": np.zeros((num_classes, width), np.float32)}
    if kind == "mlp":
        hidden = {
            "hidden.0.weight": random.normal(size=(8, width)) / 3,
            "hidden.0.bias": np.ones(8),
        }
        head = {n: t.astype(np.float32) for n, t in hidden.items()}
        head["weight"] = np.zeros((num_classes, 8), np.float32)
    return head | {"bias": np.zeros(num_classes, np.float32)}


def run(strategy, population, head, store=None, rounds: int = 3, listen=None, training=TRAINING):
    """The rounds of a run, every client in each: the server's last state."""
    clients = np.arange(population.num_clients)
    state = strategy.init(head, len(clients))
    for round in range(1, rounds + 1):
        keys = seeding.client_keys(SEED, "batches", round, clients)
        plan = strategy.plan(state, RoundPlan(round, clients, keys, training))
        updates = do_task(population, state.head, plan, store=store)
        if listen is not None:
            listen(plan, state, updates)
        updates = dataclasses.replace(updates, training=plan.training)
        state = strategy.step(state, updates)
    return state


def the_end(population, personal, rounds: int = 3) -> RoundPlan:
    clients = np.arange(population.num_clients)
    keys = seeding.client_keys(SEED, "batches", rounds + 1, clients)
    return RoundPlan(rounds + 1, clients, keys, TRAINING, personal=personal)


def alone(population, head, rounds: int = 3, training=TRAINING):
    """Every client by itself, in the order of the federation's batches."""
    heads, clients = None, np.arange(population.num_clients)
    for round in range(1, rounds + 1):
        keys = seeding.client_keys(SEED, "batches", round, clients)
        plan = RoundPlan(round, clients, keys, training)
        heads = train_clients(population, head, plan, initial=heads).tensors
    return heads


def same(a, b) -> bool:
    return set(a) == set(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_ditto_without_a_pull_is_local_training(population, tmp_path, kind) -> None:
    store, strategy = PersonalStore(tmp_path), Ditto(strength=0.0)
    state = run(strategy, population, head_of(kind), store)
    heads = personal_heads(
        population, state.head, the_end(population, personal_of(strategy, state)), store=store
    )
    assert same(heads, alone(population, head_of(kind)))


def test_ditto_with_an_endless_pull_is_the_shared_head(population, tmp_path) -> None:
    # With eta lambda = 1 a step ends at w - eta grad F(v), and no gradient is longer than a row.
    longest = np.abs(population.features).max()
    for rate in (1e-2, 1e-4, 1e-6):
        store, strategy = PersonalStore(tmp_path / str(rate)), Ditto(strength=1 / rate)
        training = dataclasses.replace(TRAINING, learning_rate=rate)
        heads_before = {}

        def listen(plan, state, updates, kept=heads_before) -> None:
            kept.update(state.head)

        state = run(
            strategy, population, head_of("linear"), store, listen=listen, training=training
        )
        heads = personal_heads(
            population, state.head, the_end(population, personal_of(strategy, state)), store=store
        )
        apart = np.abs(heads["weight"] - heads_before["weight"]).max()
        assert 0 < apart < 1.001 * rate * longest


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_neighbours_without_weight_are_the_shared_head(population, kind) -> None:
    state = run(KnnPer(), population, head_of(kind))
    personal = dataclasses.replace(personal_of(KnnPer(), state), choices=(0.0,))
    everyone = population.test.index
    own, abroad = judge_personal(population, state.head, the_end(population, personal), everyone)
    shared = evaluate_clients(population, state.head, own.clients)
    assert own.correct.tolist() == shared.correct.tolist()
    assert own.count.tolist() == shared.count.tolist()
    np.testing.assert_allclose(own.loss_sum, shared.loss_sum, rtol=1e-5)
    assert abroad.correct.tolist() == [shared.correct.sum(0).tolist()] * population.num_clients


def test_the_ridge_path_ends_at_both_heads() -> None:
    # measured at 1e12 when the method was written down: 1.7e-10
    random = np.random.default_rng(0)
    for n in (20, 300):
        z = random.normal(size=(n, 33))
        y = np.eye(10)[random.integers(0, 10, n)]
        shared = random.normal(size=(33, 10))
        path = RidgePath.of(z, y, shared)
        apart = np.linalg.norm(path.weights(1e12) - shared) / np.linalg.norm(shared)
        assert apart < 1e-9
    local = np.linalg.lstsq(z, y, rcond=None)[0]
    apart = np.linalg.norm(path.weights(1e-9) - local) / np.linalg.norm(local)
    assert apart < 1e-9


def test_fedper_with_a_linear_head_is_local_training(population, tmp_path) -> None:
    store, head = PersonalStore(tmp_path), head_of("linear")
    state = run(FedPer(), population, head, store)
    heads = personal_heads(
        population, state.head, the_end(population, FedPer().personal(state)), store=store
    )
    assert same(heads, alone(population, head))
    assert same(state.head, head)


def test_fedrep_with_a_linear_head_is_local_training(population, tmp_path) -> None:
    store, strategy = PersonalStore(tmp_path), FedRep(head_epochs=4)
    state = run(strategy, population, head_of("linear"), store)
    heads = personal_heads(
        population, state.head, the_end(population, strategy.personal(state)), store=store
    )
    longer = dataclasses.replace(TRAINING, epochs=4)
    assert same(heads, alone(population, head_of("linear"), training=longer))


def test_lgfedavg_with_a_linear_head_is_fedavg(population) -> None:
    state = run(LGFedAvg(), population, head_of("linear"))
    assert same(state.head, run(FedAvg(), population, head_of("linear")).head)
    heads = personal_heads(population, state.head, the_end(population, LGFedAvg().personal(state)))
    assert all(same({n: t[k] for n, t in heads.items()}, state.head) for k in range(5))


def test_fedbabu_with_a_linear_head_only_fine_tunes(population) -> None:
    head, strategy = head_of("linear"), FedBABU(epochs=4)
    state = run(strategy, population, head)
    assert same(state.head, head)
    heads = personal_heads(population, head, the_end(population, strategy.personal(state)))
    plan = dataclasses.replace(the_end(population, None), training=LocalTraining(4, 8, 0.1))
    assert same(heads, train_clients(population, head, plan).tensors)


KEEPING = {
    "fedper": FedPer(),
    "lgfedavg": LGFedAvg(),
    "fedrep": FedRep(head_epochs=2),
    "ditto": Ditto(
        strength=0.3, epochs=3
    ),  # in as few steps as the shared head's both are the same
    "apfl": APFL(),
}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("name", list(KEEPING))
def test_what_is_a_clients_own_never_leaves_it(population, tmp_path, name, kind) -> None:
    if (name, kind) == ("lgfedavg", "linear"):
        kind = "mlp"  # with a linear head it has nothing of its own
    store, strategy, blobs = PersonalStore(tmp_path), KEEPING[name], []
    secrets, begun = set(), head_of(kind)

    def listen(plan, state, updates) -> None:
        request = wire.pack(*wire.train_request(plan, state.head))
        reply = wire.pack(*wire.updates_reply(updates))
        assert set(updates.tensors) == set(plan.reply(state.head))
        local = plan.personal.local
        assert not any(wire.HEAD + n in wire.updates_reply(updates)[1] for n in local)
        assert not any(f'"{wire.HEAD}{n}"'.encode() in reply for n in local)
        for tensor in updates.tensors.values():  # the search finds what is there
            assert tensor[2].tobytes() in reply
        commit = save({n: np.ascontiguousarray(t) for n, t in state.head.items()}, None)
        blobs.extend([request, reply, commit, *(t.tobytes() for t in state.slots.values())])
        for client in population.names:
            for n, tensor in store.load(PURPOSE, client, plan.round + 1)[1].items():
                rows = [tensor, *(tensor if tensor.ndim > 1 else [])]
                start = begun.get(n)
                starts = [] if start is None else [start.tobytes(), *(r.tobytes() for r in start)]
                secrets.update(row.tobytes() for row in rows if row.tobytes() not in starts)

    state = run(strategy, population, begun, store, listen=listen)
    blobs.append(save(dict(state.head)))
    assert len(secrets) >= 3 * 5 * (2 if kind == "linear" else 1)
    assert not any(secret in blob for secret in secrets for blob in blobs)
    for n in personal_of(strategy, state).local:
        assert state.head[n].tobytes() == begun[n].tobytes()
    assert state.slots == {}


def conflicting() -> Population:
    """Six clients, of which two each call the three corners by other names."""
    random = np.random.default_rng(2)
    size, own = 60, 40
    corners = random.integers(0, 3, 6 * size)
    features = random.normal(size=(6 * size, 9)).astype(np.float32)
    features[np.arange(6 * size), corners] += 4
    labels = ((corners + np.repeat(np.arange(6), size) // 2) % 3).astype(np.int32)
    rows = np.arange(6 * size).reshape(6, size)
    return Population(
        features,
        labels,
        ("a", "b", "c"),
        Rows(rows[:, :own].ravel(), np.arange(7) * own),
        Rows(rows[:, own:].ravel(), np.arange(7) * (size - own)),
        tuple(f"client-{i}" for i in range(6)),
        ("",) * 6,
    )


METHODS = {
    "finetune": FineTune(),
    "fedper": FedPer(),
    "lgfedavg": LGFedAvg(),
    "fedrep": FedRep(),
    "fedbabu": FedBABU(epochs=10),
    "ditto": Ditto(),
    "pfedme": PFedMe(strength=1.0),
    "apfl": APFL(),
    "knnper": KnnPer(),
    "personal_ridge": PersonalRidge(),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_where_clients_disagree_their_own_heads_are_better_at_home(tmp_path, name) -> None:
    population, strategy = conflicting(), METHODS[name]
    store, rounds = PersonalStore(tmp_path), 1 if name == "personal_ridge" else 10
    head = head_of("linear" if rounds == 1 else "mlp")
    state = run(strategy, population, head, store, rounds=rounds)
    place = Judge(population, np.arange(6), population.test.index, 1, "cpu")
    shared = judge_shared(place, state.head)
    own = judge_personalised(
        place, state.head, personal_of(strategy, state), TRAINING, rounds, SEED, store
    )
    assert shared.facts["accuracy"] < 0.6
    assert own.facts["accuracy"] > 0.9
    assert own.facts["accuracy_everyone"] < 0.6
    assert own.clients.tolist() == list(range(6))


def test_what_the_last_round_left_is_judged(population, tmp_path) -> None:
    store, strategy = PersonalStore(tmp_path), Ditto()
    state = run(strategy, population, head_of("linear"), store)
    personal = personal_of(strategy, state)
    place = Judge(population, np.array([1, 3]), population.test.index, 2, "cpu")
    found = judge_personalised(place, state.head, personal, TRAINING, 3, SEED, store)
    heads = personal_heads(population, state.head, the_end(population, personal), store=store)
    expected = per_client(evaluate_own(population, heads, np.arange(5)))
    assert found.own.loss.tobytes() == expected.loss[[1, 3]].tobytes()


def test_a_clients_prior_that_is_everybodys_changes_nothing() -> None:
    population = conflicting()
    labels = np.arange(len(population.labels), dtype=np.int32) % 4
    population = dataclasses.replace(population, labels=labels, classes=("a", "b", "c", "d"))
    state = run(FedLDA(), population, head_of("linear", num_classes=4), rounds=1)
    heads = personal_heads(
        population, state.head, the_end(population, client_prior(state.slots["counts"]))
    )
    assert all(same({n: t[k] for n, t in heads.items()}, state.head) for k in range(6))


def test_a_clients_prior_helps_where_its_classes_are_few() -> None:
    random = np.random.default_rng(4)
    labels = np.concatenate([np.full(80, k % 3) for k in range(6)])
    labels[::8] = random.integers(0, 3, 60)
    population = conflicting()
    size, own = 80, 40
    features = random.normal(size=(480, 9)).astype(np.float32)
    features[np.arange(480), labels] += 1
    rows = np.arange(480).reshape(6, size)
    population = dataclasses.replace(
        population,
        features=features,
        labels=labels.astype(np.int32),
        train=Rows(rows[:, :own].ravel(), np.arange(7) * own),
        test=Rows(rows[:, own:].ravel(), np.arange(7) * own),
    )
    state = run(FedLDA(), population, head_of("linear"), rounds=1)
    place = Judge(population, np.arange(6), population.test.index, 1, "cpu")
    personal = client_prior(state.slots["counts"])
    own_prior = judge_personalised(place, state.head, personal, TRAINING, 1, SEED)
    shared = judge_shared(place, state.head)
    assert own_prior.facts["accuracy"] > shared.facts["accuracy"] + 0.1


def test_a_personal_ridge_run_with_an_endless_pull_is_the_shared_head() -> None:
    population, strategy = conflicting(), PersonalRidge()
    state = run(strategy, population, head_of("linear"), rounds=1)
    far = dataclasses.replace(personal_of(strategy, state), choices=(1e12,))
    heads = personal_heads(population, state.head, the_end(population, far))
    for k in range(6):
        np.testing.assert_allclose(heads["weight"][k], state.head["weight"], rtol=1e-6, atol=1e-7)
