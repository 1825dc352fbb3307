"""Every strategy goes through one list of checks, in rounds as the loop has them: planned from a
scenario, answered by real clients, looked at by validation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from fedtl.checkpoints import tensors_of
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.engines import LocalEngine
from fedtl.errors import PolicyStop
from fedtl.evaluation.pooled import fit_pooled
from fedtl.interrupts import Interrupts
from fedtl.planning import plan_round
from fedtl.plans import RoundPlan
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.compatibility import CLOSED_FORMS
from fedtl.scenario.load import strategy_names
from fedtl.scenario.schema import Scenario
from fedtl.strategies import STRATEGIES, make_strategy
from fedtl.strategies.base import ServerState, Summing
from fedtl.strategies.validation import accept_updates
from fedtl.types import ClientUpdates, Population, Rows

CLOSED = {"fed3r", "afl", "fedncm", "fedlda", "ccvr", "fedcof", "personal_ridge"}
MLP = {"kind": "mlp", "hidden": [4]}

CASES: dict[str, dict[str, Any]] = {
    **{name: {"strategy": {"name": name}} for name in STRATEGIES if name != "flower"},
    "trimmed_mean": {"strategy": {"name": "trimmed_mean", "trim": 0.2}},
    "fltrust": {"strategy": {"name": "fltrust", "root": "client-3"}},
    "fed3r, random features": {"strategy": {"name": "fed3r", "random_features": 6, "scale": 0.3}},
    "fedlda, client prior": {"strategy": {"name": "fedlda", "client_prior": True}},
    **{
        f"{name}, warm start": {"strategy": {"name": name}, "head": {"initial": "fed3r"}}
        for name in ("fedavg", "scaffold")
    },
    "fedavg, class means, warm start": {
        "strategy": {"name": "fedavg"}, "head": {"initial": "class_means"},
    },
    "flower FedAvg": {"strategy": {"name": "flower", "class": "FedAvg"}},
    "flower FedAdam": {"strategy": {"name": "flower", "class": "FedAdam"}},
    "flower Krum": {
        "strategy": {
            "name": "flower", "class": "Krum", "parameters": {"num_malicious_nodes": 1},
        }
    },
    **{
        f"{name}, mlp": {"strategy": {"name": name}, "head": MLP}
        for name in ("scaffold", "lbfgs", "fedper", "lgfedavg", "fedrep", "fedbabu", "ditto")
    },
}  # fmt: skip

NOTHING_SHARED = {"fedper", "fedrep", "fedbabu"}
"""With a linear head."""

SIZES = (30, 7, 55, 12, 20, 9, 16)
"""Examples of the clients: enough clients for Bulyan with a liar."""


def people(sizes: tuple[int, ...] = SIZES, order: list[int] | None = None) -> Population:
    """Ragged clients with three classes; ``order`` says whose data each client has."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, sum(sizes)).astype(np.int32)
    features = rng.normal(size=(sum(sizes), 9)).astype(np.float32)
    features[np.arange(len(labels)), labels] += 2
    parts = np.split(np.arange(len(labels)), np.cumsum(sizes)[:-1])
    return dealt(features, labels, [parts[k] for k in order or range(len(sizes))])


def dealt(features: np.ndarray, labels: np.ndarray, rows: list[np.ndarray]) -> Population:
    """A population of clients with these rows, who are judged on them too."""
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    own = Rows(np.concatenate(rows).astype(np.int64), ends)
    names = tuple(f"client-{i}" for i in range(len(rows)))
    return Population(features, labels, ("a", "b", "c"), own, own, names, ("",) * len(rows))


def scenario_of(case: str, **changes: Any) -> Scenario:
    training = {"local_epochs": 2, "batch_size": 8, "weight_decay": 0.01, "learning_rate": 0.1}
    content = {"name": "x", "rounds": 4, "seed": 1, "training": training, **CASES[case], **changes}
    return Scenario.model_validate(content)


def head_of(scenario: Scenario) -> dict[str, np.ndarray]:
    """A random head of the scenario's form."""
    rng, width = np.random.default_rng(2), 4 if scenario.head.kind == "mlp" else 9
    shapes = {"weight": (3, width), "bias": (3,)}
    if scenario.head.kind == "mlp":
        shapes = {"hidden.0.weight": (4, 9), "hidden.0.bias": (4,), **shapes}
    return {n: rng.normal(size=s, scale=0.3).astype(np.float32) for n, s in shapes.items()}


