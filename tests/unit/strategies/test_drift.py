"""Drift-corrected and fair strategies against their equations, with clients in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.drift import (
    OWN,
    TOTAL,
    FedDyn,
    FedExP,
    FedNova,
    Mime,
    QFedAvg,
    Scaffold,
    applied_steps,
)
from fedtl.types import LocalTraining

HERE = Path(__file__).parent
w = SimpleNamespace(**run_path(str(HERE / "world.py")))
oracle = SimpleNamespace(**run_path(str(HERE.parent / "clients" / "oracle.py")))
SIZES = [12, 3, 30, 7, 20]
HEAD = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}
DRIFTING = LocalTraining(4, w.LAZY, 0.3, weight_decay=0.05)
ONE_STEP = replace(DRIFTING, epochs=1)
WEIGHTS = np.array(SIZES) / sum(SIZES)


def called(strategy) -> str:
    return type(strategy).__name__


@pytest.fixture
def exact_sums(monkeypatch) -> None:
    w.round_nothing(monkeypatch)


@pytest.fixture
def people(exact_sums):
    """Five clients that share neither classes nor features, of very unequal sizes."""
    random = np.random.default_rng(0)
    labels = [random.choice(3, size, p=random.dirichlet([0.3] * 3)) for size in SIZES]
    features = [random.normal(size=(len(y), 4)) + y[:, None] + random.normal() for y in labels]
    return w.world(labels, features, 3)


@pytest.fixture
def three(updates):
    random = np.random.default_rng(1)
    tensors = {name: t + random.normal(size=(3, *t.shape)) for name, t in HEAD.items()}
    given = updates(tensors, examples=[10, 25, 70])
    return replace(given, training=LocalTraining(2, 10, 0.1), loss=np.array([0.5, 2.0, 1.0]))


def last(strategy, people, training, num=5, **options):
    return list(w.rounds(strategy, people, training, num, **options))[-1]


def descent(people, training, num, weights=WEIGHTS, momentum=0.0):
    """Gradient descent on the weighted objective, with Mime's momentum if any."""
    head, m = people.head["weight"], 0.0
    for _ in range(num):
        own = people.gradients(np.repeat(head[None], len(weights), axis=0))
        gradient = np.tensordot(weights, own, 1) + training.weight_decay * head
        m = (1 - momentum) * gradient + momentum * m
        head = head - training.learning_rate * m
    return head


@pytest.mark.parametrize("strategy", [Scaffold(), FedAvg(), FedNova()], ids=called)
def test_one_full_step_each_is_gradient_descent(people, strategy) -> None:
    state = last(strategy, people, ONE_STEP, 20)
    exact = descent(people, ONE_STEP, 20)
    assert np.abs(state.head["weight"] - exact).max() <= 1e-15 * 20
    if isinstance(strategy, Scaffold):  # although the corrections are anything but zero
        assert np.abs(state.slots[OWN + "weight"]).max() > 0.1


