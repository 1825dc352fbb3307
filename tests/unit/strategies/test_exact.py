"""L-BFGS over rounds: its pieces against dense algebra, its end against the pooled optimum."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load, save
from scipy.optimize import minimize

from fedtl.clients.tasks import do_task
from fedtl.evaluation.pooled import fit_pooled
from fedtl.plans import RoundPlan
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState
from fedtl.strategies.exact import Lbfgs, _lowest, _Search, _two_loop
from fedtl.types import LocalTraining, Rows

CLIENTS = Path(__file__).parents[1] / "clients"
oracle = SimpleNamespace(**run_path(str(CLIENTS / "oracle.py")))
DECAY = 1e-2


def zeros(people):
    num_classes, width = len(people.classes), people.features.shape[1]
    return {
        "weight": np.zeros((num_classes, width), np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }


def ask(strategy, people, state, clients=None, decay=DECAY):
    """One round's answers."""
    clients = np.arange(people.num_clients) if clients is None else np.array(clients)
    training = LocalTraining(1, 8, 0.1, weight_decay=decay)
    plan = strategy.plan(state, RoundPlan(1, clients, np.zeros(len(clients), np.uint64), training))
    assert plan.task == "gradient"
    return replace(do_task(people, state.head, plan), training=training)


def solve(strategy, people, head, rounds=200, decay=DECAY):
    """All the states, up to the one it ends at."""
    states = [strategy.init(head, people.num_clients)]
    while not strategy.finished(states[-1]) and len(states) <= rounds:
        states.append(strategy.step(states[-1], ask(strategy, people, states[-1], decay=decay)))
    return states


def objective(people, head, decay=DECAY):
    """Mean cross-entropy over everybody's rows plus the decay, and its gradient, in float64."""
    rows = people.train.index
    x, y = people.features[rows].astype(float), people.labels[rows]
    scores = x @ head["weight"].astype(float).T + head["bias"]
    scores -= scores.max(1, keepdims=True)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    loss += decay / 2 * sum(float(np.square(t.astype(float)).sum()) for t in head.values())
    p[np.arange(len(y)), y] -= 1
    gradient = {"weight": p.T @ x / len(y), "bias": p.mean(0)}
    return loss, {n: gradient[n] + decay * head[n].astype(float) for n in head}


def optimum(people, decay=DECAY):
    """The same by another program."""
    shapes = {name: tensor.shape for name, tensor in zeros(people).items()}

    def evaluate(vector):
        weight, bias = np.split(vector, [np.prod(shapes["weight"])])
        head = {"weight": weight.reshape(shapes["weight"]), "bias": bias}
        loss, gradient = objective(people, head, decay)
        return loss, np.concatenate([gradient["weight"].ravel(), gradient["bias"]])

    size = sum(int(np.prod(shape)) for shape in shapes.values())
    options = {"gtol": 1e-10, "ftol": 0.0, "maxiter": 2000, "maxfun": 4000}
    return minimize(evaluate, np.zeros(size), jac=True, method="L-BFGS-B", options=options)


def flat(head):
    return np.concatenate([head["weight"].ravel(), head["bias"]]).astype(float)


def test_it_ends_at_the_pooled_optimum(population) -> None:
    strategy = Lbfgs(tolerance=1e-7)
    states = solve(strategy, population, zeros(population))
    best = optimum(population)
    assert strategy.finished(states[-1])
    np.testing.assert_allclose(flat(states[-1].result), best.x, rtol=0, atol=1e-5)
    value, gradient = objective(population, states[-1].result)
    assert abs(value - best.fun) <= 1e-11
    assert max(np.abs(tensor).max() for tensor in gradient.values()) <= 1.01e-7
    assert all(np.array_equal(states[-1].head[n], states[-1].result[n]) for n in states[-1].head)
    assert len(states) - 1 <= best.nfev  # no more evaluations than SciPy's


def test_it_is_the_objective_of_the_pooled_reference(population) -> None:
    fit = fit_pooled(population, zeros(population), population.train.index, DECAY)
    value, _ = objective(population, solve(Lbfgs(), population, zeros(population))[-1].result)
    assert fit.converged
    assert value <= fit.loss + 1e-7
    assert value >= fit.loss - 1e-5  # and no other one's