@dataclass
class World:
    """A scenario's rounds, one step at a time.

    Attributes:
        place: where its clients keep what is theirs.
        source: whose batch order each client has, by id; default its own.
    """

    scenario: Scenario
    population: Population
    place: Path
    source: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.strategy = make_strategy(self.scenario, self.population.names)

    def start(self) -> ServerState:
        return self.strategy.init(head_of(self.scenario), self.population.num_clients)

    def plan(self, state: ServerState, round: int) -> RoundPlan:
        clients = self.population.num_clients
        plan = plan_round(self.scenario, clients, self.strategy, state, round)
        if self.source is None:
            return plan
        everybody = plan_round(self.scenario, int(self.source.max()) + 1, Nothing(), state, round)
        assert len(everybody.clients) == self.source.max() + 1, "cohorts are not turned around"
        return replace(plan, batch_keys=everybody.batch_keys[self.source[plan.clients]])

    def replies(
        self, state: ServerState, plan: RoundPlan, blocks: list[list[int]] | None = None
    ) -> ClientUpdates:
        """What validation accepts; ``blocks`` of places in the plan say who answers with whom."""
        store = PersonalStore(self.place)
        answers = [
            do_task(self.population, state.head, plan.part(np.array(block)), store=store)
            for block in blocks or [list(range(len(plan.clients)))]
        ]
        declared = self.population.train.counts
        accepted, _ = accept_updates(answers, plan, state.head, declared, 1e4)
        assert len(accepted.clients) == len(plan.clients), accepted.failures
        return accepted

    def round(self, state: ServerState, round: int) -> ServerState:
        plan = self.plan(state, round)
        if not len(plan.clients):  # all of the cohort have reported
            return state
        return self.strategy.step(state, self.replies(state, plan))

    def rounds(self, num: int) -> list[ServerState]:
        """The state before the first round and after each one, to the end at the latest."""
        states = [self.start()]
        while len(states) <= num and not self.strategy.finished(states[-1]):
            states.append(self.round(states[-1], len(states)))
        return states


class Nothing:
    """A strategy that changes nothing of a plan."""

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        return plan


def bits(state: ServerState) -> dict[str, tuple[Any, ...]]:
    return {n: (t.shape, str(t.dtype), t.tobytes()) for n, t in tensors_of(state).items()}


def values(updates: ClientUpdates) -> list[bytes]:
    more = (updates.clients, updates.num_examples, updates.loss)
    return [array.tobytes() for array in (*updates.tensors.values(), *more)]


def partly(case: str, **changes: Any) -> Scenario:
    """With clients that report in more than one round, where one round were all there is."""
    if case.split(",")[0] in CLOSED:
        changes = {"clients": {"fraction": 0.5}, **changes}
    return scenario_of(case, **changes)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_plan_and_step_are_pure(case: str, tmp_path: Path) -> None:
    world = World(partly(case), people(), tmp_path)
    for round, state in enumerate(world.rounds(2)[:2], 1):
        before = bits(state)
        plan, again = world.plan(state, round), world.plan(state, round)
        assert plan.clients.tolist() == again.clients.tolist()
        assert plan.training == again.training
        for name, tensor in plan.corrections.items():
            assert tensor.tobytes() == again.corrections[name].tobytes()
        updates = world.replies(state, plan)
        sent = values(updates)
        first, second = (bits(world.strategy.step(state, updates)) for _ in range(2))
        assert first == second
        assert (first == before) == (case in NOTHING_SHARED)
        assert bits(state) == before
        assert values(updates) == sent