def test_one_full_step_each_is_uniform_gradient_descent_too(people) -> None:
    state = last(Scaffold(weighting="uniform"), people, ONE_STEP, 20)
    exact = descent(people, ONE_STEP, 20, np.full(5, 0.2))
    assert np.abs(state.head["weight"] - exact).max() <= 1e-15 * 20


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn(alpha=0.3)], ids=called)
def test_identical_clients_are_fedavg(strategy, exact_sums) -> None:
    random = np.random.default_rng(4)
    y, x = random.integers(0, 3, 15), random.normal(size=(15, 4))
    alike = w.world([y] * 5, [x] * 5, 3)
    if isinstance(strategy, Scaffold):
        exact = last(FedAvg(), alike, DRIFTING)
        state = last(strategy, alike, DRIFTING)
        np.testing.assert_allclose(state.head["weight"], exact.head["weight"], atol=1e-14)
    else:  # one client's own path, which ends at its optimum and not where a pull would hold it
        state = last(strategy, alike, DRIFTING, 400)
        best = alike.optimum(DRIFTING.weight_decay)
        np.testing.assert_allclose(state.head["weight"], best, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffolds_variates_are_the_mean_gradients_of_the_steps(people, momentum: float) -> None:
    training = replace(DRIFTING, momentum=momentum)
    strategy = Scaffold()
    before, after = list(w.rounds(strategy, people, training, 4))[-2:]
    extra = strategy.plan(
        before, RoundPlan(4, np.arange(5), np.zeros(5, np.uint64), training)
    ).corrections["weight"]
    heads = np.repeat(before.head["weight"][None], 5, axis=0)
    speed, summed, counted = 0.0, 0.0, 0.0
    for i in range(4):  # a gradient of step i is applied in all steps from there on, fading
        gradient = people.gradients(heads) + 0.05 * heads
        speed = momentum * speed + gradient + extra
        heads = heads - 0.3 * speed
        applied = sum(momentum**j for j in range(4 - i))
        summed, counted = summed + applied * gradient, counted + applied
    np.testing.assert_allclose(after.slots[OWN + "weight"], summed / counted, atol=1e-13)


def some(round: int) -> np.ndarray:
    """Two or three of five clients; all have answered once after round 4."""
    return np.array([[0, 3], [1, 4], [0, 2, 4], [3, 4]][round % 4])


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn()], ids=called)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_mean_variate_is_over_the_population(people, strategy, weighting) -> None:
    strategy = replace(strategy, weighting=weighting)
    mass = np.array(SIZES) if weighting == "examples" else np.ones(5)
    seen = np.zeros(5, bool)
    for round, state in enumerate(w.rounds(strategy, people, DRIFTING, 9, some), start=1):
        seen[some(round)] = True
        own = state.slots[OWN + "weight"]
        total = np.tensordot(mass, own, 1)
        np.testing.assert_allclose(state.slots[TOTAL + "weight"], total, atol=1e-12)
        assert own[~seen].any() == 0
        # The whole population's mass: known, or estimated from those that have answered.
        everybody = mass[seen].mean() * 5
        if isinstance(strategy, Scaffold):
            plan = RoundPlan(1, np.array([1, 2]), np.zeros(2, np.uint64), DRIFTING)
            extra = strategy.plan(state, plan).corrections["weight"]
            np.testing.assert_allclose(extra + own[[1, 2]], [total / everybody] * 2, atol=1e-12)
    assert seen.all()


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn(alpha=1.0)], ids=called)
def test_cohorts_too_reach_the_pooled_optimum(people, strategy) -> None:
    best, training = people.optimum(0.05), replace(DRIFTING, learning_rate=0.1)
    state = last(strategy, people, training, 600, cohort=some)
    drift = last(FedAvg(), people, training, 200, cohort=some)
    assert np.abs(state.head["weight"] - best).max() <= 1e-12
    assert np.abs(drift.head["weight"] - best).max() >= 1e-2


def test_feddyn_is_the_papers_algorithm_for_equal_weights(people) -> None:
    alpha, head, h = 0.4, people.head["weight"], 0.0
    own, training = np.zeros((5, 3, 5)), replace(DRIFTING, proximal=0.4)
    for round in range(1, 7):
        cohort = some(round)
        plan = RoundPlan(round, cohort, np.zeros(len(cohort), np.uint64), training)
        plan = replace(plan, corrections={"weight": -own[cohort]})
        sent = w.train(people, plan, w.ServerState({"weight": head})).tensors["weight"]
        own[cohort] = own[cohort] - alpha * (sent - head)
        h = h - alpha / 5 * (sent - head).sum(0)
        head = sent.mean(0) - h / alpha
    state = last(FedDyn(weighting="uniform", alpha=alpha), people, DRIFTING, 6, cohort=some)
    np.testing.assert_allclose(state.head["weight"], head, atol=1e-13)


