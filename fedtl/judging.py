"""The last head and its references in a simulation, on the population that is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.build import Built, resolve_device
from fedtl.clients.attacks import backdoor_success
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.training import LINEAR
from fedtl.conduct import Judged, Outcome
from fedtl.evaluation import references
from fedtl.evaluation.advice import Compared
from fedtl.evaluation.calibration import Calibration, calibrate
from fedtl.evaluation.forgetting import Source
from fedtl.evaluation.personalised import forgotten, judge_personalised
from fedtl.evaluation.references import Judge, Judgement
from fedtl.evaluation.ridge import fit_ridge
from fedtl.evaluation.scratch import Order, judge_scratch
from fedtl.planning import (
    judged_clients,
    liars_of,
    local_training,
    scratch_rates,
    training_at_end,
)
from fedtl.plans import Personal
from fedtl.ready_features import allowed_threads
from fedtl.scenario.head_rules import regularised
from fedtl.transfer.backbones import Backbone
from fedtl.unprotected import train_unprotected

RIDGE = 0.01
"""Of the pooled ridge head, where the strategy has none of its own."""

NOT_TUNED = (
    "fine_tuned is left out: this strategy's shared head is none that clients could train further "
    "by themselves"
)


@dataclass(frozen=True)
class Judging:
    """Judges a simulation's last head, see ``conduct.Judge``.

    Attributes:
        built: the federation and everybody's data.
        image_size: side in pixels of what the trunk sees.
        store: what clients kept over the rounds.
        backbone: up to the cut; where it is known, what was forgotten can be measured.
    """

    built: Built
    image_size: int
    store: PersonalStore
    backbone: Backbone | None = None

    def __call__(
        self, outcome: Outcome, begin: Callable[[str], None], check: Callable[[], None]
    ) -> Judged:
        """The federated head and every reference, each judged at home and on everybody's tests."""
        population = self.built.population
        scenario = self.built.federation.scenario
        judged = judged_clients(scenario, population.num_clients)
        limit = scenario.evaluation.everyone_examples
        rows = references.everyone_rows(population, judged, limit, scenario.seed)
        place = Judge(population, judged, rows, allowed_threads(scenario), resolve_device(scenario))
        return _Judging(self, outcome, place, begin, check).all()

    def sample(self, place: Judge) -> Judge:
        """The clients that are also trained alone."""
        section = self.built.federation.scenario.evaluation
        limit = section.reference_clients
        if len(place.clients) <= limit or not section.references:
            return place
        stream = seeding.generator(self.built.federation.scenario.seed, "references")
        return replace(place, clients=np.sort(stream.choice(place.clients, limit, replace=False)))