def test_shapes_and_types_are_those_of_the_start(case: str, tmp_path: Path) -> None:
    states = World(partly(case), people(), tmp_path).rounds(3)
    given = {n: t.shape for n, t in head_of(scenario_of(case)).items()}
    fourier = {"weight": (3, 6), "fourier.weight": (6, 9), "fourier.bias": (6,)}
    given |= fourier if case == "fed3r, random features" else {}
    for state in states:
        assert {n: t.shape for n, t in state.head.items()} == given
        assert all(tensor.dtype == np.float32 for tensor in state.head.values())
        assert {n: (t.shape, t.dtype) for n, t in state.result.items()} == {
            n: (shape, np.dtype(np.float32)) for n, shape in given.items()
        }
        for name, tensor in state.slots.items():
            first = states[0].slots[name]
            assert tensor.dtype == first.dtype
            assert tensor.dtype in (np.float64, np.float32, np.int64, np.uint8)
            assert tensor.dtype == np.uint8 or tensor.shape == first.shape
        assert set(state.slots) == set(states[0].slots)


def test_order_and_spread_of_replies_change_no_bit(case: str, tmp_path: Path) -> None:
    world = World(scenario_of(case), people(), tmp_path)
    states = world.rounds(2)
    for round, (state, wanted) in enumerate(pairwise(states), 1):
        plan = world.plan(state, round)
        places = list(range(len(plan.clients)))
        for blocks in ([[k] for k in reversed(places)], [places[4:], places[1:4], places[:1]]):
            updates = world.replies(state, plan, blocks)
            assert bits(world.strategy.step(state, updates)) == bits(wanted)
            if plan.task == "statistics" and isinstance(world.strategy, Summing):
                apart = state  # one client's statistics at a time, as the loop has it
                for k in places:
                    apart = world.strategy.absorb(apart, world.replies(state, plan.part([k])))
                assert bits(world.strategy.solve(apart)) == bits(wanted)


PERMUTED = [3, 6, 0, 5, 1, 4, 2]
"""Whose data each client has."""

LOOSE = {"ccvr": 1e-4, "lbfgs": 1e-5, "lbfgs, mlp": 1e-5}
"""Relative to the head's largest entry, two rounds. Else 2e-6: a sum in another order differs in
float64, so a head in its last float32 bit (6e-8), and training from it in some more; Flower adds in
float32. CCVR ends a search at a gradient of 1e-7; L-BFGS divides by differences of gradients."""


def test_who_has_which_data_does_not_matter(case: str, tmp_path: Path) -> None:
    # Each client's batch order goes with its data, fltrust's root too.
    first, second, sizes, order = {}, {}, SIZES, PERMUTED
    if case == "fltrust":
        second = {"strategy": {"name": "fltrust", "root": f"client-{PERMUTED.index(3)}"}}
    if case == "bulyan":  # against one liar its last choice is between two that are as near to each
        # other: the lower id is taken
        first = second = {"strategy": {"name": "bulyan", "malicious": 3}}
        sizes, order = (*SIZES, *SIZES, 11), [*(k + 7 for k in PERMUTED), 14, *PERMUTED]
    one = World(scenario_of(case, **first), people(sizes), tmp_path / "one").rounds(2)[-1]
    permuted, scenario = people(sizes, order), scenario_of(case, **second)
    other = World(scenario, permuted, tmp_path / "other", np.array(order)).rounds(2)[-1]
    close(one.result, other.result, LOOSE.get(case, 2e-6))


def close(a: Any, b: Any, tolerance: float) -> None:
    assert set(a) == set(b)
    for name in a:
        largest = max(1e-3, float(np.abs(a[name][np.abs(a[name]) < 1e5]).max(initial=0)))
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance * largest)


RANKED = {"krum", "multikrum", "bulyan", "flower Krum"}
"""Choose among clients; of clients that are one and the same the choice is FedAvg's mean."""

LIKE_ONE: dict[str, dict[str, Any] | str] = {
    **{case: {"strategy": {"name": "fedavg"}} for case in RANKED},
    "fltrust": {"strategy": {"name": "fedavg"}},  # the trusted client's own update is not averaged
    # ridge is on sums: of seven times the rows it is a seventh of the share
    "fed3r": {"strategy": {"name": "fed3r", "ridge": 0.01 / 7}},
    "fed3r, random features": {
        "strategy": {**CASES["fed3r, random features"]["strategy"], "ridge": 0.01 / 7}
    },
    "personal_ridge": {"strategy": {"name": "personal_ridge", "ridge": 0.01 / 7}},
    "fedavg, warm start": "its ridge is fed3r's, and no key of a scenario's",
    "scaffold, warm start": "its ridge is fed3r's, and no key of a scenario's",
    "fedlda": "its covariance is divided by the rows less the classes",
    "fedlda, client prior": "its covariance is divided by the rows less the classes",
    "ccvr": "its covariances are divided by the rows less one",
    "fedcof": "it measures how far clients differ, and here they do not",
}
"""What one client of the kind is compared under, or why it is another."""