@pytest.mark.parametrize("epochs", [1, 5])
def test_feddyn_rests_at_the_pooled_optimum(people, epochs: int) -> None:
    strategy, training = FedDyn(), replace(DRIFTING, epochs=epochs)
    best = people.optimum(0.05)
    own = people.gradients(np.repeat(best[None], 5, axis=0)) + 0.05 * best
    state = w.start(strategy, people)
    slots = {**state.slots, "mass": np.array(SIZES), OWN + "weight": own}
    slots[TOTAL + "weight"] = np.tensordot(np.array(SIZES), own, 1)
    state = w.ServerState({"weight": best}, slots)
    plan = strategy.plan(state, RoundPlan(1, np.arange(5), np.zeros(5, np.uint64), training))
    after = strategy.step(state, w.train(people, plan, state))
    np.testing.assert_allclose(after.head["weight"], best, atol=1e-13)


def test_a_client_without_rows_keeps_its_variate(updates) -> None:
    strategy = Scaffold(weighting="uniform")
    state = strategy.init(HEAD, 3)
    random = np.random.default_rng(6)
    tensors = {n: t + random.normal(size=(2, *t.shape)) for n, t in HEAD.items()}
    given = replace(updates(tensors, examples=[5, 5]), training=LocalTraining(1, 5, 0.1))
    state = strategy.step(state, given)
    idle = updates({n: t[None] for n, t in state.head.items()}, clients=[1])
    idle = replace(idle, num_examples=np.array([0]), training=LocalTraining(1, 5, 0.1))
    after = strategy.step(state, idle)
    for name, slot in state.slots.items():
        assert after.slots[name].tobytes() == slot.tobytes()
    assert state.slots[OWN + "weight"][1].any()


def test_the_kernels_clients_are_the_equations(population) -> None:
    """The same rounds with float32 clients in batches: what is sent is what they apply."""
    head = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
    training = LocalTraining(3, 8, 0.2, momentum=0.5, weight_decay=0.01)
    keys = np.arange(5).astype(np.uint64)
    for strategy in (Scaffold(), FedDyn(), Mime(momentum=0.5)):
        state = strategy.init(head, 5)
        for round in range(1, 4):
            plan = strategy.plan(state, RoundPlan(round, np.arange(5), keys, training))
            given = replace(train_clients(population, state.head, plan), training=plan.training)
            # The loop knows nothing of corrections: here they are a slope of the loss.
            for place in range(5):
                data = population.client(place)
                exact = loop(data, state.head, int(keys[place]), plan, place)
                for name in head:
                    np.testing.assert_allclose(given.tensors[name][place], exact[name], atol=3e-6)
            state = strategy.step(state, given)
        assert max(np.abs(t).max() for t in plan.corrections.values()) > 1e-3


