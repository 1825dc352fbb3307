"""Secure sums of clients behind nodes: exact, whoever falls silent, and nobody is unmasked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedtl import seeding
from fedtl.clients.tasks import do_task
from fedtl.engines.exchange import LocalExchange
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.engines.masking import CarriedSum, phase_request, read_phase
from fedtl.engines.node import Node, Sent
from fedtl.engines.wire import SECURE_PHASES, pack, train_request, unpack
from fedtl.errors import InputError
from fedtl.plans import RING, Protection, RoundPlan, Statistics
from fedtl.privacy.ring import scale_for
from fedtl.privacy.secure_sum import SecureAbort
from fedtl.types import LocalTraining, Population

HEAD = {"weight": np.zeros((3, 9), np.float32), "bias": np.zeros(3, np.float32)}
KEYS, SHARES, REVEAL = SECURE_PHASES


@dataclass
class Alone:
    """A host of one client of a population, as a real one."""

    whole: Population
    client: int
    kept: list[RoundPlan] = field(default_factory=list)

    def population(self) -> Population:
        return self.whole

    def consent(self, plan: RoundPlan) -> None:
        pass

    def protected(self, plan: RoundPlan) -> None:
        self.kept.append(plan)

    def store(self) -> None:
        return None

    def ids(self, clients: np.ndarray) -> np.ndarray:
        if clients.tolist() != [self.client]:
            raise InputError("not hosted here")
        return clients


@dataclass
class Wire:
    """A node that can fall silent and whose answers can be changed on their way.

    Attributes:
        silent_from: passages (kinds of requests, in their order) that stay without an answer.
        change: what becomes of an answer's message.
    """

    node: Node
    silent: Callable[[str, int], bool] = lambda kind, passage: False
    change: Callable[[str, int, bytes], bytes] = lambda kind, passage, message: message
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    said: list[bytes] = field(default_factory=list)

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        passage = sum(kind == before for before, _ in self.heard)
        self.heard.append((kind, content))
        if self.silent(kind, passage):
            return b""
        reply = self.node.answer(kind, content, signature)
        self.said.append(reply)
        facts, tensors = unpack(reply, 10**7)
        if kind not in SECURE_PHASES or "error" in facts:
            return reply
        message = self.change(kind, passage, tensors["message"].tobytes())
        return pack(facts, {**tensors, "message": np.frombuffer(message, np.uint8)})


@pytest.fixture
def wires(population: Population) -> dict[int, Wire]:
    return {10 + c: Wire(Node(Alone(population, c))) for c in range(5)}


def engine_of(wires: dict[int, Wire], population: Population) -> FlowerEngine:
    seats = {node: np.array([node - 10]) for node in wires}
    return FlowerEngine(LocalExchange(wires), population.roster(), lambda new: seats, {}, real=True)


def plan(round: int = 3, bits: int = 32, noise: float = 0.0, clip: float = 1.0) -> RoundPlan:
    ids = np.arange(5)
    keys = seeding.client_keys(1, "batches", round, ids)
    scale, limit = scale_for(clip + 12 * noise, len(ids), bits)
    protection = Protection(
        clip=clip, noise=noise, ring_bits=bits, scale=scale, limit=limit, masked=True
    )
    return RoundPlan(
        round, ids, keys, LocalTraining(2, 8, 0.1), protection=protection, noise_keys=keys,
        weights=np.array([1.0, 0.5, 0.25, 0.75, 1.0]),
    )  # fmt: skip


def bare(population: Population, step: RoundPlan) -> np.ndarray:
    """What each client's answer is in the ring, without masks; [k, P]."""
    assert step.protection is not None
    open_plan = replace(step, protection=replace(step.protection, masked=False))
    return do_task(population, HEAD, open_plan).tensors[RING]