def test_identical_clients_are_one_of_them(case: str, tmp_path: Path) -> None:
    changes = LIKE_ONE.get(case, {})
    differs = isinstance(changes, str)
    changes = {} if isinstance(changes, str) else changes
    alike = people()
    rows = alike.train.of(4)
    many = dealt(alike.features, alike.labels, [rows] * 7)
    one = dealt(alike.features, alike.labels, [rows])
    a = World(scenario_of(case), many, tmp_path / "many", np.zeros(7, np.int64)).rounds(2)[-1]
    b = World(scenario_of(case, **changes), one, tmp_path / "one").rounds(2)[-1]
    with pytest.raises(AssertionError, match="tolerance") if differs else nullcontext():
        close(a.result, b.result, LOOSE.get(case, 2e-6))


OWN_SGD: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.0},
    "fedavgm": {"momentum": 0.0},
    "scaffold": {},
    "scaffold, mlp": {},
    "fednova": {},
    "mime": {"momentum": 0.0},
    "qfedavg": {"q": 0.0},
    "median": {},
    "trimmed_mean": {},
    "geometric_median": {},
    "norm_clip": {},
    "finetune": {},
    "lgfedavg": {},
    "ditto": {},
    "ditto, mlp": {},
    "apfl": {},
    "knnper": {},
    "fedper, mlp": {},
    "flower FedAvg": {},
}
"""With whom one client's round is its own SGD. Not with an adaptive server (its step is not the
mean), FedDyn (whose step is twice the client's at first), FedExP (judged is the mean of two heads),
pFedMe and FedRep (whose clients do something else)."""


@pytest.mark.parametrize("case", OWN_SGD)
def test_one_client_is_its_own_sgd(case: str, tmp_path: Path) -> None:
    changes = {**CASES[case], "strategy": {**CASES[case]["strategy"], **OWN_SGD[case]}}
    alone = people((40,))
    world = World(scenario_of(case, **changes), alone, tmp_path)
    states, heads = world.rounds(3), None
    for round in range(1, 4):
        plan = plan_round(world.scenario, 1, Nothing(), states[0], round)
        heads = train_clients(alone, states[0].head, plan, initial=heads).tensors
    kept = ("weight", "bias") if case == "fedper, mlp" else ()  # at the client
    mine = {n: t[0] for n, t in heads.items() if n not in kept}
    theirs = {n: t for n, t in states[-1].result.items() if n not in kept}
    if case == "qfedavg":  # divides by the sum of 1 / rate
        close(mine, theirs, 2e-6)
    else:
        assert {n: t.tobytes() for n, t in mine.items()} == {
            n: t.tobytes() for n, t in theirs.items()
        }


@pytest.mark.parametrize("case", sorted(NOTHING_SHARED))
def test_with_a_linear_head_these_share_nothing(case: str, tmp_path: Path) -> None:
    world = World(scenario_of(case), people(), tmp_path)
    plan = world.plan(world.start(), 1)
    assert plan.reply(world.start().head) == {}
    states = world.rounds(2)
    assert bits(states[0]) == bits(states[-1])


@pytest.mark.parametrize("case", ["krum", "multikrum", "bulyan"])
def test_too_few_clients_for_a_rule_stop_it(case: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyStop, match=f"{case} needs [57] updates"):
        World(scenario_of(case), people((40,)), tmp_path).rounds(1)


SPLIT = [case for case in CASES if case.split(",")[0] in CLOSED - {"fedcof"}]
"""All closed forms but FedCOF, which learns from how clients differ."""


@pytest.mark.parametrize("case", SPLIT)
def test_closed_forms_are_those_of_the_pooled_rows(case: str, tmp_path: Path) -> None:
    many = people()
    pooled = dealt(many.features, many.labels, [many.train.index])
    # Seven clients in whatever rounds they come.
    states = World(partly(case, rounds=40), many, tmp_path / "many").rounds(40)
    one = World(scenario_of(case), pooled, tmp_path / "one").rounds(1)
    assert states[-1].slots["reported"].tolist() == [1] * 7
    close(states[-1].head, one[-1].head, LOOSE.get(case, 2e-7))


