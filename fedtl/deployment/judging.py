"""The last head and its references where the data are other people's.

The federated head is judged by every client on its own test examples; those sums are everybody's
tests together. A client's own head, trained alone, is judged at home and stays there: what it would
be worth on others' examples is not known. Nobody can pool what nobody holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedtl import seeding
from fedtl.conduct import Judge, Outcome
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.errors import PolicyStop
from fedtl.evaluation.personalised import last_plan
from fedtl.evaluation.references import Judgement, for_each, judged
from fedtl.planning import judged_clients, local_training
from fedtl.rounds import Federation
from fedtl.types import ClientMetrics, Int64

NOT_POOLED = (
    "nobody holds everybody's data, so there is no pooled reference; simulate with public data "
    "of the same kind to see one"
)


def judge_remotely(
    federation: Federation, engine: FlowerEngine, note: Callable[[str], None]
) -> Judge:
    """How a deployment's heads are judged; see ``conduct.Judge``.

    Args:
        engine: the federation's, with the clients behind it.
        note: takes a line that the user should know.
    """
    scenario = federation.scenario

    def judge(
        outcome: Outcome, begin: Callable[[str], None], check: Callable[[], None]
    ) -> dict[str, Judgement]:
        head = outcome.head
        clients = judged_clients(scenario, federation.roster.num_clients)
        own = engine.evaluate(head, clients)
        if not len(own.clients):
            raise PolicyStop(
                "no client is there to judge the last head; all rounds are kept",
                do="Bring the clients back and resume",
            )
        if len(own.clients) < len(clients):
            left = np.setdiff1d(clients, own.clients).tolist()
            note(f"not judged, as they are not there: {_names(federation, left)}")
        found = {"federated": _shared(own)}
        if outcome.personal is not None:
            begin("personal")
            mine = _personal(federation, engine, own.clients, outcome)
            if len(mine.clients):
                found["personal"] = judged(mine, _unknown(mine), 0)
                if outcome.personal.completes:
                    found["federated"] = found["personal"]
            else:
                note("no client could make a head of its own: these are not judged")
        for name in scenario.evaluation.references:
            begin(name)
            if name in ("centralised", "ridge"):
                note(NOT_POOLED)
                continue
            alone = _alone(federation, engine, own.clients)
            both = np.isin(own.clients, alone.clients)
            if not both.any():
                note("no client could train alone: that reference is missing")
                continue
            if not both.all():
                found["federated_sample"] = _shared(_some(own, both))
            found[name] = judged(alone, _unknown(alone), 0)
            found[name].facts["epochs"] = scenario.training.local_epochs * scenario.rounds
        return found

    return judge


def _alone(federation: Federation, engine: FlowerEngine, clients: Int64) -> ClientMetrics:
    scenario = federation.scenario
    rounds = range(1, scenario.rounds + 1)
    keys = [seeding.client_keys(scenario.seed, "local_only", r, clients) for r in rounds]
    trainings = [local_training(scenario, round) for round in rounds]
    return engine.train_alone(federation.head, trainings, np.stack(keys), clients)


def _personal(
    federation: Federation, engine: FlowerEngine, clients: Int64, outcome: Outcome
) -> ClientMetrics:
    scenario = federation.scenario
    training = local_training(scenario, 1)  # a schedule may have ended near zero
    assert outcome.personal is not None
    plan = last_plan(outcome.personal, training, outcome.rounds, scenario.seed, clients)
    return engine.judge_personal(outcome.head, plan)


def _shared(own: ClientMetrics) -> Judgement:
    """One head: everybody's tests are all clients' own together."""
    total = ClientMetrics(
        np.zeros(1, np.int64),
        own.loss_sum.sum(keepdims=True),
        own.correct.sum(axis=0, keepdims=True),
        own.count.sum(axis=0, keepdims=True),
    )
    return judged(own, for_each(total, own.clients), int(own.count.sum()))


def _some(
    metrics: ClientMetrics, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> ClientMetrics:
    return ClientMetrics(*(column[kept] for column in vars(metrics).values()))


def _unknown(metrics: ClientMetrics) -> ClientMetrics:
    zeros = np.zeros_like(metrics.count)
    return ClientMetrics(metrics.clients, np.zeros(len(metrics.clients)), zeros, zeros)


def _names(federation: Federation, clients: Sequence[int]) -> str:
    names = [federation.roster.names[client] for client in clients[:5]]
    return ", ".join(names) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