@dataclass(frozen=True)
class _Judging:
    """One judging of one outcome.

    Attributes:
        of: what is judged on.
        outcome: what is judged.
        place: where, with all judged clients.
        begin, check: see ``conduct.Judge``.
    """

    of: Judging
    outcome: Outcome
    place: Judge
    begin: Callable[[str], None]
    check: Callable[[], None]

    @property
    def whole(self) -> bool:
        """Whether the shared head is a model by itself."""
        personal = self.outcome.personal
        return personal is None or not personal.completes

    def all(self) -> Judged:
        """Every head, and the pairs of answers that verdicts rest on."""
        federation = self.of.built.federation
        scenario, sample, found = federation.scenario, self.of.sample(self.place), {}
        if self.outcome.personal is not None:
            self.begin("personal")
            found["personal"] = self._own(self.place, self.outcome.personal)
        found["federated"] = self._shared(self.place, found.get("personal"))
        beside, mine = found["federated"], found.get("personal")
        if sample is not self.place:
            if self.outcome.personal is not None:
                mine = self._own(sample, self.outcome.personal)
            beside = self._shared(sample, mine)
        trained = self.whole and set(self.outcome.head) == set(federation.head)
        alone: Judgement | None = None
        for name in scenario.evaluation.references:
            if name == "fine_tuned" and not trained:
                continue
            self.begin(name)
            if name in ("local_only", "best_client"):
                alone = alone or self._alone(sample)
                found[name] = (
                    alone if name == "local_only" else references.judge_best(sample, alone)
                )
            else:
                found[name] = self._reference(name, sample, beside)
        if scenario.privacy.mechanism != "none" and scenario.privacy.compare and self.whole:
            self.begin("unprotected")
            head = train_unprotected(self.of.built, self.check)
            found["unprotected"] = references.judge_shared(sample, head)
        self._add_facts(found, sample)
        compared = {}
        if "local_only" in found:
            heads = {"federated": beside, "fine_tuned": found.get("fine_tuned"), "personal": mine}
            compared = {
                name: _against(head, found["local_only"])
                for name, head in heads.items()
                if head is not None
            }
        missing = "fine_tuned" in scenario.evaluation.references and not trained
        notes = (NOT_TUNED,) if missing else ()
        calibration, forgotten = self._calibration(sample), self._forgetting()
        return Judged(found, beside, compared, calibration, notes, forgotten)

    def _forgetting(self) -> dict[str, Any] | None:
        """What the trained network forgot of its source task, where that is at hand."""
        built, backbone = self.of.built, self.of.backbone
        scenario = built.federation.scenario
        if scenario.evaluation.source_path is None or backbone is None:
            return None
        self.begin("forgetting")
        tail, threads = built.population.tail, self.place.threads
        source = Source(scenario, backbone, tail, threads, self.check)
        return source.forgotten(built.federation.head, self.outcome.head)

    def _own(self, place: Judge, personal: Personal) -> Judgement:
        """What each client makes of the last head for itself."""
        scenario = self.of.built.federation.scenario
        return judge_personalised(
            place,
            self.outcome.head,
            personal,
            training_at_end(scenario),
            self.outcome.rounds,
            scenario.seed,
            self.of.store,
            self.check,
        )

    def _shared(self, place: Judge, mine: Judgement | None) -> Judgement:
        """The federated head; where it is no model by itself, the clients' own of it."""
        if self.whole or mine is None:
            return references.judge_shared(place, self.outcome.head)
        return mine

    def _alone(self, place: Judge) -> Judgement:
        federation = self.of.built.federation
        scenario = federation.scenario
        best = "best_client" in scenario.evaluation.references
        return references.judge_alone(
            place,
            federation.head,
            [local_training(scenario, r) for r in range(1, scenario.rounds + 1)],
            scenario.seed,
            self.check,
            references.choice_rows(place.population, scenario.seed) if best else None,
        )

    def _reference(self, name: str, place: Judge, federated: Judgement) -> Judgement:
        """One of ``evaluation.references`` that is not of clients alone."""
        federation = self.of.built.federation
        scenario, head = federation.scenario, federation.head
        if name == "fine_tuned":
            epochs = scenario.evaluation.fine_tune_epochs
            tuned = self._own(place, Personal("finetune", epochs=epochs))
            tuned.facts["epochs"] = epochs
            tuned.facts["forgetting"] = forgotten(federated, tuned)
            return tuned
        if name == "start":
            return references.judge_shared(place, self.outcome.start or head)
        if name == "from_scratch":
            return judge_scratch(place, self._order(), self.check)
        if name == "ridge":
            ridge = float(getattr(scenario.strategy, "ridge", RIDGE))
            fitted = fit_ridge(place.population, head, ridge, place.threads)
            return references.judge_shared(place, fitted)
        if place.population.tail is not None:
            trainings = [local_training(scenario, r) for r in range(1, scenario.rounds + 1)]
            return references.judge_pooled_steps(place, head, trainings, scenario.seed, self.check)
        return references.judge_pooled(place, head, scenario.training.weight_decay, self.check)

    def _order(self) -> Order:
        scenario = self.of.built.federation.scenario
        images = self.of.built.features.examples.images
        assert images is not None  # refused before
        return Order(
            images,
            scenario.backbone,
            self.of.image_size,
            scenario.head,
            scenario.training,
            scratch_rates(scenario),
            scenario.seed,
        )

    def _add_facts(self, found: dict[str, Judgement], place: Judge) -> None:
        """What is known of the federated head alone: how far from the optimum, backdoors."""
        federation, population = self.of.built.federation, self.of.built.population
        scenario, head = federation.scenario, self.outcome.head
        facts = found["federated"].facts
        if scenario.attack.kind == "backdoor" and self.whole:
            lying = liars_of(scenario, population.names)
            rate = backdoor_success(
                population, head, scenario.attack, lying, scenario.seed, threads=place.threads
            )
            facts["backdoor_success"] = None if np.isnan(rate) else rate
        pooled = found.get("centralised")
        linear = set(head) == set(federation.head) == LINEAR
        linear = linear and scenario.adaptation.prior != "balanced_softmax"  # another objective
        linear = linear and not regularised(scenario)
        if pooled is not None and self.whole and linear:  # only then there is one right answer
            decay = scenario.training.weight_decay
            facts.update(references.from_optimum(place, head, pooled, decay))

    def _calibration(self, place: Judge) -> Calibration | None:
        if not self.whole:
            return None
        self.check()
        place, head = references.past_network(place, self.outcome.head)
        return calibrate(
            place.population,
            head,
            place.clients,
            place.everyone,
            self.of.built.federation.scenario.seed,
            self.check,
        )


def _against(head: Judgement, alone: Judgement) -> Compared:
    assert head.answers is not None
    assert alone.answers is not None
    answers, others = head.answers, alone.answers
    return Compared(answers.at_home(others), answers.everywhere(others))
