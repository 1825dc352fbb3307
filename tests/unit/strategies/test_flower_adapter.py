"""Flower's own strategies and a user's, unchanged: the same as in Flower, pure and resumable."""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy

from fedtl.errors import InputError, ScenarioError
from fedtl.plans import RoundPlan
from fedtl.results.commits import Commit, read_commit, write_commit
from fedtl.scenario.load import dump_scenario, load_scenario
from fedtl.strategies import ServerState, make_strategy
from fedtl.strategies.flower_adapter import SLOT, FlowerStrategy
from fedtl.types import ClientFailure, ClientUpdates, LocalTraining

ROBUST = {"num_malicious_nodes": 1}
CASES = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "FedAdagrad": {"eta": 0.1},
    "FedAdam": {"eta": 0.1},
    "FedYogi": {"eta": 0.1},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": ROBUST,
    "MultiKrum": {**ROBUST, "num_nodes_to_select": 3},
    "Bulyan": ROBUST,
    "QFedAvg": {"client_learning_rate": 0.5, "q": 0.2},
}
ROUNDS, CLIENTS = 3, 7
HEAD = {
    name: np.random.default_rng(9).normal(size=shape).astype(np.float32)
    for name, shape in {"weight": (3, 4), "bias": (3,)}.items()
}
TRAINING = LocalTraining(2, 16, 0.1)


def answers(round: int, order: np.ndarray | None = None) -> ClientUpdates:
    """Heads that do not depend on the round's: the same whatever was aggregated before."""
    rng = np.random.default_rng(round)
    tensors = {
        name: (value + rng.normal(0, 0.5, (CLIENTS, *value.shape))).astype(np.float32)
        for name, value in HEAD.items()
    }
    examples = rng.integers(1, 99, CLIENTS)
    loss = rng.uniform(0.1, 2, CLIENTS)
    order = np.arange(CLIENTS) if order is None else order
    tensors = {name: value[order] for name, value in tensors.items()}
    ids = np.arange(CLIENTS, dtype=np.int64)
    return ClientUpdates(round, ids, tensors, examples[order], loss[order], training=TRAINING)


def plan(round: int = 1, clients: int = CLIENTS) -> RoundPlan:
    ids = np.arange(clients, dtype=np.int64)
    return RoundPlan(round, ids, ids.astype(np.uint64), TRAINING)


def ours(own: FlowerStrategy, state: ServerState, round: int) -> ServerState:
    own.plan(state, plan(round))
    return own.step(state, answers(round))


class Loopback(Grid):
    """A grid whose nodes answer with ``answers``, in the order of their ids."""

    run = None

    def __init__(self) -> None:
        self.configs: list[dict] = []

    def set_run(self, run) -> None:
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def get_node_ids(self):
        return range(1, CLIENTS + 1)

    def send_and_receive(self, messages, *, timeout=None):
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        if not messages:
            return []
        self.configs.append(dict(messages[0].content["config"]))
        given = answers(int(self.configs[-1]["server-round"]))
        found = []
        for i, message in enumerate(messages):
            arrays = ArrayRecord({n: Array(np.asarray(given.tensors[n][i])) for n in HEAD})
            metrics = MetricRecord(
                {"num-examples": int(given.num_examples[i]), "train_loss": float(given.loss[i])}
            )
            content = RecordDict({"arrays": arrays, "metrics": metrics})
            found.append(Message(content, reply_to=message))
        return found


