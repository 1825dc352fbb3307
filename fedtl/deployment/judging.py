"""The last head and its references where the data are other people's.

The federated head is judged by every client on its own test examples; those sums are everybody's
tests together. A client's own head, trained alone, is judged at home and stays there: what it would
be worth on others' examples is not known. Each client also says how often only its own head, and
only the federation's, is right: two counts, from which its verdict follows. Nobody can pool what
nobody holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.conduct import Judge, Judged, Outcome
from fedtl.engines.alone import AloneMetrics
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.errors import PolicyStop
from fedtl.evaluation.advice import Compared
from fedtl.evaluation.personalised import last_plan
from fedtl.evaluation.references import Judgement, for_each, judged
from fedtl.evaluation.significance import Pairs
from fedtl.planning import judged_clients, local_training, training_at_end
from fedtl.plans import Personal, RoundPlan
from fedtl.rounds import Federation
from fedtl.types import ClientMetrics, Int64

NOT_POOLED = (
    "nobody holds everybody's data, so there is no pooled reference; simulate with public data "
    "of the same kind to see one"
)

NOT_HERE = {
    "centralised": NOT_POOLED,
    "ridge": NOT_POOLED,
    "best_client": "own heads stay with their clients, so the best of them is not known",
    "from_scratch": "nobody holds everybody's images, so no network is trained on them",
}
"""References that real clients cannot give, and why."""


def judge_remotely(
    federation: Federation, engine: FlowerEngine, note: Callable[[str], None]
) -> Judge:
    """How a deployment's heads are judged; see ``conduct.Judge``.

    Args:
        engine: the federation's, with the clients behind it.
        note: takes a line that the user should know.
    """

    def judge(outcome: Outcome, begin: Callable[[str], None], check: Callable[[], None]) -> Judged:
        return _Judging(federation, engine, note, outcome, begin).all()

    return judge


@dataclass(frozen=True)
class _Judging:
    """One judging of one outcome; see ``judge_remotely``."""

    federation: Federation
    engine: FlowerEngine
    note: Callable[[str], None]
    outcome: Outcome
    begin: Callable[[str], None]

    def all(self) -> Judged:
        """The federated head and what the clients can say of others."""
        own = self._shared_head()
        personal = self.outcome.personal
        found = {"federated": _shared(own)}
        if personal is not None:
            self.begin("personal")
            mine = self._personal(personal, own.clients)
            if len(mine.clients):
                found["personal"] = judged(mine, _unknown(mine), 0)
                if personal.completes:
                    found["federated"], own = found["personal"], mine
            else:
                self.note("no client could make a head of its own: these are not judged")
        beside, compared = found["federated"], {}
        for name in self.federation.scenario.evaluation.references:
            if name == "fine_tuned" and self._tuned() is None:
                continue
            self.begin(name)
            if name in NOT_HERE:
                self.note(NOT_HERE[name])
            elif name == "start":
                start = self.outcome.start or self.federation.head
                found[name] = _shared(self.engine.evaluate(start, own.clients))
            elif name == "local_only":
                alone, names = self._alone(own.clients, "personal" in found)
                if not len(alone.metrics.clients):
                    self.note("no client could train alone: that reference is missing")
                    continue
                found[name] = self._facts(alone)
                compared = _compared(alone, names)
                both = np.isin(own.clients, alone.metrics.clients)
                if not both.all():
                    some = _some(own, both)
                    beside = judged(some, _unknown(some), 0) if self._completes else _shared(some)
            elif (tuned := self._tuned()) is not None:
                mine = self._personal(tuned, own.clients)
                if len(mine.clients):
                    found[name] = judged(mine, _unknown(mine), 0)
                    found[name].facts.update(epochs=tuned.epochs, forgetting=None)
        return Judged(found, beside, compared)

    @property
    def _completes(self) -> bool:
        """Whether the shared head is no model without what is the clients' own."""
        return self.outcome.personal is not None and self.outcome.personal.completes

    def _tuned(self) -> Personal | None:
        """The reference fine_tuned, where it is asked for and the shared head can be trained."""
        section = self.federation.scenario.evaluation
        trained = set(self.outcome.head) == set(self.federation.head)
        if "fine_tuned" not in section.references or self._completes or not trained:
            return None
        return Personal("finetune", epochs=section.fine_tune_epochs)

    def _shared_head(self) -> ClientMetrics:
        """The shared head by all clients that are there. Raises PolicyStop where none is."""
        clients = judged_clients(self.federation.scenario, self.federation.roster.num_clients)
        own = self.engine.evaluate(self.outcome.head, clients)
        if not len(own.clients):
            raise PolicyStop(
                "no client is there to judge the last head; all rounds are kept",
                do="Bring the clients back and resume",
            )
        if len(own.clients) < len(clients):
            left = np.setdiff1d(clients, own.clients).tolist()
            self.note(f"not judged, as they are not there: {_names(self.federation, left)}")
        return own

    def _alone(self, clients: Int64, personal: bool) -> tuple[AloneMetrics, list[str]]:
        """Own heads, and the names of those that they are compared with."""
        scenario = self.federation.scenario
        rounds = range(1, scenario.rounds + 1)
        keys = [seeding.client_keys(scenario.seed, "local_only", r, clients) for r in rounds]
        trainings = [local_training(scenario, round) for round in rounds]
        rivals: dict[str, RoundPlan] = {}
        if not self._completes:
            rivals["federated"] = replace(self._plan(Personal("finetune"), clients), personal=None)
        if (tuned := self._tuned()) is not None:
            rivals["fine_tuned"] = self._plan(tuned, clients)
        if personal and self.outcome.personal is not None:
            rivals["personal"] = self._plan(self.outcome.personal, clients)
        plans = list(rivals.values())
        found = self.engine.train_alone(
            self.federation.head, trainings, np.stack(keys), clients, self.outcome.head, plans
        )
        return found, list(rivals)

    def _facts(self, alone: AloneMetrics) -> Judgement:
        training = self.federation.scenario.training
        judgement = judged(alone.metrics, _unknown(alone.metrics), 0)
        judgement.facts["epochs"] = training.local_epochs * self.federation.scenario.rounds
        return judgement

    def _personal(self, personal: Personal, clients: Int64) -> ClientMetrics:
        return self.engine.judge_personal(self.outcome.head, self._plan(personal, clients))

    def _plan(self, personal: Personal, clients: Int64) -> RoundPlan:
        scenario = self.federation.scenario
        training = training_at_end(scenario)
        return last_plan(personal, training, self.outcome.rounds, scenario.seed, clients)


