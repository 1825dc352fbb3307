"""What clients do for themselves, against slow loops in float64 and against what it must equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedtl import seeding
from fedtl.clients.batches import batch_order
from fedtl.clients.evaluation import evaluate_clients, evaluate_heads, evaluate_own
from fedtl.clients.personal import RidgePath, judge_personal, personal_heads
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.personal_training import ALPHA, PURPOSE
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import Personal, RoundPlan
from fedtl.types import LocalTraining

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("oracle.py"))))

SIZES = [11, 0, 3, 24, 1, 13]
ALL = tuple(range(len(SIZES)))
WIDTH, CLASSES = 9, 4
HEADS = {
    "linear": oracle.linear_head(WIDTH, CLASSES),
    "mlp": oracle.mlp_head(WIDTH, [7, 6], CLASSES),
}
LAST = ("weight", "bias")
HIDDEN = tuple(name for name in HEADS["mlp"] if name not in LAST)
PLAIN = LocalTraining(2, 5, 0.1)
FULL = LocalTraining(2, 5, 0.1, momentum=0.5, weight_decay=0.01)

IN_ROUNDS = {
    "fedper": Personal("partial", local=LAST),
    "lgfedavg": Personal("partial", local=HIDDEN),
    "fedrep": Personal("fedrep", local=LAST, epochs=3),
    "fedbabu": Personal("fedbabu", local=LAST, epochs=2),
    "ditto": Personal("ditto", strength=0.7),
    "pfedme": Personal("pfedme", strength=3.0, inner_steps=4),
    "apfl": Personal("apfl", alpha=0.4, adaptive=True),
}
KEPT = ("fedper", "lgfedavg", "fedrep", "ditto", "apfl")
AT_THE_END = {
    "finetune": Personal("finetune", epochs=3),
    "ridge": Personal("ridge", local=LAST, scale=0.1, choices=(0.01, 1.0, 100.0)),
    "prior": Personal("prior", choices=(-1.0, -1.5, -1.2, -2.0)),
}


@pytest.fixture
def people():
    return oracle.federation(SIZES, WIDTH, CLASSES)


@pytest.fixture
def store(tmp_path):
    return PersonalStore(tmp_path / "own")


def plan_of(personal, round: int = 1, clients=ALL, training=PLAIN) -> RoundPlan:
    clients = np.array(clients, np.int64)
    keys = seeding.client_keys(3, "batches", round, clients)
    return RoundPlan(round, clients, keys, training, personal=personal)


def head_of(kind: str, round: int):
    """What the server might have come to; another one in each round."""
    return {n: (t * (1 + 0.3 * round)).astype(np.float32) for n, t in HEADS[kind].items()}


def fitted(personal, kind: str):
    """``local`` names only tensors that the head has."""
    return dataclasses.replace(personal, local=tuple(n for n in personal.local if n in HEADS[kind]))


def same(a, b) -> bool:
    return set(a) == set(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


def gradient(head, x, y):
    tensors = {n: torch.tensor(t, dtype=torch.float64, requires_grad=True) for n, t in head.items()}
    rows = torch.from_numpy(x.astype(np.float64))
    loss = torch.nn.functional.cross_entropy(
        oracle.scores(tensors, rows), torch.from_numpy(y.astype(np.int64))
    )
    found = torch.autograd.grad(loss, list(tensors.values()))
    return {n: own.numpy() for n, own in zip(tensors, found, strict=True)}


def descend(head, people, client: int, key: int, own: LocalTraining, more=None, rate=None):
    """SGD with momentum in float64; ``more(w)`` is added to each gradient."""
    data = people.client(client)
    w = {name: tensor.astype(np.float64) for name, tensor in head.items()}
    speed = dict.fromkeys(w, 0.0)
    for epoch in range(own.epochs):
        order = batch_order(key, len(data.labels), epoch)
        for low in range(0, len(order), own.batch_size):
            batch = order[low : low + own.batch_size]
            step = gradient(w, data.features[batch], data.labels[batch])
            extra = more(w) if more else dict.fromkeys(w, 0.0)
            for n in w:
                speed[n] = own.momentum * speed[n] + step[n] + own.weight_decay * w[n] + extra[n]
            w = {n: w[n] - (own.learning_rate if rate is None else rate) * speed[n] for n in w}
    return w


@pytest.mark.parametrize("device_path", ["kernel", "torch"])
def test_a_linear_head_has_only_a_last_layer(people, device_path: str) -> None:
    from fedtl.clients.batched import train_batched

    head, starts = HEADS["linear"], {n: t[None] for n, t in HEADS["linear"].items()}

    def train(layers):
        plan = plan_of(None, training=dataclasses.replace(FULL, layers=layers))
        if device_path == "kernel":
            return train_clients(people, head, plan).tensors
        return train_batched(people, starts, plan, threads=1, device="cpu").tensors

    assert same(train("last"), train("all"))
    for name, tensor in train("hidden").items():
        assert tensor.tobytes() == np.repeat(head[name][None], len(SIZES), 0).tobytes()


@pytest.mark.parametrize(("layers", "trained"), [("last", LAST), ("hidden", HIDDEN)])
def test_layers_that_are_not_trained_stay_and_the_others_take_the_gradients_step(
    people, layers, trained
) -> None:
    head = HEADS["mlp"]
    plan = plan_of(None, training=LocalTraining(1, 100, 0.1, weight_decay=0.3, layers=layers))
    found = train_clients(people, head, plan).tensors
    for i, client in enumerate(plan.clients.tolist()):
        data = people.client(client)
        step = gradient(head, data.features, data.labels) if len(data.labels) else None
        for name, tensor in head.items():
            if step is None or name not in trained:
                assert found[name][i].tobytes() == tensor.tobytes()
            else:
                expected = tensor - 0.1 * (step[name] + 0.3 * tensor)
                np.testing.assert_allclose(found[name][i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("epochs", [0, 3])
def test_ditto_follows_its_equation(people, store, kind: str, epochs: int) -> None:
    personal = Personal("ditto", strength=0.7, epochs=epochs)
    own = [dict(head_of(kind, 1)) for _ in SIZES]
    for round in (1, 2):
        w, plan = head_of(kind, round), plan_of(personal, round, training=FULL)
        updates = do_task(people, w, plan, store=store)
        assert same(
            updates.tensors, train_clients(people, w, plan_of(None, round, training=FULL)).tensors
        )
        training = dataclasses.replace(FULL, epochs=epochs or FULL.epochs)
        for i in range(len(SIZES)):
            own[i] = descend(
                own[i], people, i, int(plan.batch_keys[i]), training,
                lambda v, w=w: {n: 0.7 * (v[n] - w[n]) for n in v},
            )  # fmt: skip
    heads = personal_heads(people, w, plan_of(personal, 3), store=store)
    for i, size in enumerate(SIZES):
        for name in w:
            expected = own[i][name] if size else w[name]
            np.testing.assert_allclose(heads[name][i], expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kind", list(HEADS))
def test_pfedme_follows_its_equation(people, kind: str) -> None:
    personal = IN_ROUNDS["pfedme"]
    head, plan = HEADS[kind], plan_of(personal, training=FULL)
    updates = do_task(people, head, plan)
    for i, size in enumerate(SIZES):
        data, w = people.client(i), {n: t.astype(np.float64) for n, t in head.items()}
        theta, first = dict(w), 0.0
        for epoch in range(FULL.epochs):
            order = batch_order(int(plan.batch_keys[i]), size, epoch)
            for low in range(0, size, FULL.batch_size):
                batch = order[low : low + FULL.batch_size]
                x, y = data.features[batch], data.labels[batch]
                if epoch == 0:
                    own = {n: torch.from_numpy(t) for n, t in theta.items()}
                    scores = oracle.scores(own, torch.from_numpy(x.astype(np.float64)))
                    first += torch.nn.functional.cross_entropy(
                        scores, torch.from_numpy(y.astype(np.int64)), reduction="sum"
                    ).item()
                speed = dict.fromkeys(w, 0.0)
                for _ in range(personal.inner_steps):
                    step = gradient(theta, x, y)
                    for n in w:
                        pull = 3.0 * (theta[n] - w[n]) + FULL.weight_decay * theta[n]
                        speed[n] = FULL.momentum * speed[n] + step[n] + pull
                        theta[n] = theta[n] - FULL.learning_rate * speed[n]
                w = {n: w[n] - FULL.learning_rate * 3.0 * (w[n] - theta[n]) for n in w}
        for name in head:
            np.testing.assert_allclose(updates.tensors[name][i], w[name], rtol=2e-4, atol=3e-6)
        np.testing.assert_allclose(updates.loss[i], first / size if size else np.nan, rtol=1e-5)
    assert updates.num_examples.tolist() == SIZES


def test_pfedmes_own_head_is_pulled_to_the_last_one(people) -> None:
    personal, head = IN_ROUNDS["pfedme"], HEADS["linear"]
    heads = personal_heads(people, head, plan_of(personal))
    key = int(plan_of(personal).batch_keys[3])
    longer = dataclasses.replace(PLAIN, epochs=PLAIN.epochs * 4)
    expected = descend(
        head, people, 3, key, longer, lambda v: {n: 3.0 * (v[n] - head[n]) for n in v}
    )
    for name in head:
        np.testing.assert_allclose(heads[name][3], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", list(HEADS))
def test_apfl_follows_its_equation(people, store, kind: str, adaptive: bool) -> None:
    personal, rounds = Personal("apfl", alpha=0.4, adaptive=adaptive), (1, 2, 3)
    v = [{n: t.astype(np.float64) for n, t in head_of(kind, 1).items()} for _ in SIZES]
    alpha = [0.4] * len(SIZES)
    for round in rounds:
        w, plan = head_of(kind, round), plan_of(personal, round, training=FULL)
        updates = do_task(people, w, plan, store=store)
        assert same(
            updates.tensors, train_clients(people, w, plan_of(None, round, training=FULL)).tensors
        )
        for i, size in enumerate(SIZES):
            data, a = people.client(i), alpha[i]
            u = {n: a * v[i][n] + (1 - a) * w[n] for n in w}
            if adaptive and size:
                step = gradient(u, data.features, data.labels)
                slope = sum(
                    ((v[i][n] - w[n]) * (step[n] + FULL.weight_decay * u[n])).sum() for n in w
                )
                a = alpha[i] = float(np.clip(a - FULL.learning_rate * slope, 0, 1))
                u = {n: a * v[i][n] + (1 - a) * w[n] for n in w}
            rate = a**2 * FULL.learning_rate
            u = descend(u, people, i, int(plan.batch_keys[i]), FULL, rate=rate)
            v[i] = {n: (u[n] - (1 - a) * w[n]) / a for n in w}
    for i in range(len(SIZES)):
        last, own = store.load(PURPOSE, people.names[i], 4)
        assert last == 3
        np.testing.assert_allclose(own.pop(ALPHA), [alpha[i]], rtol=1e-5)
        for name in w:
            np.testing.assert_allclose(own[name], v[i][name], rtol=1e-3, atol=2e-5)
    if adaptive:
        assert len({f"{a:.4f}" for a in alpha}) > 3, "alphas that are all alike show nothing"
    heads = personal_heads(people, w, plan_of(personal, 4), store=store)
    for name in w:
        expected = alpha[3] * v[3][name] + (1 - alpha[3]) * w[name]
        np.testing.assert_allclose(heads[name][3], expected, rtol=1e-4, atol=1e-5)


def test_apfl_that_shares_nothing_trains_alone(people, store) -> None:
    personal, head, alone = Personal("apfl", alpha=1.0), HEADS["linear"], None
    for round in (1, 2, 3):
        do_task(people, head_of("linear", round), plan_of(personal, round), store=store)
        start = {n: t if alone is None else alone[n][0] for n, t in head_of("linear", 1).items()}
        alone = train_clients(people, start, plan_of(None, round), initial=alone).tensors
    own = personal_heads(people, head, plan_of(personal, 4), store=store)
    busy = np.array(SIZES) > 0
    assert same({n: t[busy] for n, t in own.items()}, {n: t[busy] for n, t in alone.items()})


def test_apfls_own_head_rests_while_alpha_is_nothing(people, store) -> None:
    head = HEADS["linear"]
    do_task(people, head, plan_of(Personal("apfl", alpha=0.0)), store=store)
    assert same(store.load(PURPOSE, "c3", 2)[1], {**head, ALPHA: np.zeros(1)})


def test_fedper_trains_its_layer_with_the_shared_ones(people, store) -> None:
    head, again = head_of("mlp", 1), head_of("mlp", 2)
    do_task(people, head, plan_of(IN_ROUNDS["fedper"]), store=store)
    first = train_clients(people, head, plan_of(None)).tensors
    updates = do_task(people, again, plan_of(IN_ROUNDS["fedper"], 2), store=store)
    start = {n: np.repeat(t[None], len(SIZES), 0) for n, t in again.items()}
    start |= {n: first[n] for n in LAST}
    expected = train_clients(people, again, plan_of(None, 2), initial=start).tensors
    assert same(updates.tensors, {n: expected[n] for n in HIDDEN})
    heads = personal_heads(people, head_of("mlp", 3), plan_of(IN_ROUNDS["fedper"], 3), store=store)
    assert heads["weight"][3].tobytes() == expected["weight"][3].tobytes()
    assert heads["hidden.0.weight"][3].tobytes() == head_of("mlp", 3)["hidden.0.weight"].tobytes()


def test_fedrep_freezes_what_it_says(people, store) -> None:
    head, personal = HEADS["mlp"], IN_ROUNDS["fedrep"]
    updates = do_task(people, head, plan_of(personal), store=store)
    first = dataclasses.replace(PLAIN, layers="last", epochs=3)
    lasts = train_clients(people, head, plan_of(None, training=first))
    then = dataclasses.replace(PLAIN, layers="hidden")
    hidden = train_clients(
        people, head, plan_of(None, training=then), initial=dict(lasts.tensors)
    ).tensors
    assert same(updates.tensors, {n: hidden[n] for n in HIDDEN})
    assert updates.loss.tobytes() == lasts.loss.tobytes()
    for i, name in enumerate(people.names):
        own = store.load(PURPOSE, name, 2)[1]
        assert same(own, {n: lasts.tensors[n][i] for n in LAST})
        assert SIZES[i] == 0 or not same(own, {n: head[n] for n in LAST})


def test_fedbabu_trains_and_sends_hidden_layers_only_and_fine_tunes_all(people) -> None:
    head, personal = HEADS["mlp"], IN_ROUNDS["fedbabu"]
    hidden = dataclasses.replace(PLAIN, layers="hidden")
    updates = do_task(people, head, plan_of(personal, training=hidden))
    expected = train_clients(people, head, plan_of(None, training=hidden)).tensors
    assert same(updates.tensors, {n: expected[n] for n in HIDDEN})
    heads = personal_heads(people, head, plan_of(personal))
    tuned = dataclasses.replace(PLAIN, epochs=2)
    assert same(heads, train_clients(people, head, plan_of(None, training=tuned)).tensors)


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("name", list(IN_ROUNDS))
def test_bits_depend_on_no_grouping_and_no_threads(people, tmp_path, kind, name) -> None:
    personal = fitted(IN_ROUNDS[name], kind)
    together, apart = PersonalStore(tmp_path / "a"), PersonalStore(tmp_path / "b")
    for round in (1, 2, 3):
        head, plan = head_of(kind, round), plan_of(personal, round, training=FULL)
        whole = do_task(people, head, plan, store=together, threads=2, block_size=2)
        parts = [
            do_task(people, head, plan.part(np.array(some)), store=apart, threads=threads)
            for some, threads in (([0, 3], 1), ([1, 2, 4, 5], 3))
        ]
        for tensor in whole.tensors:
            assert whole.tensors[tensor][[0, 3]].tobytes() == parts[0].tensors[tensor].tobytes()
            assert (
                whole.tensors[tensor][[1, 2, 4, 5]].tobytes() == parts[1].tensors[tensor].tobytes()
            )
    last = plan_of(personal, 4)
    a = personal_heads(people, head, last, store=together, threads=2)
    b = personal_heads(people, head, last.part(np.array([3, 5])), store=apart)
    assert same({n: t[[3, 5]] for n, t in a.items()}, b)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in HEADS for n in KEPT if (k, n) != ("linear", "lgfedavg")],  # it keeps nothing
)
def test_a_round_that_is_done_again_has_the_same_bits(people, store, kind, name) -> None:
    personal = fitted(IN_ROUNDS[name], kind)
    replies, states = {}, {}
    for round in (1, 2, 3, 2, 3):  # killed after round 3, resumed from the commit of round 1
        head = head_of(kind, round)
        updates = do_task(people, head, plan_of(personal, round), store=store)
        state = store.load(PURPOSE, "c3", round + 1)[1]
        if round in replies:
            assert same(updates.tensors, replies[round])
            assert same(state, states[round])
        replies[round], states[round] = dict(updates.tensors), state
    assert not same(states[2], states[3]), "rounds that change nothing show nothing"


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_needs_a_place_of_its_own(people, store, name) -> None:
    head, plan = HEADS["mlp"], plan_of(IN_ROUNDS[name])
    with pytest.raises(InputError, match="place where clients keep"):
        do_task(people, head, plan)
    do_task(people, head, plan, store=store)
    wider = oracle.mlp_head(WIDTH, [8, 5], CLASSES)
    with pytest.raises(EnvironmentFault, match="'c0' has kept since round 1"):
        do_task(people, wider, plan_of(IN_ROUNDS[name], 2), store=store)


def test_what_is_not_finite_is_not_kept(people, store) -> None:
    personal, head = Personal("ditto", strength=0.1), HEADS["linear"]
    do_task(people, head, plan_of(personal), store=store)
    before = store.load(PURPOSE, "c3", 9)
    broken = {n: np.full_like(t, np.nan) for n, t in head.items()}
    do_task(people, broken, plan_of(personal, 2), store=store)
    after = store.load(PURPOSE, "c3", 9)
    assert (before[0], after[0]) == (1, 1)
    assert same(before[1], after[1])


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize("name", ["fedper", "lgfedavg", "fedrep", "ditto", "apfl"])
def test_who_never_took_part(people, store, kind, name) -> None:
    personal, head = fitted(IN_ROUNDS[name], kind), head_of(kind, 2)
    do_task(people, head_of(kind, 1), plan_of(personal, clients=[0, 4]), store=store)
    heads = personal_heads(people, head, plan_of(personal, 2), store=store)
    mine = {n: t[3] for n, t in heads.items()}
    if name in ("ditto", "apfl") or not personal.local:
        for n in head:
            np.testing.assert_allclose(mine[n], head[n], rtol=1e-6)
    else:
        layers = "hidden" if name == "lgfedavg" else "last"
        training = dataclasses.replace(PLAIN, layers=layers)
        newcomer = train_clients(people, head, plan_of(None, 2, [3], training)).tensors
        assert same(mine, {n: t[0] for n, t in newcomer.items()})
        assert all(
            (mine[n].tobytes() == head[n].tobytes()) == (n not in personal.local) for n in head
        )


@pytest.mark.parametrize("name", [*IN_ROUNDS, *AT_THE_END])
def test_who_has_no_rows_has_the_shared_head(people, store, name) -> None:
    personal = {**IN_ROUNDS, **AT_THE_END}[name]
    kind = "linear" if name in AT_THE_END else "mlp"
    if name in IN_ROUNDS:
        do_task(people, head_of(kind, 1), plan_of(personal), store=store)
    head = head_of(kind, 2)
    heads = personal_heads(people, head, plan_of(personal, 2), store=store)
    assert same({n: t[1] for n, t in heads.items()}, head)
    assert not same({n: t[3] for n, t in heads.items()}, head)


def test_heads_are_judged_at_home_and_everywhere(people) -> None:
    plan, head = plan_of(AT_THE_END["finetune"]), HEADS["linear"]
    heads = personal_heads(people, head, plan)
    everyone = np.arange(20)
    own, abroad = judge_personal(people, head, plan, everyone, threads=2)
    expected = evaluate_own(people, heads, plan.clients)
    everywhere = evaluate_heads(people.features, people.labels, everyone, heads, CLASSES)
    for field in ("loss_sum", "correct", "count"):
        assert getattr(own, field).tobytes() == getattr(expected, field).tobytes()
        assert getattr(abroad, field).tobytes() == getattr(everywhere, field).tobytes()
    assert abroad.clients.tolist() == own.clients.tolist() == list(range(len(SIZES)))
    assert judge_personal(people, head, plan)[1] is None


def test_a_prior_replaces_the_servers(people) -> None:
    heads = personal_heads(people, HEADS["linear"], plan_of(AT_THE_END["prior"]))
    labels = people.client(3).labels
    for c in range(CLASSES):
        own = np.log(((labels == c).sum() + 1) / (24 + CLASSES))
        server = AT_THE_END["prior"].choices[c]
        assert heads["bias"][3, c] == pytest.approx(
            HEADS["linear"]["bias"][c] - server + own, rel=1e-5
        )
    assert heads["weight"][3].tobytes() == HEADS["linear"]["weight"].tobytes()


def rows_of(n: int, width: int = 6, seed: int = 0):
    random = np.random.default_rng(seed)
    z = np.concatenate([random.normal(size=(n, width - 1)), np.ones((n, 1))], axis=1)
    return z, np.eye(3)[random.integers(0, 3, n)], random.normal(size=(width, 3))


def refit(z, y, shared, rho: float):
    width = z.shape[1]
    return np.linalg.solve(z.T @ z + rho * np.eye(width), z.T @ y + rho * shared)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 30])
@pytest.mark.parametrize("rho", [1e-2, 1.0, 1e3])
def test_press_is_leaving_each_row_out(n: int, rho: float) -> None:
    z, y, shared = rows_of(n)
    path = RidgePath.of(z, y, shared)
    np.testing.assert_allclose(path.weights(rho), refit(z, y, shared, rho), rtol=1e-9, atol=1e-11)
    keep = ~np.eye(n, dtype=bool)
    errors = [y[i] - z[i] @ refit(z[keep[i]], y[keep[i]], shared, rho) for i in range(n)]
    assert path.press(rho) == pytest.approx(np.square(errors).sum(), rel=1e-9)


def test_the_chosen_pull_is_the_best_and_of_equal_ones_the_largest() -> None:
    z, y, shared = rows_of(40)
    path, pulls = RidgePath.of(z, y, shared), (1e-2, 1.0, 1e2, 1e4)
    assert path.chosen(pulls) == min(pulls, key=path.press) < 1e4
    z, y, shared = rows_of(1)  # left out, a single row is predicted by the shared head alone
    assert RidgePath.of(z, y, shared).chosen(pulls) == 1e4


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_heads_are_in_the_shared_heads_scale_and_leave_absent_classes(people, bias) -> None:
    head = {n: t.copy() for n, t in HEADS["linear"].items()}
    people = dataclasses.replace(people, labels=people.labels % 3)
    head["weight"][3], head["bias"][3] = 0, -1e6
    if not bias:
        head["bias"][:3] = 0
    local, scale = LAST if bias else LAST[:1], 0.25
    plan = plan_of(Personal("ridge", local=local, scale=scale, choices=(5.0,)))
    heads = personal_heads(people, head, plan, threads=2)
    data = people.client(3)
    z = data.features.astype(float)
    shared = head["weight"][:3].T.astype(float)
    if bias:
        z = np.concatenate([z, np.ones((24, 1))], axis=1)
        shared = np.concatenate([shared, head["bias"][None, :3]])
    expected = refit(z, np.eye(3)[data.labels], shared * scale, 5.0) / scale
    np.testing.assert_allclose(heads["weight"][3, :3], expected[:WIDTH].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        heads["bias"][3, :3], expected[WIDTH] if bias else np.zeros(3), rtol=1e-5, atol=1e-6
    )
    assert not heads["weight"][:, 3].any()
    assert (heads["bias"][:, 3] == -1e6).all()


def test_a_wrong_label_is_named(people) -> None:
    labels = people.labels.copy()
    labels[people.train.of(3)[0]] = CLASSES
    people = dataclasses.replace(people, labels=labels)
    knn = Personal("knnper", neighbours=3, choices=(0.0, 0.5))
    for personal in (AT_THE_END["ridge"], AT_THE_END["prior"], knn):
        with pytest.raises(InputError, match=r"client 3 \(c3\)"):
            judge_personal(people, HEADS["linear"], plan_of(personal))


def test_shared_heads_are_what_fedavg_would_judge(people) -> None:
    # lambda 0 of knnper is in the golden tests; here a client with one row, which has no neighbour
    plan = plan_of(Personal("knnper", neighbours=3, choices=(1.0,)), clients=[1, 4])
    own, _ = judge_personal(people, HEADS["mlp"], plan)
    shared = evaluate_clients(people, HEADS["mlp"], plan.clients)
    assert own.correct.tolist() == shared.correct.tolist()
    np.testing.assert_allclose(own.loss_sum, shared.loss_sum, rtol=1e-6)
