"""The engine over nodes, without Flower: who is asked, who is missing and why, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl import seeding
from fedtl.clients.evaluation import evaluate_own
from fedtl.clients.personal import personal_heads
from fedtl.clients.training import train_clients
from fedtl.engines import LocalEngine
from fedtl.engines.exchange import Answer, LocalExchange
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.engines.node import Node, NotPrepared
from fedtl.engines.wire import pack, unpack
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import RING, Personal, Protection, RoundPlan
from fedtl.strategies.validation import accept_updates
from fedtl.types import LocalTraining, Population

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
SEATS = {10: np.array([0, 3]), 11: np.array([1, 4]), 12: np.array([2])}


@dataclass
class Everybody:
    """A host of some clients of a population."""

    whole: Population
    own: np.ndarray
    lost: bool = False

    def population(self) -> Population:
        if self.lost:
            raise NotPrepared("this client was restarted")
        return self.whole

    def consent(self, plan) -> None:
        pass

    def protected(self, plan) -> None:
        pass

    def store(self) -> None:
        return None

    def ids(self, clients: np.ndarray) -> np.ndarray:
        assert np.isin(clients, self.own).all()
        return clients


@dataclass
class Liar:
    """A node that changes its replies before they leave."""

    node: Node
    change: Callable[[dict, dict], tuple[dict, dict] | bytes | None] = lambda f, t: (f, t)
    from_round: int = 1
    asked: list[str] = field(default_factory=list)

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        facts, tensors = unpack(content, 10**6)
        self.asked.append(kind)
        reply = self.node.answer(kind, content, signature)
        if kind != "train" or facts["round"] < self.from_round:
            return reply
        facts, tensors = unpack(reply, 10**6)
        changed = self.change(facts, dict(tensors))
        if changed is None or isinstance(changed, bytes):
            return changed or b""
        return pack(*changed)


@pytest.fixture
def nodes(population: Population) -> dict[int, Liar]:
    return {n: Liar(Node(Everybody(population, own))) for n, own in SEATS.items()}


def made(nodes, population: Population, **options) -> FlowerEngine:
    exchange = options.pop("exchange", None) or LocalExchange(nodes)
    seat = options.pop("seat", lambda new: {node: SEATS[node] for node in new})
    return FlowerEngine(exchange, population.roster(), seat, {}, **options)


def plan(clients: list[int], needed: int | None = None, round: int = 3) -> RoundPlan:
    ids = np.array(clients)
    keys = seeding.client_keys(1, "batches", round, ids)
    return RoundPlan(round, ids, keys, LocalTraining(2, 8, 0.1), needed)


def accepted(engine: FlowerEngine, population: Population, step: RoundPlan):
    replies = engine.run_clients(step, HEAD)
    updates, _ = accept_updates(replies, step, HEAD, population.train.counts, 1e4)
    return updates, {failure.client: failure.reason for failure in updates.failures}


def bits(updates) -> dict[int, bytes]:
    weight, bias = updates.tensors["weight"], updates.tensors["bias"]
    return {
        c: weight[i].tobytes() + bias[i].tobytes() for i, c in enumerate(updates.clients.tolist())
    }


def test_one_request_per_node_and_the_bits_of_the_local_engine(nodes, population) -> None:
    engine = made(nodes, population)
    engine.start(HEAD)
    for liar in nodes.values():
        liar.asked.clear()
    step = plan([0, 1, 3, 4])
    updates, missing = accepted(engine, population, step)
    (local,) = LocalEngine(population, 1).run_clients(step, HEAD)
    assert bits(updates) == bits(local)
    assert missing == {}
    assert [liar.asked for liar in nodes.values()] == [["train"], ["train"], []]
    metrics = engine.evaluate(HEAD, np.array([4, 0, 2])[[1, 2, 0]])
    wanted = LocalEngine(population, 1).evaluate(HEAD, np.array([0, 2, 4]))
    assert metrics.clients.tolist() == [0, 2, 4]
    assert metrics.loss_sum.tobytes() == wanted.loss_sum.tobytes()


def test_a_client_that_fails_alone_costs_its_nodes_other_clients_nothing(population) -> None:
    """Client 4 has an entry beyond the ring; 1 is hosted beside it, in simulation."""
    wild = replace(population, features=population.features.copy())
    wild.features[population.train.of(4)] *= 50
    nodes = {n: Liar(Node(Everybody(wild, own), simulated=True)) for n, own in SEATS.items()}
    own = Protection(ring_bits=32, scale=2.0**20, limit=2**22, masked=True)
    step = replace(plan([0, 1, 3, 4]), protection=own)
    updates, missing = accepted(made(nodes, wild), wild, step)
    (local,) = LocalEngine(wild, 1).run_clients(step, HEAD)
    assert updates.clients.tolist() == local.clients.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(updates.tensors[RING], local.tensors[RING])
    assert missing == {
        4: "its answer has an entry too large for the secure sum (privacy.value_range)"
    }
    assert missing == {one.client: one.reason for one in local.failures}


def test_the_start_learns_nothing_from_anybody(nodes, population) -> None:
    seen: list[np.ndarray] = []

    for liar in nodes.values():
        liar.from_round = 0
        liar.change = lambda f, t: seen.append(t["head.weight"]) or (f, t)
    made(nodes, population).start(HEAD)
    assert len(seen) == 3
    assert not any(weight.any() for weight in seen)


def changed(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable:
    return lambda facts, tensors: (facts, {**tensors, name: value(tensors[name])})


def nan_in_client_3(weight: np.ndarray) -> np.ndarray:
    weight = weight.copy()
    weight[1, 0, 0] = np.nan
    return weight


def without(name: str) -> Callable:
    return lambda f, tensors: (f, {n: t for n, t in tensors.items() if n != name})


LIES = {
    # FAULTS 19 to 26: what node 10 (clients 0 and 3) sends, who is refused, and why
    "nan": (changed("head.weight", nan_in_client_3), [3], "weight has a value that is not finite"),
    "infinity": (changed("head.bias", lambda b: b + np.float32(np.inf)), [0, 3], "bias has"),
    "wrong shape": (changed("head.weight", lambda w: w[:, :, :8]), [0, 3], r"\(3, 8\) instead"),
    "broadcastable": (changed("head.weight", lambda w: w[:, :1]), [0, 3], r"\(1, 9\) instead"),
    "scalar": (changed("head.bias", lambda b: b[0, 0]), [0, 3], "shape"),
    "wrong dtype": (changed("head.bias", lambda b: b.astype(np.float64)), [0, 3], "float64 instea"),
    "missing key": (without("head.bias"), [0, 3], r"tensors \['weight'\] instead of"),
    "extra key": (
        lambda f, t: (f, {**t, "head.spy": t["head.bias"]}), [0, 3], r"tensors .*'spy'",
    ),
    "extra column": (lambda f, t: (f, {**t, "spy": t["loss"]}), [0, 3], "nobody asked"),
    "missing metric": (without("loss"), [0, 3], "no proper column 'loss'"),
    "huge norm": (changed("head.weight", lambda w: w * np.float32(1e7)), [0, 3], "median"),
    "no examples": (changed("examples", lambda n: n * 0), [0, 3], "trained on 0 examples"),
    "negative": (changed("examples", lambda n: -n), [0, 3], "trained on -"),
    "10^12 examples": (changed("examples", lambda n: n + 10**12), [0, 3], "trained on 10000"),
    "nan examples": (changed("examples", lambda n: n * np.nan), [0, 3], "'examples'"),
    "stale round": (lambda f, t: ({**f, "round": 2}, t), [0, 3], "answers another round"),
    "future round": (lambda f, t: ({**f, "round": 4}, t), [0, 3], "answers another round"),
    "other run": (lambda f, t: ({**f, "run": "0" * 32}, t), [0, 3], "answers another run"),
    "old nonce": (lambda f, t: ({**f, "nonce": "0" * 32}, t), [0, 3], "answers another nonce"),
    "other protocol": (lambda f, t: ({**f, "protocol": 1}, t), [0, 3], "another protocol"),
    "for others": (changed("clients", lambda c: c + 1), [0, 3], "other clients"),
    "in another order": (changed("clients", lambda c: c[::-1]), [0, 3], "other clients"),
    "garbage": (lambda f, t: b"\x80\x04\x95 not ours", [0, 3], "malformed"),
    "too large": (
        lambda f, t: (f, {**t, "head.weight": np.zeros((2, 3, 90_000), np.float32)}),
        [0, 3], "too large",
    ),
    "silence": (lambda f, t: None, [0, 3], "no answer within 9 s"),
}  # fmt: skip


@pytest.mark.parametrize("lie", list(LIES))
def test_a_bad_reply_is_refused_by_name_and_the_round_goes_on(lie, nodes, population) -> None:
    change, refused, why = LIES[lie]
    engine = made(nodes, population, deadline_seconds=9.0, real=True)
    honest, _ = accepted(engine, population, plan([0, 1, 2, 3, 4]))
    nodes[10].change = change
    updates, missing = accepted(engine, population, plan([0, 1, 2, 3, 4]))
    assert sorted(missing) == refused
    for client in refused:
        assert re.search(why, missing[client]), missing[client]
    good = bits(honest)
    assert bits(updates) == {c: b for c, b in good.items() if c not in refused}


def test_who_was_silent_in_training_costs_the_round_no_second_deadline(nodes, population) -> None:
    engine = made(nodes, population, deadline_seconds=9.0, real=True)
    nodes[10].change = lambda f, t: None
    everybody = np.arange(5)
    accepted(engine, population, plan([0, 1, 2, 3, 4]))
    nodes[10].asked.clear()
    assert engine.evaluate(HEAD, everybody).clients.tolist() == [1, 2, 4]
    assert nodes[10].asked == []
    # whoever is judged apart from a round, as the last head is, is asked again
    assert engine.evaluate(HEAD, everybody).clients.tolist() == [0, 1, 2, 3, 4]


def test_yesterdays_reply_is_refused_today(nodes, population) -> None:
    kept: list[bytes] = []
    engine = made(nodes, population, real=True)
    nodes[10].change = lambda f, t: kept.append(pack(f, t)) or (f, t)
    accepted(engine, population, plan([0, 1, 3]))
    nodes[10].change = lambda f, t: kept[0]
    _, missing = accepted(engine, population, plan([0, 1, 3]))
    assert "another nonce" in missing[0]


def test_the_round_closes_with_the_answers_it_needs(nodes, population) -> None:
    engine = made(nodes, population, real=True)
    updates, missing = accepted(engine, population, plan([0, 1, 2, 3, 4], needed=2))
    assert updates.clients.tolist() == [0, 3]
    assert set(missing.values()) == {"late: the round had its 2 answers"}
    simulated = made(nodes, population)
    updates, _ = accepted(simulated, population, plan([0, 1, 2, 3, 4], needed=2))
    assert len(updates.clients) == 5


def test_a_restarted_node_misses_one_round_and_is_seated_again(nodes, population) -> None:
    seated: list[set[int]] = []

    def seat(new):
        seated.append(set(new))
        for node in new:
            nodes[node].node.host.lost = False
        return {node: SEATS[node] for node in new}

    engine = made(nodes, population, real=True, seat=seat)
    engine.start(HEAD)
    nodes[11].node.host.lost = True
    _, missing = accepted(engine, population, plan([0, 1, 2], round=3))
    assert missing == {1: "this client was restarted"}
    _, missing = accepted(engine, population, plan([0, 1, 2], round=4))
    assert missing == {}
    assert seated == [{10, 11, 12}, {11}]


def test_nodes_that_are_gone_are_not_asked_and_may_return_behind_another_node(
    nodes, population
) -> None:
    engine = made(
        nodes, population, real=True, seat=lambda new: {n: SEATS[11 if n == 15 else n] for n in new}
    )
    engine.start(HEAD)
    gone = nodes.pop(11)
    _, missing = accepted(engine, population, plan([0, 1, 2]))
    assert missing == {1: "its node is not there"}
    nodes[15] = gone
    updates, missing = accepted(engine, population, plan([0, 1, 2]))
    assert missing == {}
    assert updates.clients.tolist() == [0, 1, 2]


def test_below_the_quorum_a_round_waits_for_clients_to_come_back(
    nodes, population, monkeypatch: pytest.MonkeyPatch
) -> None:
    seat = {"seat": lambda new: {node: SEATS[node] for node in new}}
    engine = made(nodes, population, real=True, quorum=3, waiting_seconds=60.0, **seat)
    engine.start(HEAD)
    gone, naps = nodes.pop(11), []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            nodes[11] = gone

    clock = SimpleNamespace(monotonic=lambda: float(sum(naps)), sleep=nap)
    monkeypatch.setattr("fedtl.engines.flower_engine.time", clock)
    assert accepted(engine, population, plan([0, 1, 2]))[1] == {}
    assert len(naps) == 3
    nodes.pop(11)
    assert accepted(engine, population, plan([0, 2]))[1] == {}  # as many as can be there
    assert len(naps) == 3
    assert accepted(engine, population, plan([0, 1, 2]))[1] == {1: "its node is not there"}
    assert 60 <= sum(naps) < 62


def test_a_client_behind_two_nodes_is_refused_with_both_names(nodes, population) -> None:
    exchange = LocalExchange(nodes, names={10: "north", 11: "south", 12: "west"})
    engine = made(
        nodes, population, exchange=exchange, seat=lambda new: {n: np.array([n // 12]) for n in new}
    )
    with pytest.raises(InputError, match="north and south"):
        engine.start(HEAD)
    unknown = made(nodes, population, seat=lambda new: {10: np.array([5])})
    with pytest.raises(InputError, match="node 10"):
        unknown.start(HEAD)


def test_in_simulation_an_error_is_raised_as_what_it_is(nodes, population) -> None:
    population.labels[population.train.of(1)[0]] = 99
    engine = made(nodes, population)
    with pytest.raises(InputError, match="labels outside the head's classes"):
        engine.run_clients(plan([0, 1]), HEAD)
    real = made(nodes, population, real=True)
    updates, missing = accepted(real, population, plan([0, 1]))
    assert updates.clients.tolist() == [0]
    assert missing[1] == "labels outside the head's classes"


class Dying(LocalExchange):
    """Loses node 11's process in some asks."""

    def __init__(self, nodes, times: int) -> None:
        super().__init__(nodes)
        self.times = times

    def ask(self, kind, requests, deadline_seconds=None, **options):
        for node, answer in super().ask(kind, requests, deadline_seconds, **options):
            if node == 11 and self.times:
                self.times -= 1
                yield node, Answer({}, {}, 0, "the worker died", lost=True)
            else:
                yield node, answer