def test_ridge_and_least_squares_are_the_textbooks(tmp_path: Path) -> None:
    everybody = people()
    x = everybody.features.astype(np.float64)
    y = np.eye(3)[everybody.labels]
    z = np.c_[x, np.ones(len(x))]
    plain = {"strategy": {"name": "fed3r", "normalise": False, "temperature": 1.0}}
    ridge = World(scenario_of("fed3r", **plain), everybody, tmp_path).rounds(1)[-1].head
    wanted = np.linalg.lstsq(
        np.r_[z, np.sqrt(0.01) * np.eye(10)], np.r_[y, np.zeros((10, 3))], rcond=None
    )[0]
    np.testing.assert_allclose(np.c_[ridge["weight"], ridge["bias"]], wanted.T, atol=1e-7)
    squares = World(scenario_of("afl"), everybody, tmp_path).rounds(1)[-1].head
    np.testing.assert_allclose(squares["weight"], np.linalg.lstsq(x, y, rcond=None)[0].T, atol=1e-7)
    means = World(scenario_of("fedncm"), everybody, tmp_path).rounds(1)[-1].head["weight"]
    for c in range(3):
        mean = x[everybody.labels == c].mean(axis=0)
        np.testing.assert_allclose(means[c], mean / np.linalg.norm(mean) / 0.1, rtol=1e-6)


@pytest.mark.parametrize("sizes", [SIZES, (149,)])
def test_lbfgs_ends_at_the_pooled_optimum(sizes: tuple[int, ...], tmp_path: Path) -> None:
    world = World(scenario_of("lbfgs"), people(sizes), tmp_path)
    states = world.rounds(80)
    assert world.strategy.finished(states[-1])
    found, rows = states[-1].result, world.population.train.index
    pooled = World(world.scenario, people((sum(SIZES),)), tmp_path)
    plan = pooled.plan(pooled.start(), 1)
    slope = do_task(pooled.population, found, plan).tensors
    for name, tensor in found.items():
        assert np.abs(slope[name][0] + 0.01 * tensor).max() <= 1.1e-6  # added in another order
    # As the curvature is at least the decay, two points are no farther apart than their slopes.
    optimum = fit_pooled(world.population, found, rows, 0.01)
    assert optimum.converged
    apart = sum(np.square(optimum.head[n] - found[n]).sum() for n in found)
    assert np.sqrt(apart) <= (1e-6 + optimum.gradient) * np.sqrt(30) / 0.01


UNIFORM = {
    "krum", "bulyan", "median", "trimmed_mean", "fltrust", "qfedavg", "flower Krum",
    *NOTHING_SHARED,
}  # fmt: skip
"""Whose step does not ask how many examples a client has (three have nothing to step with)."""

TRAINED = [case for case in CASES if case.split(",")[0] not in CLOSED]


@pytest.mark.parametrize("case", TRAINED)
def test_only_the_proportions_of_examples_count(case: str, tmp_path: Path) -> None:
    world = World(scenario_of(case), people(), tmp_path)
    if case.endswith("warm start"):
        states = world.rounds(1)
        state, round = states[-1], 2
    else:
        state, round = world.start(), 1
    updates = world.replies(state, world.plan(state, round))
    assert updates.training is not None
    # Ten times the examples in batches ten times as large: as many steps.
    training = replace(updates.training, batch_size=10 * updates.training.batch_size)
    more = replace(updates, num_examples=10 * updates.num_examples, training=training)
    turned = replace(updates, num_examples=updates.num_examples[::-1].copy())
    one, ten, other = (world.strategy.step(state, u) for u in (updates, more, turned))
    close(one.result, ten.result, 2e-7 if "flower" not in case else 2e-6)
    if case == "lbfgs" or case == "lbfgs, mlp":  # the first round only measures, and aims
        assert one.head["weight"].tobytes() != other.head["weight"].tobytes()
    else:
        same = all(one.result[n].tobytes() == other.result[n].tobytes() for n in one.result)
        assert same == (case in UNIFORM)


