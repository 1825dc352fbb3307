"""What the federated head is compared with: each client alone, the best of them, everybody pooled.

Every head is judged twice: on the client's own test examples ("test") and on everybody's
("everyone"), because on real domains the two can give opposite verdicts. Which examples it has
right is remembered until heads are compared, pair by pair, and then forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.clients.blocks import run_blocks
from fedtl.clients.evaluation import Right, evaluate_clients, evaluate_heads, evaluate_own
from fedtl.clients.networks import JUDGED_THROUGH, head_of, network
from fedtl.clients.training import train_clients
from fedtl.evaluation.answers import Answers
from fedtl.evaluation.metrics import PerClient, defined, overall, per_client
from fedtl.evaluation.pooled import fit_pooled, train_pooled
from fedtl.plans import RoundPlan
from fedtl.types import (
    ClientMetrics,
    Float32,
    Head,
    Int64,
    LocalTraining,
    Population,
    Rows,
    join_metrics,
)

HEADS_AT_A_TIME = 256
"""Local heads held in memory together: 256 heads of 512 x 10 are 5 MB."""


CHOICE_EXAMPLES = 10_000
"""At most so many of everybody's training examples (seeded) choose the best of own heads."""


@dataclass(frozen=True)
class Judgement:
    """What one kind of head is worth.

    Attributes:
        clients: int64 [k], the judged clients.
        facts: for ``summary.json``: metrics on the clients' own test examples, and
            ``accuracy_everyone`` on everybody's.
        own: metrics of each client's head on its own test examples.
        everyone: metrics of each client's head on everybody's test examples.
        sums: what ``own`` follows from.
        answers: which examples are right; None where they stayed with the clients.
        head: the judged one, where all share it and it is asked for later.
    """

    clients: Int64
    facts: dict[str, Any]
    own: PerClient
    everyone: PerClient
    sums: ClientMetrics
    answers: Answers | None = None
    head: Head | None = None


@dataclass(frozen=True)
class Judge:
    """Where heads are judged, the same for all of them.

    Attributes:
        population: who holds what.
        clients: int64 [k], the judged clients, sorted.
        everyone: int64 [m], the test rows that stand for everybody's.
        threads, device: where it is computed.
    """

    population: Population
    clients: Int64
    everyone: Int64
    threads: int
    device: str

    def on_everyone(self, heads: Head, right: Right | None = None) -> ClientMetrics:
        """M heads (leading axis) on everybody's test examples."""
        return self.on_rows(self.everyone, heads, right)

    def on_rows(self, rows: Int64, heads: Head, right: Right | None = None) -> ClientMetrics:
        """M heads (leading axis) on some rows."""
        return evaluate_heads(
            self.population.features,
            self.population.labels,
            rows,
            heads,
            len(self.population.classes),
            threads=self.threads,
            device=self.device,
            right=right,
            tail=self.population.tail,
        )


def everyone_rows(population: Population, clients: Int64, limit: int, seed: int) -> Int64:
    """The judged clients' test rows, or a seeded sample of ``limit`` of them."""
    parts = [population.test.of(client) for client in clients.tolist()]
    rows: Int64 = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(rows) <= limit:
        return rows
    picked = seeding.generator(seed, "everyone").choice(len(rows), limit, replace=False)
    return rows[np.sort(picked)]


def choice_rows(population: Population, seed: int) -> Int64:
    """Everybody's training rows, or a seeded sample of CHOICE_EXAMPLES of them."""
    rows = np.sort(population.train.index)
    if len(rows) <= CHOICE_EXAMPLES:
        return rows
    picked = seeding.generator(seed, "best_client").choice(len(rows), CHOICE_EXAMPLES, False)
    return rows[np.sort(picked)]