def loop(data, head, key: int, plan, place: int):
    import torch

    from fedtl.clients.batches import batch_order

    own = plan.training
    first = {name: torch.tensor(t).double() for name, t in head.items()}
    tensors = {name: t.clone().requires_grad_() for name, t in first.items()}
    sgd = torch.optim.SGD(
        tensors.values(), own.learning_rate, own.momentum, weight_decay=own.weight_decay
    )
    x, y = torch.from_numpy(data.features).double(), torch.from_numpy(data.labels).long()
    for epoch in range(own.epochs):
        for chosen in torch.from_numpy(batch_order(key, len(y), epoch)).split(own.batch_size):
            sgd.zero_grad()
            loss = torch.nn.functional.cross_entropy(oracle.scores(tensors, x[chosen]), y[chosen])
            for name, t in tensors.items():
                loss = loss + own.proximal / 2 * (t - first[name]).square().sum()
                if name in plan.corrections:
                    loss = loss + (torch.tensor(plan.corrections[name][place]) * t).sum()
            loss.backward()
            sgd.step()
    return {name: t.detach().numpy() for name, t in tensors.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_applied_steps_are_counted_one_by_one(three, momentum: float) -> None:
    given = replace(three, training=replace(three.training, momentum=momentum))
    assert given.steps.tolist() == [2, 6, 14]
    slow = [sum(momentum**j for i in range(t) for j in range(i + 1)) for t in (2, 6, 14)]
    np.testing.assert_allclose(applied_steps(given), slow, rtol=1e-12)


def test_fednova_with_equal_steps_is_fedavg(three) -> None:
    given = replace(three, training=replace(three.training, batch_size=100))
    a = FedNova(server_learning_rate=0.7).step(FedNova().init(HEAD, 9), given)
    b = FedAvg(server_learning_rate=0.7).step(FedAvg().init(HEAD, 9), given)
    for name in HEAD:
        np.testing.assert_allclose(a.head[name], b.head[name], rtol=1e-6)


def test_fednova_is_its_equation(three) -> None:
    state = FedNova().step(FedNova().init(HEAD, 9), three)
    p, tau = np.array([10, 25, 70]) / 105, np.array([2, 6, 14])
    for name, start in HEAD.items():
        d = [
            (start - t.astype(float)) / steps
            for t, steps in zip(three.tensors[name], tau, strict=True)
        ]
        exact = start - (p @ tau) * np.tensordot(p, d, 1)
        np.testing.assert_allclose(state.head[name], exact, rtol=1e-6)


def test_fednova_forgets_who_took_more_steps() -> None:
    """Two clients that pull evenly in opposite directions, one with nine times the steps."""
    head = {"weight": np.zeros((1, 2))}
    training = LocalTraining(1, 1, 1.0)
    sent = {"weight": np.array([[[1.0, 0.0]], [[-9.0, 0.0]]])}
    given = w.ClientUpdates(
        1, np.arange(2), sent, np.array([1, 9]), np.ones(2), (), replace(training)
    )
    uniform = {"weighting": "uniform"}
    assert FedNova(**uniform).step(FedNova().init(head, 2), given).head["weight"][0, 0] == 0
    assert FedAvg(**uniform).step(FedAvg().init(head, 2), given).head["weight"][0, 0] == -4


def test_fedexp_is_its_equation_and_keeps_the_last_two(three) -> None:
    strategy = FedExP(epsilon=0.01)
    before = strategy.init(HEAD, 9)
    after = strategy.step(before, three)
    p = np.array([10, 25, 70]) / 105
    each = [
        np.concatenate([(three.tensors[n][k].astype(float) - HEAD[n]).ravel() for n in HEAD])
        for k in range(3)
    ]
    mean = p @ each
    rate = p @ np.square(each).sum(1) / (2 * (mean @ mean + 0.01))
    assert rate > 1.1
    for name, start in HEAD.items():
        delta = np.tensordot(p, three.tensors[name].astype(float) - start, 1)
        np.testing.assert_allclose(after.head[name], start + rate * delta, rtol=1e-5)
        np.testing.assert_allclose(after.result[name], (start + after.head[name]) / 2, rtol=1e-6)
        assert np.array_equal(before.result[name], start)


def test_fedexp_with_identical_updates_is_fedavg(updates) -> None:
    one = np.random.default_rng(3).normal(size=(2, 3))
    given = updates({"weight": [one] * 4, "bias": [[1, 2]] * 4})
    for epsilon in (0.0, 1e-3):
        state = FedExP(epsilon=epsilon).step(FedExP().init(HEAD, 9), given)
        exact = FedAvg().step(FedAvg().init(HEAD, 9), given)
        assert all(state.head[n].tobytes() == exact.head[n].tobytes() for n in HEAD)


def test_fedexp_stays_where_nobody_moves(updates) -> None:
    still = updates({name: np.stack([t, t]) for name, t in HEAD.items()})
    state = FedExP(epsilon=0.0).step(FedExP().init(HEAD, 9), still)
    assert all(np.array_equal(state.head[n], HEAD[n]) for n in HEAD)


def test_qfedavg_with_q_zero_is_uniform_fedavg(three) -> None:
    state = QFedAvg(q=0.0).step(QFedAvg().init(HEAD, 9), three)
    exact = FedAvg(weighting="uniform").step(FedAvg().init(HEAD, 9), three)
    for name in HEAD:
        np.testing.assert_allclose(state.head[name], exact.head[name], rtol=1e-6)


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_qfedavg_is_its_equation(three, q: float) -> None:
    state = QFedAvg(q=q).step(QFedAvg().init(HEAD, 9), three)
    steep = 1 / 0.1
    total, scale = {name: np.zeros(t.shape) for name, t in HEAD.items()}, 0.0
    for k, loss in enumerate([0.5, 2.0, 1.0]):
        way = {n: steep * (HEAD[n] - three.tensors[n][k].astype(float)) for n in HEAD}
        scale += steep * loss**q
        scale += q * loss ** (q - 1) * sum(np.square(t).sum() for t in way.values())
        total = {n: total[n] + loss**q * way[n] for n in HEAD}
    for name, start in HEAD.items():
        np.testing.assert_allclose(state.head[name], start - total[name] / scale, rtol=1e-5)


def test_qfedavg_asks_for_the_loss_before_training(people) -> None:
    plan = RoundPlan(1, np.arange(5), np.zeros(5, np.uint64), DRIFTING)
    assert QFedAvg().plan(w.ServerState(HEAD), plan).reports == ("start_loss",)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0])