def summed(
    engine: FlowerEngine, step: RoundPlan, threshold: int = 3, neighbours: int | None = None
) -> tuple[np.ndarray, np.ndarray, CarriedSum, dict[int, str]]:
    """Sum, survivors, the sum itself and why the others are missing."""
    told: list[tuple[int, str]] = []
    secure = CarriedSum(
        engine, step, HEAD, threshold, neighbours, run="run",
        tell=lambda client, what: told.append((client, what)),
    )  # fmt: skip
    agreed = secure.begin()
    here = step.part(np.isin(step.clients, agreed))
    missing = dict(secure.failures)
    for reply in engine.run_clients(here, HEAD):
        if len(reply.clients):
            secure.add(reply.clients, reply.tensors[RING])
        missing.update({one.client: one.reason for one in reply.failures})
    total, survivors = secure.finish()
    assert [client for client, _ in told] == secure.facts["liars"]
    return total, survivors, secure, missing


@pytest.mark.parametrize("neighbours", [None, 2])
@pytest.mark.parametrize("bits", [32, 64])
def test_the_sum_is_that_of_the_bare_answers_to_the_bit(
    wires, population, bits: int, neighbours: int | None
) -> None:
    step = plan(bits=bits)
    engine = engine_of(wires, population)
    total, survivors, secure, missing = summed(engine, step, 3, neighbours)
    wanted = bare(population, step)
    np.testing.assert_array_equal(total, wanted.sum(axis=0, dtype=wanted.dtype))
    assert survivors.tolist() == [0, 1, 2, 3, 4]
    assert missing == {}
    assert secure.facts["dropouts"] == 0
    # the same clients again: another round, other keys
    total, *_ = summed(engine, replace(step, round=4), 3, neighbours)
    assert len(total) == 30


def test_statistics_sum_exactly_too(wires, population) -> None:
    scale, limit = scale_for(2.0**20, 5, 64)
    step = replace(
        plan(), task="statistics", statistics=Statistics(), weights=None,
        protection=Protection(ring_bits=64, scale=scale, limit=limit, masked=True),
    )  # fmt: skip
    total, *_ = summed(engine_of(wires, population), step)
    np.testing.assert_array_equal(total, bare(population, step).sum(axis=0, dtype=np.uint64))


def test_a_masked_answer_tells_nothing_of_the_client(wires, population) -> None:
    step = plan()
    log: list[Sent] = []
    wires[12].node.audit = log.append
    summed(engine_of(wires, population), step)
    facts, tensors = unpack(wires[12].said[3], 10**6)
    sent = tensors["head.ring.values"][0]
    assert not np.isin(sent, bare(population, step)[2]).any()
    assert np.abs(sent / 2.0**32 - 0.5).mean() > 0.1  # all over the ring
    assert facts["masked"] is True
    assert np.isnan(tensors["loss"]).all()
    assert [entry.kind for entry in log] == [KEYS, SHARES, SHARES, "train", REVEAL]
    assert [bool(entry.facts.get("masked")) for entry in log] == [False] * 3 + [True, False]