def judge_alone(
    judge: Judge,
    head: Head,
    trainings: Sequence[LocalTraining],
    seed: int,
    check: Callable[[], None] = lambda: None,
    choosing: Int64 | None = None,
) -> Judgement:
    """Each client trains alone: the federation's rounds, every one of them, and nobody to average.

    A client alone is not sampled, so under client sampling it trains in more rounds than in the
    federation: that is what it would do.

    Args:
        trainings: what a client does in each round, its learning rate on schedule.
        check: called before each round; may raise to stop.
        choosing: training rows int64 [n] by which the best of these heads is found, or None.

    Returns:
        ``accuracy`` is over all test examples, each judged by its own client's head;
        ``accuracy_everyone`` is the mean over clients of their head's accuracy on everybody's.
        With ``choosing``, ``head`` is the one that has most of these rows right (of equal ones the
        first), and the facts name its client.
    """
    own: list[ClientMetrics] = []
    everyone: list[ClientMetrics] = []
    answers: list[Answers] = []
    best, chosen, most = None, -1, -1
    for clients in _chunks(judge.clients, HEADS_AT_A_TIME):
        heads: Head | None = None
        for round, training in enumerate(trainings, 1):
            check()
            keys = seeding.client_keys(seed, "local_only", round, clients)
            heads = train_clients(
                judge.population,
                head,
                RoundPlan(round, clients, keys, training),
                threads=judge.threads,
                device=judge.device,
                initial=heads,
            ).tensors
        assert heads is not None
        at_home: Right = []
        abroad: Right = []
        mine = evaluate_own(
            judge.population,
            heads,
            clients,
            threads=judge.threads,
            device=judge.device,
            right=at_home,
        )
        own.append(mine)
        everyone.append(replace(judge.on_everyone(heads, abroad), clients=clients))
        answers.append(Answers.of(at_home, abroad))
        if choosing is not None:
            hits = judge.on_rows(choosing, heads).correct.sum(axis=1)
            place = int(np.argmax(hits))
            if hits[place] > most:
                most, chosen = int(hits[place]), int(clients[place])
                best = {name: tensor[place].copy() for name, tensor in heads.items()}
    judgement = judged(
        join_metrics(own), join_metrics(everyone), len(judge.everyone), Answers.join(answers)
    )
    judgement.facts["epochs"] = sum(training.epochs for training in trainings)
    if best is not None and choosing is not None:
        judgement.facts["best_client"] = judge.population.names[chosen]
        judgement.facts["best_client_train_accuracy"] = most / max(1, len(choosing))
    return replace(judgement, head=best)


def judge_best(judge: Judge, alone: Judgement) -> Judgement:
    """The best of the clients' own heads as if it were everybody's.

    Args:
        alone: as ``judge_alone`` gives it, with a head chosen on training rows.
    """
    assert alone.head is not None
    judgement = judge_shared(judge, alone.head)
    judgement.facts["client"] = alone.facts["best_client"]
    judgement.facts["train_accuracy"] = alone.facts["best_client_train_accuracy"]
    return judgement


def judge_pooled(
    judge: Judge, head: Head, weight_decay: float, check: Callable[[], None] = lambda: None
) -> Judgement:
    """One head on everybody's training examples, to convergence: what pooling would give."""
    rows = np.sort(judge.population.train.index)
    fit = fit_pooled(judge.population, head, rows, weight_decay, judge.device, check)
    judgement = judge_shared(judge, fit.head)
    judgement.facts.update(
        train_loss=defined(fit.loss),
        largest_gradient=defined(fit.gradient),
        evaluations=fit.evaluations,
        converged=fit.converged,
    )
    return replace(judgement, head=fit.head)


def judge_pooled_steps(
    judge: Judge,
    head: Head,
    trainings: Sequence[LocalTraining],
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Judgement:
    """The same where a network before the head is trained too: by the clients' steps, pooled."""
    fitted, loss = train_pooled(
        judge.population, head, trainings, seed, device=judge.device, check=check
    )
    judgement = judge_shared(judge, fitted)
    epochs = sum(training.epochs for training in trainings)
    judgement.facts.update(train_loss=defined(loss), epochs=epochs)
    return replace(judgement, head=fitted)


def from_optimum(
    judge: Judge, head: Head, pooled: Judgement, weight_decay: float
) -> dict[str, float | None]:
    """How far a head is from the pooled optimum, which with a linear head is the one right answer.

    Args:
        pooled: as ``judge_pooled`` gives it.
        weight_decay: of the objective that both are measured by.

    Returns:
        ``excess_loss``: the head's loss on everybody's training examples, weight decay with it,
        above the optimum's; a little below 0 where the optimum's own fit is not exact.
        ``optimum_distance``: |w - w*| / |w*|; None where the fit did not converge, as separable
        data without weight decay have no finite optimum, or w* is 0, as of constant features.
    """
    everybody = np.arange(judge.population.num_clients)
    loss = evaluate_clients(
        judge.population,
        head,
        everybody,
        split="train",
        threads=judge.threads,
        device=judge.device,
    )
    mean = float(loss.loss_sum.sum()) / max(1, int(loss.count.sum()))
    best = pooled.facts["train_loss"]  # None where features are so large that it overflowed
    excess = math.nan if best is None else mean + weight_decay / 2 * _squares(head) - best
    distance = None
    if pooled.facts["converged"] and pooled.head is not None:
        apart = {name: head[name] - tensor for name, tensor in pooled.head.items()}
        length = _squares(pooled.head)
        distance = defined(math.sqrt(_squares(apart) / length)) if length else None
    return {"excess_loss": defined(excess), "optimum_distance": distance}


def _squares(head: Head) -> float:
    return sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in head.values())