def flowers(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The head after ``ROUNDS`` rounds of Flower's own loop."""
    from flwr.supercore.task_identity import TaskIdentity

    for entry in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, entry, 1)
    monkeypatch.setattr(logging.getLogger("flwr"), "disabled", True)
    made = getattr(strategy, name)(**CASES[name], fraction_evaluate=0.0)
    head = ArrayRecord({n: Array(t) for n, t in HEAD.items()})
    found = made.start(Loopback(), head, ROUNDS).arrays
    return {n: found[n].numpy() for n in HEAD}


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_that_of_flowers_own_loop(name: str, monkeypatch) -> None:
    own = FlowerStrategy(name, CASES[name])
    state = own.init(HEAD, CLIENTS)
    for round in range(1, ROUNDS + 1):
        state = ours(own, state, round)
    expected = flowers(name, monkeypatch)
    for n in HEAD:
        assert not np.array_equal(state.head[n], HEAD[n])
        if expected[n].dtype == np.float32:
            assert state.head[n].tobytes() == expected[n].tobytes()
        else:  # Flower goes on in float64, we round the head once a round
            assert name in ("FedAdam", "QFedAvg")
            np.testing.assert_allclose(state.head[n], expected[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_pure_and_the_same_after_a_commit_in_mid_run(name: str, tmp_path: Path) -> None:
    own = FlowerStrategy(name, CASES[name])
    one = ours(own, own.init(HEAD, CLIENTS), 1)
    two = ours(own, one, 2)
    again = ours(own, one, 2)
    tensors = {**{f"head.{n}": t for n, t in one.head.items()}, SLOT: one.slots[SLOT]}
    write_commit(tmp_path, Commit(1, tensors, {}))
    commit, _ = read_commit(tmp_path)
    assert commit is not None
    slots = {SLOT: commit.tensors[SLOT]}
    restored = ServerState({n: commit.tensors[f"head.{n}"] for n in HEAD}, slots)
    fresh = ours(FlowerStrategy(name, CASES[name]), restored, 2)
    for other in (again, fresh):
        assert all(two.head[n].tobytes() == other.head[n].tobytes() for n in HEAD)
        assert two.slots[SLOT].tobytes() == other.slots[SLOT].tobytes()


@pytest.mark.parametrize("name", CASES)
def test_clients_may_change_their_numbers(name: str) -> None:
    own = FlowerStrategy(name, CASES[name])
    state = own.init(HEAD, CLIENTS)
    order = np.random.default_rng(1).permutation(CLIENTS)
    a, b = own.step(state, answers(1)), own.step(state, answers(1, order))
    for n in HEAD:
        np.testing.assert_allclose(a.head[n], b.head[n], rtol=1e-5, atol=1e-6)


def test_all_of_flowers_strategies_are_tried_or_refused() -> None:
    from fedtl.strategies.flower_calls import NEEDS_MORE, USABLE

    assert set(USABLE) == set(CASES)
    for name in NEEDS_MORE:
        with pytest.raises(InputError, match="cannot run here"):
            FlowerStrategy(name)


def test_the_proximal_term_reaches_the_clients() -> None:
    own = FlowerStrategy("FedProx", {"proximal_mu": 0.25})
    planned = own.plan(own.init(HEAD, CLIENTS), plan())
    assert planned.training == replace(TRAINING, proximal=0.25)
    assert planned.clients.tolist() == list(range(CLIENTS))


def test_fair_averaging_weighs_by_the_loss_before_training() -> None:
    own = FlowerStrategy("QFedAvg", CASES["QFedAvg"])
    assert own.plan(own.init(HEAD, CLIENTS), plan()).reports == ("start_loss",)
    own = FlowerStrategy("FedAvg")
    assert own.plan(own.init(HEAD, CLIENTS), plan()).reports == ()


def test_a_fraction_of_the_cohort_is_drawn_from_the_seed() -> None:
    def drawn(seed: int, round: int) -> list[int]:
        own = FlowerStrategy("FedAvg", {"fraction_train": 0.3}, seed)
        return own.plan(own.init(HEAD, 20), plan(round, 20)).clients.tolist()

    assert len(drawn(1, 1)) == 6
    assert drawn(1, 1) == sorted(drawn(1, 1)) == drawn(1, 1)
    assert len({tuple(drawn(seed, round)) for seed in (1, 2) for round in (1, 2)}) == 4


def test_a_cohort_of_one_does_not_wait_for_flowers_default_of_two() -> None:
    own = FlowerStrategy("FedAvg")
    state = own.init(HEAD, 1)
    assert own.plan(state, plan(clients=1)).clients.tolist() == [0]
    small = FlowerStrategy("FedAvg", {"fraction_train": 0.1})
    assert len(small.plan(small.init(HEAD, 7), plan()).clients) == 2


def test_global_generators_and_flowers_log_are_left_as_they_were(capfd) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.Random(5).random(), np.random.RandomState(5).random()
    own = FlowerStrategy("FedProx", {})  # warns when made, tells when asked
    ours(own, own.init(HEAD, CLIENTS), 1)
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    assert not logging.getLogger("flwr").disabled
    assert capfd.readouterr() == ("", "")


USERS = '''
import random
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg, Strategy

class Halving(FedAvg):
    """As in Flower's tutorial; it also remembers whom it asked and draws numbers of its own."""

    def __init__(self, every=2, **kwargs):
        super().__init__(**kwargs)
        self.every, self.history, self.rng = every, [], np.random.default_rng(3)
        self.dice, self.seen, self.best = random.Random(4), {"nodes": set()}, None

    def configure_train(self, server_round, arrays, config, grid):
        if server_round % self.every == 0:
            config["lr"] *= 0.5
        messages = super().configure_train(server_round, arrays, config, grid)
        self.asked = sorted(m.metadata.dst_node_id for m in messages)
        self.seen["nodes"].update(self.asked)
        yield from messages

    def aggregate_train(self, server_round, replies):
        assert [r.metadata.src_node_id for r in replies] == self.asked
        arrays, metrics = super().aggregate_train(server_round, replies)
        noise = self.rng.normal() + self.dice.random() + random.random() + np.random.random()
        self.history.append((server_round, noise, metrics["train_loss"]))
        self.best = arrays.copy()
        noisy = {k: Array(v.numpy() + np.float32(noise)) for k, v in arrays.items()}
        return ArrayRecord(noisy), metrics

class Silent(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None

class Broken(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise KeyError("no such thing")

class Infinite(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({k: Array(v.numpy() / 0) for k, v in arrays.items()}), metrics

class Other(FedAvg):
    def aggregate_train(self, server_round, replies):
        return ArrayRecord({"weight": Array(np.zeros(3))}), None

class Sender(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        other = ArrayRecord({k: Array(v.numpy() + 1) for k, v in arrays.items()})
        return super().configure_train(server_round, other, config, grid)

class Caller(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        return grid.send_and_receive([])

class Uneven(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        from flwr.app import ConfigRecord, RecordDict
        for m in super().configure_train(server_round, arrays, config, grid):
            m.content = RecordDict(
                {"arrays": arrays, "config": ConfigRecord({"lr": 0.1 * m.metadata.dst_node_id})}
            )
            yield m

class Negative(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["local-epochs"] = 0
        return super().configure_train(server_round, arrays, config, grid)

class Keeper(FedAvg):
    def __init__(self):
        super().__init__()
        self.inner = {"best": [object()]}

class Late(FedAvg):
    def aggregate_train(self, server_round, replies):
        self.replies = replies
        return None, None

class Unfinished(Strategy):
    pass

class NoStrategy:
    pass
'''


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's module in the current folder, imported anew."""
    (tmp_path / "users_strategies.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "users_strategies"
    sys.modules.pop("users_strategies", None)
    assert sys.path == path


def test_a_users_strategy_runs_unchanged_and_remembers_all(users: str) -> None:
    given = {"every": 2, "fraction_train": 0.6}
    own = FlowerStrategy(f"{users}:Halving", given, 8)
    states = [own.init(HEAD, CLIENTS)]
    rates, asked = [], []
    for round in (1, 2, 3, 4):
        planned = own.plan(states[-1], plan(round))
        updates = answers(round)
        part = np.isin(updates.clients, planned.clients)
        some = replace(
            updates,
            clients=updates.clients[part],
            tensors={n: t[part] for n, t in updates.tensors.items()},
            num_examples=updates.num_examples[part],
            loss=updates.loss[part],
            training=planned.training,
        )
        states.append(own.step(states[-1], some))
        rates.append(planned.training.learning_rate)
        asked.append(planned.clients.tolist())
    assert rates == [0.1, 0.05, 0.05, 0.025]
    assert [len(one) for one in asked] == [4, 4, 4, 4]
    assert len({tuple(one) for one in asked}) > 1
    # Another process goes on from the second round's commit.
    other = FlowerStrategy(f"{users}.Halving", given, 8)
    state = states[2]
    for round in (3, 4):
        planned = other.plan(state, plan(round))
        assert planned.clients.tolist() == asked[round - 1]
        assert planned.training.learning_rate == rates[round - 1]
        updates = answers(round)
        part = np.isin(updates.clients, planned.clients)
        tensors = {n: t[part] for n, t in updates.tensors.items()}
        some = ClientUpdates(
            round, updates.clients[part], tensors, updates.num_examples[part], updates.loss[part]
        )
        state = other.step(state, some)
    assert all(state.head[n].tobytes() == states[4].head[n].tobytes() for n in HEAD)
    assert state.slots[SLOT].tobytes() == states[4].slots[SLOT].tobytes()


def test_the_scenarios_schedule_holds_until_the_strategy_sets_a_rate(users: str) -> None:
    own = FlowerStrategy(f"{users}:Halving", {"every": 3})
    state = own.init(HEAD, CLIENTS)
    rates = []
    for round, rate in enumerate((0.4, 0.3, 0.2, 0.1), 1):
        given = replace(plan(round), training=replace(TRAINING, learning_rate=rate))
        rates.append(own.plan(state, given).training.learning_rate)
        state = own.step(state, answers(round))
    assert rates == [0.4, 0.3, 0.1, 0.1]


def test_where_the_strategy_gives_nothing_the_head_stays(users: str) -> None:
    own = FlowerStrategy(f"{users}:Silent")
    state = ours(own, own.init(HEAD, CLIENTS), 1)
    assert all(state.head[n].tobytes() == HEAD[n].tobytes() for n in HEAD)


def test_clients_that_failed_are_missing_from_the_replies() -> None:
    own = FlowerStrategy("FedAvg")
    state = own.init(HEAD, CLIENTS)
    own.plan(state, plan())
    full = answers(1)
    keep = np.arange(CLIENTS) != 2
    left = replace(
        full,
        clients=full.clients[keep],
        tensors={n: t[keep] for n, t in full.tensors.items()},
        num_examples=full.num_examples[keep],
        loss=full.loss[keep],
        failures=(ClientFailure(2, "gone"),),
    )
    after = own.step(state, left)
    weights = left.num_examples / left.num_examples.sum()
    for n in HEAD:
        expected = np.tensordot(weights, left.tensors[n].astype(np.float64), 1)
        np.testing.assert_allclose(after.head[n], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Broken", "Broken.aggregate_train failed: KeyError: 'no such thing'"),
        ("Infinite", "not finite in weight"),
        ("Other", "gives another head"),
        ("Sender", "other arrays than the global ones"),
        ("Caller", "grid.send_and_receive"),
        ("Uneven", "different hyper-parameters"),
        ("Negative", "impossible local-epochs"),
        ("Late", r"Late.replies\[0\]: Late remembers something"),
    ],
)
def test_what_a_users_strategy_may_not_do_is_told_by_name(
    users: str, name: str, words: str
) -> None:
    own = FlowerStrategy(f"{users}:{name}")
    with pytest.raises(InputError, match=words) as caught:
        ours(own, own.init(HEAD, CLIENTS), 1)
    assert name in caught.value.line()


@pytest.mark.parametrize(
    ("path", "parameters", "words"),
    [
        ("Krumm", {}, "Did you mean 'Krum'"),
        ("users_strategies:Halfing", {}, "Did you mean 'Halving'"),
        ("users_strategies:NoStrategy", {}, "no strategy for Flower's message API"),
        ("users_strategies:Unfinished", {}, "is abstract: it lacks aggregate_evaluate"),
        ("users_strategies:Keeper", {}, r"Keeper.inner\['best'\]\[0\].*got object"),
        ("nowhere_at_all.Strategy", {}, "No module named 'nowhere_at_all'"),
        ("flwr.server.strategy.FedAvg", {}, "has to be ported"),
        ("Strategy", {}, "unknown strategy of Flower's"),
        ("Krum", {"num_malicious": 1}, "Did you mean 'num_malicious_nodes'"),
        ("QFedAvg", {}, "QFedAvg needs client_learning_rate"),
        ("FedTrimmedAvg", {"beta": 0.6}, r"ValueError: `beta` must be in the range \[0, 0.5\)"),
        ("users_strategies:Halving", {"etta": 1}, "unexpected keyword argument 'etta'"),
    ],
)
def test_a_class_that_cannot_be_is_refused_when_the_strategy_is_made(
    users: str, path: str, parameters: dict, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        FlowerStrategy(path, parameters)


@pytest.mark.parametrize(
    "parameters", [{"min_available_nodes": 9}, {"min_train_nodes": 9}, {"fraction_train": 1.5}]
)
def test_a_strategy_that_would_wait_for_ever_is_refused(parameters: dict, monkeypatch) -> None:
    from flwr.serverapp.strategy import strategy_utils

    monkeypatch.setattr(strategy_utils, "sleep", lambda seconds: None)
    own = FlowerStrategy("FedAvg", parameters)
    with pytest.raises(InputError, match="waits for more clients than"):
        own.plan(own.init(HEAD, CLIENTS), plan())


def test_another_classs_memory_is_refused() -> None:
    state = FlowerStrategy("FedAvg").init(HEAD, CLIENTS)
    with pytest.raises(InputError, match="another strategy of Flower's"):
        FlowerStrategy("Krum").step(state, answers(1))


def test_the_scenarios_key_is_class_wherever_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\n[strategy]\nname = "flower"\nclass = "FedAvg"\n')
    told = ["strategy.name=flower", "strategy.class=Krum"]
    told += ["strategy.parameters.num_malicious_nodes=2"]
    scenario = load_scenario(str(path), told)
    scenario = scenario.model_copy(update={"seed": 4})
    assert make_strategy(scenario, ()) == FlowerStrategy("Krum", {"num_malicious_nodes": 2}, 4)
    assert load_scenario(str(path), told[:1]).strategy.class_ == "FedAvg"  # kept from the file
    path.write_text(dump_scenario(scenario))
    assert 'class = "Krum"' in path.read_text()
    assert load_scenario(str(path)).hash() == scenario.hash()
    assert load_scenario(str(path), ["strategy.class=FedAvg"]).hash() != scenario.hash()
    with pytest.raises(ScenarioError, match="allowed: name, class, parameters"):
        load_scenario(str(path), ["strategy.clas=FedAvg"])