def _compared(alone: AloneMetrics, names: Sequence[str]) -> dict[str, Compared]:
    """The pairs of each rival, at home; where there is no shared head, "personal" is federated."""
    examples = alone.metrics.count.sum(axis=1)
    found = {
        name: Compared(Pairs(alone.beats[:, r], alone.loses[:, r], examples), None)
        for r, name in enumerate(names)
    }
    return {"federated": found["personal"], **found} if "federated" not in found else found


def _shared(own: ClientMetrics) -> Judgement:
    """One head: everybody's tests are all clients' own together."""
    total = ClientMetrics(
        np.zeros(1, np.int64),
        own.loss_sum.sum(keepdims=True),
        own.correct.sum(axis=0, keepdims=True),
        own.count.sum(axis=0, keepdims=True),
    )
    return judged(own, for_each(total, own.clients), int(own.count.sum()))


def _some(metrics: ClientMetrics, kept: npt.NDArray[np.bool_]) -> ClientMetrics:
    return ClientMetrics(*(column[kept] for column in vars(metrics).values()))


def _unknown(metrics: ClientMetrics) -> ClientMetrics:
    zeros = np.zeros_like(metrics.count)
    return ClientMetrics(metrics.clients, np.zeros(len(metrics.clients)), zeros, zeros)


def _names(federation: Federation, clients: Sequence[int]) -> str:
    names = [federation.roster.names[client] for client in clients[:5]]
    return ", ".join(names) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
