"""Clients behind nodes: one request per node and round, whatever the number of clients there.

Knows nothing of Flower itself, only an Exchange; see ``flower_server`` for the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fedtl.engines.alone import AloneMetrics, alone_request, read_alone_reply
from fedtl.engines.exchange import Answer, Exchange, Request
from fedtl.engines.masking import phase_request, read_phase
from fedtl.engines.wire import (
    SECURE_PHASES,
    evaluate_request,
    read_metrics,
    read_updates,
    reply_bytes,
    train_request,
)
from fedtl.errors import EnvironmentFault, FedtlError, InputError, PolicyStop, SecurityRefusal
from fedtl.plans import RoundPlan, no_updates
from fedtl.types import (
    ClientFailure,
    ClientMetrics,
    ClientUpdates,
    Head,
    Int64,
    LocalTraining,
    Roster,
    UInt64,
    join_metrics,
)

T = TypeVar("T")

STEP_SECONDS = 0.2
"""Between two looks whether clients are back."""

SHARE_BYTES = 2**12
"""More than a client says of any one other in a phase of a secure sum."""

SILENCE = "no answer"

Seats = Mapping[int, Int64]
"""Node -> the clients it hosts, sorted ids."""

KINDS: Mapping[int, type[FedtlError]] = {
    kind.exit_code: kind for kind in (InputError, EnvironmentFault, PolicyStop, SecurityRefusal)
}


@dataclass(frozen=True)
class Question(Generic[T]):
    """What some clients are asked.

    Attributes:
        kind, round: see Exchange.
        request: for the clients of one node.
        read: what a node's answer says of those clients. Raises InputError.
        max_bytes: more than all clients together can honestly answer.
        needed: clients whose answers are enough; None for all.
        deadlines: how many rounds' time the answer may take.
    """

    kind: str
    round: int
    request: Callable[[Int64], Request]
    read: Callable[[Int64, Answer], T]
    max_bytes: int
    needed: int | None = None
    deadlines: int = 1


@dataclass
class FlowerEngine:
    """Runs clients wherever the exchange's nodes are.

    Attributes:
        exchange: carries requests to nodes and answers back.
        roster: the federation's clients.
        seat: called with nodes that are new, or that lost their data; says whom they host.
        seats: who hosts whom already, where that was settled before.
        deadline_seconds: a round closes then; None waits for everybody.
        real: clients are other people's machines: a round closes when it has the answers it needs,
            and a client's trouble is its own. Otherwise all is one program, and a node's error is
            raised as what it is.
        recover: brings nodes that died all at once back, once a round; None where they come back
            by themselves.
        quorum: clients without whose updates a round counts for nothing.
        waiting_seconds: for so long a round waits for as many to be there before it begins.
        opening, letting_go: called by ``start`` before anything else, and by ``close``.
        held_bytes: see Engine.
    """

    exchange: Exchange
    roster: Roster
    seat: Callable[[Collection[int]], Seats]
    seats: Seats
    deadline_seconds: float | None = None
    real: bool = False
    recover: Callable[[], None] | None = None
    quorum: int = 0
    waiting_seconds: float = 0.0
    opening: Callable[[], None] = lambda: None
    letting_go: Callable[[], None] = lambda: None
    held_bytes: int = 2**28
    _missed: tuple[int, dict[int, str]] = (0, {})  # the round, who missed a part of it, and why

    def start(self, head: Head) -> None:
        """Seat all clients and let every node load what it needs, with its smallest client."""
        self.opening()
        self._seated(np.empty(0, np.int64))
        counts = self.roster.train
        smallest = [own[np.argmin(counts[own])] for own in self.seats.values() if len(own)]
        clients = np.sort(np.array(smallest, np.int64))
        # no epoch: nothing is learnt, and nothing about a client's data leaves it
        training = LocalTraining(epochs=0, batch_size=1, learning_rate=0.1)
        plan = RoundPlan(0, clients, np.zeros(len(clients), np.uint64), training)
        self.run_clients(plan, head)
        self.evaluate(head, clients)

    def run_clients(self, plan: RoundPlan, head: Head) -> Sequence[ClientUpdates]:
        """One reply per node, and one more with the clients of which none came."""

        def request(clients: Int64) -> Request:
            return train_request(plan.part(np.searchsorted(plan.clients, clients)), head)

        def read(clients: Int64, answer: Answer) -> ClientUpdates:
            return read_updates(plan.round, clients, answer.tensors, answer.facts)

        limit = reply_bytes(len(plan.clients), plan.up_bytes(head))
        needed = plan.needed if self.real else None
        question = Question("train", plan.round, request, read, limit, needed)
        self._wait_for(min(self.quorum, len(plan.clients)), plan.clients)
        replies, missing = self._collect(question, plan.clients)
        all_missing = self._note_missing(plan.round, missing)
        failures = tuple(ClientFailure(client, why) for client, why in sorted(all_missing.items()))
        return [*replies, no_updates(plan, head, failures)]

    def carry(self, round: int, phase: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """One phase of a secure sum: a message to each client, and the answers of those that gave
        one; the others are missing from the round."""
        clients = np.array(sorted(messages), np.int64)

        def request(own: Int64) -> Request:
            return phase_request(round, own, messages)

        def read(own: Int64, answer: Answer) -> tuple[int, bytes]:
            return int(own[0]), read_phase(own, answer.tensors)

        limit = reply_bytes(len(clients), SHARE_BYTES)
        question = Question(phase, round, request, read, limit)
        if phase == SECURE_PHASES[0]:
            self._wait_for(min(self.quorum, len(clients)), clients)
        answers, missing = self._collect(question, clients)
        self._note_missing(round, missing)
        return dict(answers)

    def missed(self, round: int) -> dict[int, str]:
        """Who missed a part of the round so far, and why."""
        return self._missed[1] if self._missed[0] == round else {}

    def _note_missing(self, round: int, missing: Mapping[int, str]) -> dict[int, str]:
        """Everybody who missed a part of this round so far, with the first reason."""
        self._missed = round, {**missing, **self.missed(round)}
        return self._missed[1]

    def evaluate(self, head: Head, clients: Int64) -> ClientMetrics:
        """The clients that could be judged, sorted by id.

        Right after a round's training those are not asked that were silent in it: each would cost
        the round a second deadline.
        """
        silent = [c for c, why in self._missed[1].items() if why.startswith(SILENCE)]
        asked, self._missed = np.setdiff1d(clients, np.array(silent, np.int64)), (0, {})

        def request(some: Int64) -> Request:
            return evaluate_request(head, some)

        return self._metrics("evaluate", request, head, asked)

    def train_alone(
        self,
        head: Head,
        trainings: Sequence[LocalTraining],
        batch_keys: UInt64,
        clients: Int64,
        shared: Head | None = None,
        rivals: Sequence[RoundPlan] = (),
    ) -> AloneMetrics:
        """Each client's own head after training alone, judged on its own test examples.

        The heads stay where they are. Clients that did not manage are missing; sorted by id.

        Args:
            trainings: what a client does in each round.
            batch_keys: uint64 [rounds, k].
            clients: int64 [k], sorted.
            shared, rivals: what the own heads are compared with, see ``alone.Alone``.
        """
        num_classes, tests = len(self.roster.classes), self.roster.test

        def request(some: Int64) -> Request:
            places = np.searchsorted(clients, some)
            asked = [plan.part(places) for plan in rivals]
            return alone_request(head, some, trainings, batch_keys[:, places], shared, asked)

        def read(some: Int64, answer: Answer) -> AloneMetrics:
            return read_alone_reply(some, num_classes, tests[some], len(rivals), answer.tensors)

        limit = reply_bytes(len(clients), 16 * (num_classes + len(rivals)))
        question = Question("alone", 0, request, read, limit, deadlines=len(trainings))
        parts, _ = self._collect(question, clients)
        none = np.zeros((0, len(rivals)), np.int64)
        return AloneMetrics.join([AloneMetrics(self._nobody(), none, none), *parts])

    def judge_personal(self, head: Head, plan: RoundPlan) -> ClientMetrics:
        """What each client makes of the last head for itself, judged on its own test examples.

        What it makes stays where it is. Clients that did not manage are missing; sorted by id.

        Args:
            plan: ``personal`` and local training, for the round after the last.
        """

        def request(some: Int64) -> Request:
            return train_request(plan.part(np.searchsorted(plan.clients, some)), head)

        return self._metrics("personal", request, head, plan.clients)

    def _metrics(
        self,
        kind: str,
        request: Callable[[Int64], Request],
        head: Head,
        clients: Int64,
    ) -> ClientMetrics:
        """Answers that are sums over the clients' own test examples."""
        num_classes = len(self.roster.classes)

        def read(some: Int64, answer: Answer) -> ClientMetrics:
            return read_metrics(some, num_classes, self.roster.test[some], answer.tensors)

        limit = reply_bytes(len(clients), 16 * num_classes)
        question = Question(kind, 0, request, read, limit)
        parts, _ = self._collect(question, clients)
        joined = join_metrics([self._nobody(), *parts])
        order = np.argsort(joined.clients)
        return ClientMetrics(*(column[order] for column in vars(joined).values()))

    def _nobody(self) -> ClientMetrics:
        counts = np.zeros((0, len(self.roster.classes)), np.int64)
        return ClientMetrics(np.empty(0, np.int64), np.empty(0), counts, counts)

    def close(self) -> None:
        """Let go of the nodes."""
        self.letting_go()

    def _collect(self, question: Question[T], clients: Int64) -> tuple[list[T], dict[int, str]]:
        """What the clients' nodes answered, and for everybody else why not."""
        found, missing, lost = self._ask(question, clients)
        if not lost or self.recover is None:
            return found, missing
        self.recover()
        self.seats = {}
        again, still, lost_again = self._ask(question, lost)
        if lost_again:
            raise EnvironmentFault(
                f"workers died twice in round {question.round} ({still[lost_again[0]]}); "
                "the last commit is kept",
                do="See that memory suffices; 'fedtl resume' goes on",
            )
        stay = {client: why for client, why in missing.items() if client not in lost}
        return [*found, *again], {**stay, **still}

    def _ask(
        self, question: Question[T], clients: Sequence[int] | Int64
    ) -> tuple[list[T], dict[int, str], list[int]]:
        """Answers, why the other clients have none, and which of these had their node die."""
        asked = self._seated(np.asarray(clients, np.int64))
        missing = dict.fromkeys([int(client) for client in clients], "its node is not there")
        one = self.deadline_seconds
        seconds = None if one is None else one * question.deadlines
        silence = SILENCE if seconds is None else f"{SILENCE} within {seconds:g} s"
        missing.update(dict.fromkeys(_everybody(asked), silence))
        requests = {node: question.request(own) for node, own in asked.items()}
        found: list[T] = []
        lost: list[int] = []
        answers = self.exchange.ask(question.kind, requests, seconds, max_bytes=question.max_bytes)
        for node, answer in answers:
            own = asked.pop(node).tolist()
            result = self._read(question, np.array(own, np.int64), answer)
            if isinstance(result, str):
                missing.update(dict.fromkeys(own, result))
                lost += own if answer.lost else []
            else:
                found.append(result)
                for client in own:
                    del missing[client]
            if answer.facts.get("unprepared"):  # it is seated anew before it is asked again
                self.seats = {other: c for other, c in self.seats.items() if other != node}
            if question.needed is not None and len(clients) - len(missing) >= question.needed:
                why = f"late: the round had its {question.needed} answers"
                missing.update(dict.fromkeys(_everybody(asked), why))
                break
        return found, missing, lost

    def _read(self, question: Question[T], own: Int64, answer: Answer) -> T | str:
        """What a node says of its clients, or why that is nothing."""
        if answer.lost and answer.exit_code and self.recover is None:
            raise EnvironmentFault(
                f"{answer.error}; the last commit is kept", do="'fedtl resume' goes on"
            )
        if answer.error is not None:
            if answer.exit_code and not (self.real or answer.lost):
                raise KINDS.get(answer.exit_code, FedtlError)(answer.error)
            return answer.error
        try:
            return question.read(own, answer)
        except FedtlError as error:
            return f"its reply was refused: {error.line()}"

    def _wait_for(self, number: int, clients: Int64) -> None:
        """Until so many of the clients are there, or the time is over."""
        until = time.monotonic() + self.waiting_seconds
        while len(_everybody(self._seated(clients))) < number and time.monotonic() < until:
            time.sleep(STEP_SECONDS)

    def _seated(self, clients: Int64) -> dict[int, Int64]:
        """The given clients by the nodes that are there now, with new nodes taken in first."""
        there = set(self.exchange.nodes())
        if new := there - set(self.seats):
            placed = dict(self.seat(new))
            taken = np.concatenate([np.empty(0, np.int64), *placed.values()])
            for node, own in self.seats.items():  # a client may come back behind another node
                if node in there or not np.isin(own, taken).any():
                    placed.setdefault(node, own)
            self.seats = placed
            self._check_seats()
            there = set(self.exchange.nodes())  # seating waits for nodes: more may have come
        found = {
            node: np.intersect1d(own, clients, assume_unique=True)
            for node, own in self.seats.items()
            if node in there
        }
        return {node: own for node, own in found.items() if len(own)}

    def _check_seats(self) -> None:
        """Every client behind one node at most, and none that nobody knows."""
        hosted = np.concatenate([np.empty(0, np.int64), *self.seats.values()])
        ids, counts = np.unique(hosted, return_counts=True)
        wrong = ids[(counts > 1) | (ids < 0) | (ids >= self.roster.num_clients)]
        if len(wrong):
            names = self.exchange.nodes()
            who = [n for n, own in self.seats.items() if np.isin(wrong, own).any()]
            raise InputError(
                "a client is hosted twice, or nobody knows it",
                where=" and ".join(names.get(n) or f"node {n}" for n in who),
                got=f"client {wrong[0]}",
            )


def _everybody(asked: Mapping[int, Int64]) -> list[int]:
    return [client for own in asked.values() for client in own.tolist()]