def test_lost_nodes_are_brought_back_once_and_only_their_clients_asked_again(
    nodes, population
) -> None:
    recovered: list[int] = []
    engine = made(nodes, population, exchange=Dying(nodes, 1), recover=lambda: recovered.append(1))
    step = plan([0, 1, 2, 3, 4])
    updates, missing = accepted(engine, population, step)
    (local,) = LocalEngine(population, 1).run_clients(step, HEAD)
    assert (bits(updates), missing) == (bits(local), {})
    assert recovered == [1]
    assert [len(liar.asked) for liar in nodes.values()] == [1, 2, 1]


def test_a_node_that_comes_while_others_are_seated_is_asked_at_once(nodes, population) -> None:
    late = nodes.pop(11)

    def seat(new):  # waits for all, as the simulation does
        nodes[11] = late
        return SEATS

    updates, missing = accepted(made(nodes, population, seat=seat), population, plan([0, 1, 2]))
    assert (updates.clients.tolist(), missing) == ([0, 1, 2], {})


def test_workers_that_die_twice_stop_the_run_with_3(nodes, population) -> None:
    engine = made(nodes, population, exchange=Dying(nodes, 2), recover=lambda: None)
    with pytest.raises(EnvironmentFault, match=r"died twice in round 3 .*last commit is kept"):
        engine.run_clients(plan([0, 1, 2]), HEAD)