def test_qfedavg_takes_a_loss_of_zero_or_none(three, q: float) -> None:
    given = replace(three, loss=np.array([0.0, np.nan, 1.0]), num_examples=np.array([5, 0, 5]))
    state = QFedAvg(q=q).step(QFedAvg().init(HEAD, 9), given)
    assert all(np.isfinite(t).all() for t in state.head.values())


def test_qfedavg_evens_losses_out(people) -> None:
    """The worst client ends better off with q = 5 than without."""
    spread = {
        q: people.losses(last(QFedAvg(q=q), people, ONE_STEP, 400).head["weight"]) for q in (0, 5)
    }
    assert spread[5].max() < 0.9 * spread[0].max()
    assert spread[5].std() < spread[0].std()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_mime_with_one_full_step_is_momentum_at_the_server(people, beta: float) -> None:
    state = last(Mime(momentum=beta), people, ONE_STEP, 20)
    exact = descent(people, ONE_STEP, 20, momentum=beta)
    # What is sent is float32.
    np.testing.assert_allclose(state.head["weight"], exact, atol=1e-15 * 20 if beta == 0 else 1e-6)


def test_mime_without_momentum_is_fedavg_bit_for_bit(population) -> None:
    head = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
    plan = RoundPlan(1, np.arange(5), np.arange(5).astype(np.uint64), LocalTraining(2, 8, 0.1))
    ends = []
    for strategy in (Mime(momentum=0.0), FedAvg()):
        state = strategy.init(head, 5)
        for _ in range(2):
            own = strategy.plan(state, plan)
            given = replace(train_clients(population, state.head, own), training=own.training)
            state = strategy.step(state, given)
        ends.append(state.head)
    assert all(ends[0][n].tobytes() == ends[1][n].tobytes() for n in head)


def test_mime_is_its_algorithm(people) -> None:
    """Steps along (1 - beta) g + beta m with m frozen, written out."""
    beta, head, m = 0.7, people.head["weight"], 0.0
    for _ in range(5):
        heads = np.repeat(head[None], 5, axis=0)
        begun = people.gradients(heads) + 0.05 * head
        for _ in range(DRIFTING.epochs):
            gradient = people.gradients(heads) + 0.05 * heads
            heads = heads - 0.3 * ((1 - beta) * gradient + beta * m)
        m = (1 - beta) * np.tensordot(WEIGHTS, begun, 1) + beta * m
        head = np.tensordot(WEIGHTS, heads, 1)
    state = last(Mime(momentum=beta), people, DRIFTING)
    np.testing.assert_allclose(state.head["weight"], head, atol=1e-6)  # m is sent as float32
    np.testing.assert_allclose(state.slots["momentum.weight"], m, atol=1e-6)