def test_the_best_head_never_gets_worse(population) -> None:
    values = [
        objective(population, s.result)[0] for s in solve(Lbfgs(), population, zeros(population))
    ]
    assert all(after <= before * (1 + 1e-13) for before, after in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_it_does_not_depend_on_the_split(population) -> None:
    ends = []
    for num, seed in ((1, 0), (3, 1), (40, 2)):
        random = np.random.default_rng(seed)
        index = random.permutation(population.train.index)
        cuts = np.sort(random.choice(np.arange(1, len(index)), num - 1, replace=False))
        rows = Rows(index, np.array([0, *cuts, len(index)]))
        split = replace(population, train=rows, test=rows, names=tuple(map(str, range(num))))
        ends.append(flat(solve(Lbfgs(), split, zeros(split))[-1].result))
    for other in ends[1:]:
        np.testing.assert_allclose(other, ends[0], rtol=0, atol=2e-6)


def test_one_round_is_pure_and_survives_a_commit(population) -> None:
    strategy = Lbfgs(history=3)
    states = solve(strategy, population, zeros(population))
    assert len(states) > 8  # more than the history
    for before, after in pairwise(states):
        assert {n: (s.shape, s.dtype) for n, s in before.slots.items()} == {
            n: (s.shape, s.dtype) for n, s in after.slots.items()
        }
        restored = ServerState(load(save(dict(before.head))), load(save(dict(before.slots))))
        again = strategy.step(restored, ask(strategy, population, restored))
        for name, slot in after.slots.items():
            assert again.slots[name].tobytes() == slot.tobytes()
        for name, tensor in after.head.items():
            assert again.head[name].tobytes() == tensor.tobytes()


def test_a_round_without_a_known_client_teaches_nothing(population) -> None:
    strategy = Lbfgs()
    states = solve(strategy, population, zeros(population), rounds=4)
    missing = ask(strategy, population, states[-1], [0, 1, 2, 4])
    assert strategy.step(states[-1], missing) is states[-1]


def test_a_client_that_comes_later_begins_the_search_anew(population) -> None:
    strategy = Lbfgs()
    state = strategy.init(zeros(population), population.num_clients)
    for _ in range(5):
        state = strategy.step(state, ask(strategy, population, state, [0, 2, 4]))
    for _ in range(60):
        state = strategy.step(state, ask(strategy, population, state))
        if strategy.finished(state):
            break
    np.testing.assert_allclose(flat(state.result), optimum(population).x, rtol=0, atol=1e-4)


def test_a_client_without_rows_counts_for_nothing() -> None:
    people = oracle.federation([30, 0, 20], 5, 3)
    there = oracle.federation([30, 20], 5, 3)
    assert np.array_equal(people.train.index, there.train.index)
    a, b = (solve(Lbfgs(), p, zeros(p))[-1].result for p in (people, there))
    assert flat(a).tobytes() == flat(b).tobytes()


def test_beyond_what_float32_can_say_it_ends(population) -> None:
    strategy = Lbfgs(tolerance=1e-15)
    states = solve(strategy, population, zeros(population))
    assert strategy.finished(states[-1])
    np.testing.assert_allclose(flat(states[-1].result), optimum(population).x, rtol=0, atol=1e-5)
    state = strategy.step(states[-1], ask(strategy, population, states[-1]))
    assert strategy.finished(state)
    assert flat(state.head).tobytes() == flat(states[-1].head).tobytes()


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_the_size_of_the_features_does_not_stop_it(population, size: float) -> None:
    people = replace(population, features=(population.features * size).astype(np.float32))
    states = solve(Lbfgs(), people, zeros(people), decay=0.0, rounds=60)
    values = [objective(people, state.result, 0.0)[0] for state in states]
    plain = solve(Lbfgs(), population, zeros(population), decay=0.0, rounds=60)
    assert values[-1] <= objective(population, plain[-1].result, 0.0)[0] + 0.05


def test_separable_examples_without_decay_stay_finite() -> None:
    people = oracle.federation([6, 6], 19, 3)  # more features than rows
    states = solve(Lbfgs(), people, zeros(people), decay=0.0)
    assert np.isfinite(flat(states[-1].result)).all()
    assert objective(people, states[-1].result, 0.0)[0] < 1e-4


def test_an_mlp_comes_to_a_local_optimum() -> None:
    people = oracle.federation([40, 25], 6, 3)
    head = oracle.mlp_head(6, [5], 3)
    states = solve(Lbfgs(), people, head, rounds=100)
    fit = fit_pooled(people, head, people.train.index, DECAY)
    values = [state.slots["reals"][0] for state in states[1:]]
    assert all(after <= before * (1 + 1e-13) for before, after in pairwise(values))
    assert values[-1] <= 1.02 * fit.loss
    assert fit.loss < 0.7 * values[0]


@pytest.mark.parametrize("pairs", [0, 1, 4, 6])
def test_the_two_loops_are_the_dense_update(pairs: int) -> None:
    random = np.random.default_rng(pairs)
    half = random.standard_normal((7, 7))
    hessian = half @ half.T + np.eye(7)
    moves = random.standard_normal((6, 7))
    bends, gradient = moves @ hessian, random.standard_normal(7)
    inverse = np.eye(7)
    for i in range(6 - pairs, 6):  # BFGS, Nocedal and Wright 6.17
        if i == 6 - pairs:
            inverse *= (moves[-1] @ bends[-1]) / (bends[-1] @ bends[-1])
        rho = 1 / (moves[i] @ bends[i])
        left = np.eye(7) - rho * np.outer(moves[i], bends[i])
        inverse = left @ inverse @ left.T + rho * np.outer(moves[i], moves[i])
    search = _Search(np.zeros(7), gradient, gradient, moves, bends, pairs=pairs)
    np.testing.assert_allclose(_two_loop(search), inverse @ gradient, rtol=1e-10)


def test_the_cubics_lowest_place() -> None:
    for place in (0.2, 0.5, 0.9):  # (t - place)^2 (t + 1)
        value = np.poly1d([1, -place]) ** 2 * np.poly1d([1, 1])
        slope = value.deriv()
        found = _lowest(value(1) - value(0), slope(0), slope(1))
        np.testing.assert_allclose(found, place, rtol=1e-12)
    assert _lowest(2.0, -1.0, np.inf) == 0


def test_a_sample_of_clients_is_refused_before_anything_runs() -> None:
    found = {}
    for fraction in (0.5, 1.0):
        content = {"strategy": {"name": "lbfgs"}, "clients": {"fraction": fraction}}
        found[fraction] = find_conflicts(Scenario.model_validate({"name": "x", **content}))
    assert [problem.where for problem in found[0.5]] == ["clients.fraction"]
    assert found[1.0] == []
