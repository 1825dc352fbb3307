"""A node answers what it is asked, and tells nobody more than that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtl import seeding
from fedtl.clients.evaluation import evaluate_clients, evaluate_own
from fedtl.clients.training import train_clients
from fedtl.engines import wire
from fedtl.engines.alone import alone_request
from fedtl.engines.exchange import Correspondence, LocalExchange
from fedtl.engines.node import Node, NotPrepared, Sent
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import RoundPlan
from fedtl.types import LocalTraining, Population, Rows

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
TRAINING = LocalTraining(2, 8, 0.1, momentum=0.5)


class OneClientHere:
    """Client 3 of the federation, alone in a population of its own, as at a real client."""

    def __init__(self, population: Population) -> None:
        own = Rows(np.arange(population.train.counts[3]), np.array([0, population.train.counts[3]]))
        tests = population.test.counts[3]
        rows = np.concatenate([population.train.of(3), population.test.of(3)])
        test = Rows(len(own.index) + np.arange(tests), np.array([0, tests]))
        features, labels = population.features[rows], population.labels[rows]
        self._own = Population(
            features, labels, population.classes, own, test, ("client-3",), ("y",)
        )
        self.prepared = True

    def join(self, facts):
        return {"name": "client-3", "heard": facts["hello"]}

    def weights(self, facts, tensors):
        return {"bytes": len(tensors["piece"])}

    def prepare(self, facts):
        raise InputError("cannot read the scan", where="/private/patients/Doe.png", got="secret")

    def population(self):
        if not self.prepared:
            raise NotPrepared("this client was restarted")
        return self._own

    def consent(self, plan) -> None:
        pass

    def protected(self, plan) -> None:
        pass

    def store(self):
        return None

    def ids(self, clients):
        if clients.tolist() != [3]:
            raise InputError("not hosted here")
        return np.zeros(1, np.int64)


@pytest.fixture
def host(population: Population) -> OneClientHere:
    return OneClientHere(population)


def ask(node: Node, kind: str, facts=None, tensors=None, **options):
    exchange = LocalExchange({7: node}, **options)
    (answer,) = exchange.ask(kind, {7: (facts or {}, tensors or {})}, max_bytes=10**6)
    return answer[1]


def plan(clients: list[int], round: int = 3) -> RoundPlan:
    ids = np.array(clients)
    return RoundPlan(round, ids, seeding.client_keys(1, "batches", round, ids), TRAINING)


def test_training_gives_the_federations_bits_under_the_federations_id(host, population) -> None:
    answer = ask(Node(host), "train", *wire.train_request(plan([3]), HEAD))
    got = wire.read_updates(3, np.array([3]), answer.tensors)
    wanted = train_clients(population, HEAD, plan([3]))
    assert {n: t.tobytes() for n, t in got.tensors.items()} == {
        n: t.tobytes() for n, t in wanted.tensors.items()
    }
    assert (got.num_examples, got.loss) == (wanted.num_examples, wanted.loss)


def test_evaluation_is_on_its_own_test_examples(host, population) -> None:
    answer = ask(Node(host), "evaluate", *wire.evaluate_request(HEAD, np.array([3])))
    tests = population.test.counts[[3]]
    got = wire.read_metrics(np.array([3]), 3, tests, answer.tensors)
    wanted = evaluate_clients(population, HEAD, np.array([3]))
    assert got.loss_sum.tolist() == wanted.loss_sum.tolist()
    assert got.correct.tolist() == wanted.correct.tolist()


def test_alone_only_metrics_leave(host, population) -> None:
    trainings = [TRAINING, replace(TRAINING, learning_rate=0.05)]
    keys = np.array([[5], [6]], np.uint64)
    heads = None
    for round in (1, 2):
        step = RoundPlan(round, np.array([3]), keys[round - 1], trainings[round - 1])
        heads = train_clients(population, HEAD, step, initial=heads).tensors
    wanted = evaluate_own(population, heads, np.array([3]))
    answer = ask(Node(host), "alone", *alone_request(HEAD, np.array([3]), trainings, keys))
    assert set(answer.tensors) == {"clients", "loss_sum", "correct", "count", "beats", "loses"}
    assert answer.tensors["beats"].shape == (1, 0)
    assert answer.facts == {}
    assert answer.tensors["loss_sum"].tolist() == wanted.loss_sum.tolist()
    assert answer.tensors["correct"].tolist() == wanted.correct.tolist()


def test_join_and_weights_reach_the_host(host) -> None:
    assert ask(Node(host), "join", {"hello": "you"}).facts == {"name": "client-3", "heard": "you"}
    piece = {"piece": np.zeros(4, np.uint8)}
    assert ask(Node(host), "weights", {}, piece).facts == {"bytes": 4}


def test_an_error_says_what_but_neither_where_nor_which_value(host) -> None:
    answer = ask(Node(host), "prepare")
    assert (answer.error, answer.exit_code) == ("cannot read the scan", 2)
    assert "private" not in str(answer.facts)
    told = ask(Node(host, discreet=False), "prepare").error
    assert told is not None
    assert "Doe" in told


def test_a_bug_is_told_without_its_text(host, caplog: pytest.LogCaptureFixture) -> None:
    answer = ask(Node(host), "join", {"nothing": 1})  # the host looks for "hello"
    assert (answer.error, answer.exit_code) == ("a KeyError at the client", 1)
    assert "Traceback" in caplog.text


def test_others_clients_are_not_trained_and_a_restart_is_told(host) -> None:
    node = Node(host)
    request = wire.train_request(plan([2]), HEAD)
    assert ask(node, "train", *request).error == "not hosted here"
    host.prepared = False
    answer = ask(node, "train", *wire.train_request(plan([3]), HEAD))
    assert answer.facts["unprepared"] is True


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04garbage", wire.pack({}, {}), wire.pack({"protocol": 1}, {})]
)
def test_garbage_gets_an_answer_that_nobody_takes(host, content: bytes) -> None:
    facts, tensors = wire.unpack(Node(host).answer("train", content), 10**6)
    assert facts["exit_code"] == 2
    assert tensors == {}


def test_another_protocol_names_both(host) -> None:
    facts = {"protocol": 99, "round": 1, "nonce": "n" * 32, "kind": "join", "to": ""}
    told, _ = wire.unpack(Node(host).answer("join", wire.pack(facts, {})), 10**6)
    assert f"99 and {wire.PROTOCOL}" in told["error"]


def test_unknown_kinds_are_refused(host) -> None:
    assert ask(Node(host), "format_disk").error == "a request of an unknown kind"


KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()


def test_signed_requests_only(host) -> None:
    node = Node(host, public_key=PUBLIC, name="client-3")
    facts = {"hello": 1}
    signed = {"names": {7: "client-3"}, "sign": KEY.sign}
    assert ask(node, "join", facts, **signed).error is None
    unsigned = ask(node, "join", facts, names={7: "client-3"})
    assert (unsigned.error, unsigned.exit_code) == ("a request that the server did not sign", 5)
    other = {"names": {7: "client-3"}, "sign": Ed25519PrivateKey.generate().sign}
    assert ask(node, "join", facts, **other).exit_code == 5
    meant_for_another = {"names": {7: "client-4"}, "sign": KEY.sign}
    assert ask(node, "join", facts, **meant_for_another).exit_code == 5


def test_a_request_that_was_changed_replayed_or_turned_is_refused(host) -> None:
    node = Node(host, public_key=PUBLIC)
    mail = Correspondence(KEY.sign)
    letter = mail.seal("join", 7, "", ({"hello": 1}, {}))

    def answer(kind: str, content: bytes):
        reply = node.answer(kind, content, letter.signature)
        return mail.open(kind, 7, letter, reply, 10**6)

    assert answer("train", letter.content).exit_code == 5
    changed = letter.content.replace(b'"hello', b'"jello').replace(b'\\"hello', b'\\"jello')
    assert changed != letter.content
    assert answer("join", changed).exit_code == 5
    assert answer("join", letter.content).error is None
    assert answer("join", letter.content).exit_code == 5  # FAULTS 26: yesterday's, once more


def test_everything_that_leaves_is_told_before_it_leaves(host) -> None:
    import hashlib

    log: list[Sent] = []
    node = Node(host, audit=log.append)
    letter = Correspondence().seal("train", 7, "", wire.train_request(plan([3]), HEAD))
    reply = node.answer("train", letter.content)
    (sent,) = log
    assert (sent.kind, sent.round, sent.num_bytes) == ("train", 3, len(reply))
    assert sent.sha256 == hashlib.sha256(reply).hexdigest()
    assert sent.shapes["head.weight"] == (1, 3, 9)


def test_what_cannot_be_recorded_does_not_leave(host) -> None:
    def full(sent: Sent) -> None:
        raise EnvironmentFault("cannot write the audit log: the disk is full")

    answer = ask(Node(host, audit=full), "train", *wire.train_request(plan([3]), HEAD))
    assert (answer.exit_code, answer.tensors) == (3, {})