DROPPED = {
    "keys": (KEYS, 0, [0, 1, 3, 4]),
    "shares": (SHARES, 0, [0, 1, 3, 4]),
    "their delivery": (SHARES, 1, [0, 1, 3, 4]),
    "the masked answer": ("train", 0, [0, 1, 3, 4]),
    "the reveal": (REVEAL, 0, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("kind", "passage", "left"), DROPPED.values(), ids=DROPPED)
def test_a_client_lost_at_any_phase_is_made_up_for(
    wires, population, kind: str, passage: int, left: list[int]
) -> None:
    step = plan()
    dead: list[str] = []

    def silent(asked: str, at: int) -> bool:
        if (asked, at) == (kind, passage):
            dead.append(asked)
        return bool(dead)

    wires[12].silent = silent
    engine = engine_of(wires, population)
    total, survivors, secure, missing = summed(engine, step)
    wanted = bare(population, step)[left]
    np.testing.assert_array_equal(total, wanted.sum(axis=0, dtype=np.uint32))
    assert survivors.tolist() == left
    assert dead == [kind]  # it is asked nothing more
    if 2 not in left:
        assert missing == {2: "no answer"}
        assert secure.facts["dropouts"] == 1
    engine.evaluate(HEAD, step.clients)
    assert dead == [kind]  # nor does it cost the judging a deadline


def test_below_the_threshold_nothing_is_revealed(wires, population) -> None:
    for node in (10, 11):
        wires[node].silent = lambda kind, passage: kind == "train"
    with pytest.raises(SecureAbort, match="3 clients sent a vector, 4 are needed"):
        summed(engine_of(wires, population), plan(), threshold=4)
    assert all(kind != REVEAL for wire in wires.values() for kind, _ in wire.heard)


def test_a_client_that_lies_about_its_shares_is_named_and_the_sum_is_right(
    wires, population
) -> None:
    wires[13].change = lambda kind, passage, message: (
        message if kind != REVEAL else message[:-9] + bytes([message[-9] ^ 1]) + message[-8:]
    )
    step = plan()
    total, _, secure, _ = summed(engine_of(wires, population), step)
    np.testing.assert_array_equal(total, bare(population, step).sum(axis=0, dtype=np.uint32))
    assert secure.facts["liars"] == [3]  # and told, see ``summed``


@pytest.mark.parametrize("kind", [KEYS, SHARES, REVEAL])
@pytest.mark.parametrize(
    "damage",
    [lambda m: b"", lambda m: m[:-1], lambda m: m + b"\0", lambda m: b"\xff" * len(m)],
    ids=["empty", "short", "long", "noise"],
)
def test_malformed_answers_of_a_client_cost_it_the_round_and_nobody_else(
    wires, population, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    wires[14].change = lambda asked, passage, message: damage(message) if asked == kind else message
    step = plan()
    total, survivors, secure, _ = summed(engine_of(wires, population), step)
    left = [0, 1, 2, 3] if kind != REVEAL else [0, 1, 2, 3, 4]
    assert survivors.tolist() == left
    np.testing.assert_array_equal(total, bare(population, step)[left].sum(axis=0, dtype=np.uint32))
    assert 4 in secure.failures


def phase(wire: Wire, kind: str, message: bytes, round: int = 3, client: int = 2):
    """One phase of another server's making."""
    exchange = LocalExchange({0: wire.node})
    request = phase_request(round, np.array([client]), {client: message})
    ((_, answer),) = exchange.ask(kind, {0: request}, max_bytes=10**7)
    return answer


def messages(wire: Wire, kind: str) -> list[bytes]:
    """What the server sent in a phase."""
    return [unpack(c, 10**7)[1]["message"].tobytes() for k, c in wire.heard if k == kind]


def test_what_was_asked_once_is_refused_the_next_time(wires, population) -> None:
    """The same messages in fresh envelopes, of a server that keeps the run's name."""
    step = plan()
    engine = engine_of(wires, population)
    summed(engine, step)
    wire = wires[12]
    run = unpack(wire.heard[0][1], 10**7)[0]["run"]
    facts = {"round": 3}

    def again(kind: str, message: bytes):
        exchange = LocalExchange({0: wire.node})
        exchange._correspondence.run = run
        request = (facts, {"clients": np.array([2]), "message": np.frombuffer(message, np.uint8)})
        ((_, answer),) = exchange.ask(kind, {0: request}, max_bytes=10**7)
        return answer

    for kind in (KEYS, SHARES, REVEAL):
        answer = again(kind, messages(wire, kind)[0])
        assert answer.exit_code == 5, kind
        assert answer.tensors == {}
    ((_, late),) = LocalExchange({0: wire.node}).ask("train", {0: train_request(
        step.part(np.array([2])), HEAD)}, max_bytes=10**7)  # fmt: skip
    assert (late.exit_code, late.tensors) == (5, {})
    # and the envelope itself, once more
    facts, tensors = unpack(wire.node.answer(REVEAL, wire.heard[-1][1]), 10**7)
    assert (facts["exit_code"], tensors) == (5, {})


def test_an_answer_without_masks_that_are_settled_is_refused(wires, population) -> None:
    """A masked answer is asked for before the keys, after them, and twice."""
    wire, step = wires[12], plan()

    def train(round: int = 3):
        ((_, answer),) = engine.exchange.ask(
            "train", {12: train_request(replace(step, round=round).part(np.array([2])), HEAD)},
            max_bytes=10**7,
        )  # fmt: skip
        return answer.exit_code, set(answer.tensors)

    engine = engine_of(wires, population)
    assert train() == (5, set())
    secure = CarriedSum(engine, step, HEAD, 3, None, run="run")
    wire.silent = lambda kind, passage: kind == SHARES
    secure.begin()
    assert train() == (5, set())
    wire.silent = lambda kind, passage: False
    secure = CarriedSum(engine, replace(step, round=4), HEAD, 3, None, run="run")
    secure.begin()
    assert train() == (5, set())  # that was the third round's
    other = engine_of(wires, population)  # of another server, with the same round
    ((_, answer),) = other.exchange.ask(
        "train",
        {12: train_request(replace(step, round=4).part(np.array([2])), HEAD)},
        max_bytes=10**7,
    )
    assert (answer.exit_code, answer.tensors) == (5, {})
    assert train(4) == (0, {"clients", "examples", "loss", "head.ring.values"})
    assert train(4) == (5, set())


def test_a_message_about_another_client_or_round_than_it_says_is_refused(wires, population) -> None:
    summed(engine_of(wires, population), plan())
    opening = messages(wires[13], KEYS)[0]
    assert phase(wires[12], KEYS, opening).exit_code == 5  # 13 is client 3
    assert phase(wires[12], KEYS, messages(wires[12], KEYS)[0], round=9).exit_code == 5
    assert phase(wires[12], KEYS, b"hello", round=10).exit_code == 5


def test_phases_are_between_single_clients(population) -> None:
    with pytest.raises(InputError, match="behind one node"):
        phase_request(1, np.arange(2), {0: b"", 1: b""})
    node = Node(Alone(population, 0))
    both = ({"round": 1}, {"clients": np.arange(2), "message": np.zeros(3, np.uint8)})
    for change in ({}, {"clients": np.array([1])}, {"clients": np.array([0]), "more": np.ones(1)}):
        request = both[0], {**both[1], **change}
        ((_, answer),) = LocalExchange({0: node}).ask(KEYS, {0: request})
        assert answer.exit_code in (2, 5)
    for wrong in ({}, {"message": np.zeros(3)}, {"message": np.zeros((1, 3), np.uint8)}):
        with pytest.raises(InputError, match="malformed"):
            read_phase(np.array([0]), {"clients": np.array([0]), **wrong})


def test_noise_of_real_clients_does_not_follow_from_the_servers_keys(wires, population) -> None:
    """The same request twice gives two answers; a simulated node's are the same."""
    step = replace(plan(), protection=Protection(clip=1.0, noise=0.5)).part(np.array([2]))

    def answered(**options) -> np.ndarray:
        node = Node(Alone(population, 2), **options)
        ((_, answer),) = LocalExchange({0: node}).ask(
            "train", {0: train_request(step, HEAD)}, max_bytes=10**7
        )
        assert answer.error is None
        return answer.tensors["head.weight"]

    real, again = answered(), answered()
    simulated = answered(simulated=True)
    assert (real != again).all()
    assert (real != simulated).all()
    np.testing.assert_array_equal(simulated, answered(simulated=True))
    spread = np.std([answered() - simulated for _ in range(20)])
    assert 0.6 < spread < 0.82  # of two independent noises, sqrt(2) * 0.5


def test_who_has_an_entry_beyond_the_ring_says_so_and_nothing_else(wires, population) -> None:
    own = plan().protection
    assert own is not None
    step = replace(plan(), protection=replace(own, clip=0.0, scale=2.0**40, limit=2**20))
    with pytest.raises(SecureAbort):
        summed(engine_of(wires, population), step)
    facts, tensors = unpack(wires[12].said[-1], 10**7)
    assert facts["failed"] == [
        [2, "its answer has an entry too large for the secure sum (privacy.value_range)"]
    ]
    assert tensors["head.ring.values"].shape == (0, 30)