def judge_shared(judge: Judge, head: Head) -> Judgement:
    """One head that all clients share: on each client's own test examples and on everybody's."""
    judge, head = past_network(judge, head)
    answers: tuple[Right, Right] = ([], [])
    own = evaluate_clients(
        judge.population,
        head,
        judge.clients,
        threads=judge.threads,
        device=judge.device,
        right=answers[0],
    )
    shared = judge.on_everyone({name: tensor[None] for name, tensor in head.items()}, answers[1])
    return judged(own, for_each(shared, judge.clients), len(judge.everyone), Answers.of(*answers))


def past_network(judge: Judge, head: Head) -> tuple[Judge, Head]:
    """The judge on what a head's network behind the cut makes of all tests, and the head alone.

    Every test row passes once, whatever it is judged for then: at home, among everybody's, for
    calibration. Rows pass in slices of one client's own, as at the client itself, so that results
    depend on no number of threads. Without a network both stay as they are.
    """
    population = judge.population
    if population.tail is None:
        return judge, head
    import torch

    from fedtl.clients.batched import one_torch_thread

    own = tests_of(judge)
    others = np.setdiff1d(judge.everyone, np.concatenate([judge.everyone[:0], *own]))
    slices = [
        rows[low : low + JUDGED_THROUGH]
        for rows in (*own, others)
        for low in range(0, len(rows), JUDGED_THROUGH)
    ]
    tests = np.unique(np.concatenate([judge.everyone, *own]))
    features = np.empty((len(tests), population.tail.width), np.float32)
    tensors = {name: torch.tensor(own, device=judge.device) for name, own in head.items()}

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        with network(population.tail) as through, torch.no_grad():
            for rows in slices[first:stop]:
                x = torch.from_numpy(population.features[rows].astype(np.float32))
                made = through(tensors, x.to(judge.device)).cpu().numpy()
                features[np.searchsorted(tests, rows)] = made

    with one_torch_thread():
        run_blocks(work, len(slices), threads=judge.threads if judge.device == "cpu" else 1)
    return moved(judge, tests, features), head_of(head)


def tests_of(judge: Judge) -> list[Int64]:
    """Each judged client's test rows."""
    return [judge.population.test.of(client) for client in judge.clients.tolist()]


def moved(judge: Judge, rows: Int64, features: Float32) -> Judge:
    """The judge over other features of only the given rows (sorted), with nothing to train on."""
    population = judge.population
    tests = tests_of(judge)
    sizes = np.zeros(population.num_clients, np.int64)
    sizes[judge.clients] = [len(own) for own in tests]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    index = np.searchsorted(rows, np.concatenate([np.empty(0, np.int64), *tests]))
    moved: Population = replace(
        population,
        features=features,
        labels=population.labels[rows],
        train=Rows(np.empty(0, np.int64), np.zeros_like(ends)),
        test=Rows(index, ends),
        tail=None,
    )
    return replace(judge, population=moved, everyone=np.searchsorted(rows, judge.everyone))


def for_each(shared: ClientMetrics, clients: Int64) -> ClientMetrics:
    """The metrics of one head, a single row, as those of every client."""
    size = len(clients)
    return ClientMetrics(
        clients,
        np.repeat(shared.loss_sum, size),
        np.repeat(shared.correct, size, axis=0),
        np.repeat(shared.count, size, axis=0),
    )


def judged(
    own: ClientMetrics,
    everyone: ClientMetrics,
    num_everyone: int,
    answers: Answers | None = None,
) -> Judgement:
    """A judgement from sums: on each client's own test examples and on ``num_everyone`` of all."""
    each, everywhere = per_client(own), per_client(everyone)
    facts: dict[str, Any] = dict(overall(own).as_facts())
    facts["accuracy_everyone"] = defined(float(np.mean(everywhere.accuracy)))
    facts["examples_everyone"] = num_everyone
    facts["clients"] = len(own.clients)
    return Judgement(own.clients, facts, each, everywhere, own, answers)


def _chunks(clients: Int64, size: int) -> Iterator[Int64]:
    for start in range(0, len(clients), size):
        yield clients[start : start + size]