def test_clients_train_alone_and_only_sums_come_back(nodes, population) -> None:
    engine = made(nodes, population, real=True)
    trainings = [LocalTraining(1, 8, 0.1), LocalTraining(1, 8, 0.05)]
    clients = np.array([0, 1, 3])
    keys = np.stack([seeding.client_keys(2, "local_only", r, clients) for r in (1, 2)])
    heads = None
    for round in (1, 2):
        step = RoundPlan(round, clients, keys[round - 1], trainings[round - 1])
        heads = train_clients(population, HEAD, step, initial=heads).tensors
    wanted = evaluate_own(population, heads, clients)
    found = engine.train_alone(HEAD, trainings, keys, clients)
    assert found.metrics.clients.tolist() == [0, 1, 3]
    assert found.metrics.loss_sum.tobytes() == wanted.loss_sum.tobytes()
    assert found.beats.shape == (3, 0)
    del nodes[11]
    left = engine.train_alone(HEAD, trainings, keys, clients)
    assert left.metrics.clients.tolist() == [0, 3]


def test_clients_alone_say_how_often_only_one_head_is_right(nodes, population) -> None:
    engine = made(nodes, population, real=True)
    rng = np.random.default_rng(0)
    shared = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in HEAD.items()}
    clients, trainings = np.array([0, 1, 3]), [LocalTraining(2, 8, 0.1)]
    keys = np.stack([seeding.client_keys(2, "local_only", 1, clients)])
    itself = RoundPlan(2, clients, seeding.client_keys(2, "personal", 2, clients), trainings[0])
    tuned = replace(itself, personal=Personal("finetune", epochs=1))
    found = engine.train_alone(HEAD, trainings, keys, clients, shared, [itself, tuned])
    heads = train_clients(population, HEAD, RoundPlan(1, clients, keys[0], trainings[0])).tensors
    theirs = personal_heads(population, shared, tuned)
    for i, client in enumerate(clients.tolist()):
        x, y = (a[population.test.of(client)] for a in (population.features, population.labels))

        def right(weight, bias, x=x, y=y):
            return (x @ weight.T + bias).argmax(1) == y

        own = right(heads["weight"][i], heads["bias"][i])
        rivals = (
            right(shared["weight"], shared["bias"]),
            right(theirs["weight"][i], theirs["bias"][i]),
        )
        for r, other in enumerate(rivals):
            assert found.beats[i, r] == (other & ~own).sum()
            assert found.loses[i, r] == (own & ~other).sum()
    assert found.beats.sum() + found.loses.sum() > 0


class Dead(LocalExchange):
    def ask(self, kind, requests, deadline_seconds=None, **options):
        for node in requests:
            yield node, Answer({}, {}, 0, "the SuperLink died", 3, True)


def test_when_nobody_can_answer_any_more_the_run_ends_with_3(nodes, population) -> None:
    engine = made(nodes, population, exchange=Dead(nodes), real=True)
    with pytest.raises(EnvironmentFault, match="SuperLink died; the last commit is kept"):
        engine.run_clients(plan([0, 1]), HEAD)


def test_only_heads_and_sums_travel_in_a_round(nodes, population) -> None:
    exchange = LocalExchange(nodes)
    engine = made(nodes, population, exchange=exchange)
    engine.start(HEAD)
    before = exchange.traffic()[10, "train"]
    accepted(engine, population, plan([0, 1, 3]))
    after = exchange.traffic()[10, "train"]
    head = 4 * (3 * 9 + 3)
    assert after.messages - before.messages == 1
    assert head < after.sent - before.sent < head + 1500
    assert 2 * head < after.received - before.received < 2 * head + 1500


def test_the_local_engine_waits_for_neither_flower_nor_ray() -> None:
    code = "import sys, fedtl.build; print({'flwr', 'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