STILL = [case for case in TRAINED if not case.startswith("lbfgs")]
"""Whose clients send heads."""


@pytest.mark.parametrize("case", STILL)
def test_clients_that_do_not_move_leave_the_head_where_it_is(case: str, tmp_path: Path) -> None:
    world = World(scenario_of(case), people(), tmp_path)
    round = 2 if case.endswith("warm start") else 1
    state = world.rounds(round - 1)[-1]
    updates = world.replies(state, world.plan(state, round))
    stay = {n: np.stack([state.head[n]] * 7) for n in updates.tensors if n in state.head}
    after = world.strategy.step(state, replace(updates, tensors={**updates.tensors, **stay}))
    if case.startswith("flower"):  # adds in float32, and FedAdam has ten times of what is left
        close(after.head, state.head, 2e-6)
    else:
        assert {n: t.tobytes() for n, t in after.head.items()} == {
            n: t.tobytes() for n, t in state.head.items()
        }


def test_a_state_saved_in_mid_run_goes_on_as_if_it_were_not(case: str, tmp_path: Path) -> None:
    rounds = 3
    world = World(partly(case), people(), tmp_path)
    states = world.rounds(rounds)
    for saved in range(len(states) - 1):
        tensors = load(save(tensors_of(states[saved])))
        fresh = World(world.scenario, world.population, tmp_path)
        initial = fresh.start()
        head = {name: tensors[f"head.{name}"] for name in initial.head}
        slots = {name: tensors[f"slots.{name}"] for name in initial.slots}
        after = fresh.round(ServerState(head, slots), saved + 1)
        assert bits(after) == bits(states[saved + 1])


@pytest.mark.parametrize("away", [1, 2])
def test_a_round_that_nobody_answers_changes_nothing(case: str, away: int, tmp_path: Path) -> None:
    population = people()
    absent = [{"round": away, "clients": list(population.names)}]
    scenario = partly(case, participation={"absent": absent}, rounds=3)
    federation = Federation(
        scenario,
        population.roster(),
        head_of(scenario),
        make_strategy(scenario, population.names),
        LocalEngine(population, 1, store=PersonalStore(tmp_path / "own")),
        {},
    )
    folder = RunFolder.create(tmp_path / "run", "")
    rows: list[Any] = []
    states: list[dict[str, bytes]] = []

    def observe(row: Any, updates: ClientUpdates) -> None:
        rows.append((row["accepted"], row["abandoned"]))
        states.append(commit())

    def commit() -> dict[str, bytes]:
        newest = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
        return {name: tensor.tobytes() for name, tensor in load_file(newest).items()}

    try:
        _, progress = run_rounds(federation, folder, observe, Interrupts())
    finally:
        folder.release()
    initial = federation.strategy.init(federation.head, 7)
    before = {n: t.tobytes() for n, t in tensors_of(initial).items()}
    states.insert(0, before)
    assert progress.round == 3
    assert states[away] == states[away - 1]
    assert rows[away - 1][0] == 0
    assert rows[away - 1][1] == (away == 1 or case.split(",")[0] not in CLOSED)  # see rounds.py
    assert rows[away][0] > 0
    assert not rows[away][1]
    assert (states[away + 1] == states[away]) == (case in NOTHING_SHARED)


REQUIRED = {"fltrust": {"root": 0}, "flower": {"class_": "FedAvg"}}
"""What must be said besides the name."""


def test_every_name_a_scenario_knows_can_be_built_and_is_tested() -> None:
    assert set(strategy_names()) == set(STRATEGIES)
    assert {changes["strategy"]["name"] for changes in CASES.values()} == set(STRATEGIES)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_defaults_of_schema_and_class_agree(name: str) -> None:
    written = {"fltrust": {"root": "a"}, "flower": {"class": "FedAvg"}}.get(name, {})
    scenario = Scenario.model_validate({"name": "x", "strategy": {"name": name, **written}})
    assert make_strategy(scenario, ("a",)) == STRATEGIES[name](**REQUIRED.get(name, {}))


def test_the_closed_forms_are_those_that_sum_statistics() -> None:
    assert set(CLOSED_FORMS) == {n for n, build in STRATEGIES.items() if hasattr(build, "absorb")}
