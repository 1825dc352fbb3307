"""What the federated head is compared with: each client alone, and everybody pooled.

Every head is judged twice: on the client's own test examples ("test") and on everybody's
("everyone"), because on real domains the two can give opposite verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fedtl import seeding
from fedtl.clients.evaluation import evaluate_clients, evaluate_heads, evaluate_own
from fedtl.clients.training import train_clients
from fedtl.evaluation.contributions import Contribution
from fedtl.evaluation.metrics import PerClient, defined, nullable, overall, per_client
from fedtl.evaluation.pooled import fit_pooled
from fedtl.plans import RoundPlan
from fedtl.results.records import CLIENTS, Complete
from fedtl.types import ClientMetrics, Head, Int64, LocalTraining, Population, join_metrics

HEADS_AT_A_TIME = 256
"""Local heads held in memory together: 256 heads of 512 x 10 are 5 MB."""


@dataclass(frozen=True)
class Judgement:
    """What one kind of head is worth.

    Attributes:
        clients: int64 [k], the judged clients.
        facts: for ``summary.json``: metrics on the clients' own test examples, and
            ``accuracy_everyone`` on everybody's.
        own: metrics of each client's head on its own test examples.
        everyone: metrics of each client's head on everybody's test examples.
        head: the judged one, where all share it and it is asked for later.
    """

    clients: Int64
    facts: dict[str, Any]
    own: PerClient
    everyone: PerClient
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

    def on_everyone(self, heads: Head) -> ClientMetrics:
        """M heads (leading axis) on everybody's test examples."""
        return evaluate_heads(
            self.population.features,
            self.population.labels,
            self.everyone,
            heads,
            len(self.population.classes),
            threads=self.threads,
            device=self.device,
        )


def everyone_rows(population: Population, clients: Int64, limit: int, seed: int) -> Int64:
    """The judged clients' test rows, or a seeded sample of ``limit`` of them."""
    parts = [population.test.of(client) for client in clients.tolist()]
    rows: Int64 = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if len(rows) <= limit:
        return rows
    picked = seeding.generator(seed, "everyone").choice(len(rows), limit, replace=False)
    return rows[np.sort(picked)]


def judge_alone(
    judge: Judge,
    head: Head,
    trainings: Sequence[LocalTraining],
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Judgement:
    """Each client trains alone: the federation's rounds, every one of them, and nobody to average.

    A client alone is not sampled, so under client sampling it trains in more rounds than in the
    federation: that is what it would do.

    Args:
        trainings: what a client does in each round, its learning rate on schedule.
        check: called before each round; may raise to stop.

    Returns:
        ``accuracy`` is over all test examples, each judged by its own client's head;
        ``accuracy_everyone`` is the mean over clients of their head's accuracy on everybody's.
    """
    own: list[ClientMetrics] = []
    everyone: list[ClientMetrics] = []
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
        mine = evaluate_own(
            judge.population, heads, clients, threads=judge.threads, device=judge.device
        )
        abroad = replace(judge.on_everyone(heads), clients=clients)
        own.append(mine)
        everyone.append(abroad)
    judgement = judged(join_metrics(own), join_metrics(everyone), len(judge.everyone))
    judgement.facts["epochs"] = sum(training.epochs for training in trainings)
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
        data without weight decay have no finite optimum.
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
    excess = mean + weight_decay / 2 * _squares(head) - pooled.facts["train_loss"]
    distance = None
    if pooled.facts["converged"] and pooled.head is not None:
        apart = {name: head[name] - tensor for name, tensor in pooled.head.items()}
        distance = defined(float(np.sqrt(_squares(apart) / _squares(pooled.head))))
    return {"excess_loss": defined(excess), "optimum_distance": distance}


def _squares(head: Head) -> float:
    return sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in head.values())


def judge_shared(judge: Judge, head: Head) -> Judgement:
    """One head that all clients share: on each client's own test examples and on everybody's."""
    own = evaluate_clients(
        judge.population, head, judge.clients, threads=judge.threads, device=judge.device
    )
    shared = judge.on_everyone({name: tensor[None] for name, tensor in head.items()})
    return judged(own, for_each(shared, judge.clients), len(judge.everyone))


def for_each(shared: ClientMetrics, clients: Int64) -> ClientMetrics:
    """The metrics of one head, a single row, as those of every client."""
    size = len(clients)
    return ClientMetrics(
        clients,
        np.repeat(shared.loss_sum, size),
        np.repeat(shared.correct, size, axis=0),
        np.repeat(shared.count, size, axis=0),
    )


def judged(own: ClientMetrics, everyone: ClientMetrics, num_everyone: int) -> Judgement:
    """A judgement from sums: on each client's own test examples and on ``num_everyone`` of all."""
    each, everywhere = per_client(own), per_client(everyone)
    facts: dict[str, Any] = dict(overall(own).as_facts())
    facts["accuracy_everyone"] = defined(float(np.mean(everywhere.accuracy)))
    facts["examples_everyone"] = num_everyone
    facts["clients"] = len(own.clients)
    return Judgement(own.clients, facts, each, everywhere)


def beside(
    references: Mapping[str, Judgement],
    last_round: int,
    contributions: Sequence[Contribution] = (),
) -> Complete:
    """Puts the references' metrics beside the federated head's, in the last round's rows.

    Args:
        references: judgements by name (``local_only``, ``centralised``).
        last_round: in whose rows they belong.
        contributions: what each client brings, by its statistics; beside its own tests.
    """
    values: dict[tuple[str, str], dict[int, float | None]] = {}
    for whose in ("own", "others"):
        values["test", f"contribution_{whose}"] = {
            one.client: defined(getattr(one, f"gain_{whose}")) for one in contributions
        }
    for name, judgement in references.items():
        for split, each in (("test", judgement.own), ("everyone", judgement.everyone)):
            for metric in ("accuracy", "loss"):
                column = nullable(getattr(each, metric))
                clients = judgement.clients.tolist()
                values[split, f"{name}_{metric}"] = dict(zip(clients, column, strict=True))

    def complete(batch: pa.RecordBatch) -> pa.RecordBatch:
        # every batch holds one round and one split: that is how the loop appends them
        if batch.num_rows == 0 or batch["round"][0].as_py() != last_round:
            return batch
        here, clients = batch["split"][0].as_py(), batch["client"].to_pylist()
        for (split, name), found in values.items():
            if split == here:
                column = pa.array([found.get(client) for client in clients], pa.float64())
                batch = batch.set_column(CLIENTS.get_field_index(name), name, column)
        return batch

    return complete


def _chunks(clients: Int64, size: int) -> Iterator[Int64]:
    for start in range(0, len(clients), size):
        yield clients[start : start + size]
